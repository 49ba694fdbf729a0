"""Marian: Junczys-Dowmunt et al. 2018, arXiv 1804.00344. The original Transformer of Vaswani et al. 2017, arXiv 1706.03762."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.config import ModelConfig
from model.huggingface.architecture import (
    Architecture,
    Counterpart,
    SpecialTokens,
    all_alike,
    linear,
    one_of,
    ours_of,
    side_of,
    whole_heads,
)
from model.transformer import Block

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
_PARTS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.out_proj": "attention.output",
    "self_attn_layer_norm": "attention_norm",
    "encoder_attn.q_proj": "cross_attention.query",
    "encoder_attn.k_proj": "cross_attention.key",
    "encoder_attn.v_proj": "cross_attention.value",
    "encoder_attn.out_proj": "cross_attention.output",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "fc1": "feed_forward.up",
    "fc2": "feed_forward.down",
    "final_layer_norm": "feed_forward_norm",
}
_SIDES = ("encoder", "decoder")


class Marian(Architecture):
    label = "Marian"
    classes = ("MarianMTModel",)
    allowed = {
        "positions": ("sinusoidal",),
        "norm": ("layernorm",),
        "norm_position": ("post",),
        "norm_epsilon": (1e-5,),  # which its class does not let anyone choose
        "activation": tuple(_ACTIVATIONS),
        "tie_embeddings": (True,),
    }
    needed = (
        "vocab_size",
        "max_position_embeddings",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
    )
    supported = {
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "static_position_embeddings": True,
        "normalize_embedding": False,
        "normalize_before": False,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }
    constants = (".embed_positions.weight",)
    zeros = ("final_logits_bias",)
    embedding = "model.shared.weight"

    def auto_class(self, config: ModelConfig) -> str:
        return "AutoModelForSeq2SeqLM"

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        yield from super().refusals(config)
        yield from whole_heads(config, self.label)

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        both = {"attention_heads": config.num_attention_heads, "ffn_dim": config.intermediate_size}
        return {
            "max_position_embeddings": config.sequence_length,
            "d_model": config.hidden_size,
            "encoder_layers": config.num_layers,
            "decoder_layers": config.num_decoder_layers,
            "activation_function": _ACTIVATIONS[config.activation],
            "dropout": config.dropout,
            "attention_dropout": config.dropout,
            "activation_dropout": 0.0,
            "init_std": config.initializer_range,
            "is_encoder_decoder": True,
            "decoder_start_token_id": tokens.start,
            "forced_eos_token_id": None,
            "scale_embedding": True,
            "static_position_embeddings": True,
            "normalize_embedding": False,
            "share_encoder_decoder_embeddings": True,
        } | {f"{side}_{key}": value for side in _SIDES for key, value in both.items()}

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        yield from super().unknown_features(stated)
        yield from one_of(stated, "activation_function", "gelu", _ACTIVATIONS)
        if not stated.get("scale_embedding", False):
            yield "scale_embedding is false; only true is supported."
        if stated.get("activation_dropout", 0.0):
            yield f"activation_dropout is {stated['activation_dropout']}; only 0.0 is supported."
        yield from all_alike(stated, {"dropout": 0.1, "attention_dropout": 0.0}, "dropout")
        yield from all_alike(stated, {"encoder_attention_heads": 16, "decoder_attention_heads": 16}, "number of heads")
        yield from all_alike(stated, {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}, "width of the feed-forward")
        if stated.get("decoder_vocab_size") not in (None, stated.get("vocab_size")):
            yield f"decoder_vocab_size is {stated['decoder_vocab_size']}; only vocab_size {stated.get('vocab_size')} is supported."

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig(
            architecture="encoder_decoder",
            vocab_size=stated["vocab_size"],
            sequence_length=stated["max_position_embeddings"],
            hidden_size=stated["d_model"],
            num_layers=stated["encoder_layers"],
            num_decoder_layers=stated["decoder_layers"],
            num_attention_heads=stated["encoder_attention_heads"],
            intermediate_size=stated["encoder_ffn_dim"],
            norm="layernorm",
            norm_position="post",
            positions="sinusoidal",
            activation=ours_of(_ACTIVATIONS, stated.get("activation_function", "gelu")),
            biases=True,
            tie_embeddings=True,
            dropout=stated.get("dropout", 0.1),
            initializer_range=stated.get("init_std", 0.02),
        )

    def of_layer(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        if kind is not Block:
            return
        side, number = side_of(config, block)
        for theirs, name in _PARTS.items():
            if side == "decoder" or not theirs.startswith("encoder_attn"):
                width = config.intermediate_size if theirs == "fc1" else config.hidden_size
                yield from linear(f"model.{side}.layers.{number}.{theirs}", f"{ours}.{name}", bias=config.biases, zeros=width)

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return dict.fromkeys(("lm_head.weight", *(f"model.{side}.embed_tokens.weight" for side in _SIDES)), self.embedding)
