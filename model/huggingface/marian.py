"""Marian: Junczys-Dowmunt et al. 2018, arXiv 1804.00344. The original Transformer of Vaswani et al. 2017, arXiv 1706.03762."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.config import ModelConfig
from model.huggingface.architecture import (
    Architecture,
    Counterpart,
    SpecialTokens,
    check_equal,
    check_heads,
    check_one_of,
    linear,
    our_value,
    stack_and_index,
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
_STACKS = ("encoder", "decoder")


class Marian(Architecture):
    """Marian, the encoder-decoder for translation."""

    label = "Marian"
    classes = ("MarianMTModel",)
    allowed = {
        "positions": ("sinusoidal",),
        "norm": ("layernorm",),
        "norm_position": ("post",),
        "norm_epsilon": (1e-5,),  # fixed in transformers' class
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
        "is_causal": True,
        "is_encoder_decoder": True,
        "is_decoder": False,
    }
    other_names = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads", "num_hidden_layers": "encoder_layers"}
    not_null = ("scale_embedding", "activation_dropout", "init_std", "dropout", "attention_dropout", "decoder_attention_heads")
    headless = ("MarianModel",)
    prefix = "model."
    constants = (".embed_positions.weight",)
    zeros = ("final_logits_bias",)
    embedding = "model.shared.weight"

    def auto_class(self, config: ModelConfig) -> str:
        """Return the Auto class of transformers that loads Marian."""
        return "AutoModelForSeq2SeqLM"

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that Marian cannot express."""
        yield from super().unsupported_options(config)
        yield from check_heads(config, self.label)

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return Marian's keys of config.json."""
        by_stack = {"attention_heads": config.num_attention_heads, "ffn_dim": config.intermediate_size}
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
        } | {f"{stack}_{key}": value for stack in _STACKS for key, value in by_stack.items()}

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in Marian's config.json that our network does not have."""
        yield from super().unsupported_features(config_json)
        yield from check_one_of(config_json, "activation_function", "gelu", _ACTIVATIONS)
        if not config_json.get("scale_embedding", False):
            yield "scale_embedding is false; only true is supported."
        if config_json.get("activation_dropout", 0.0):
            yield f"activation_dropout is {config_json['activation_dropout']}; only 0.0 is supported."
        yield from check_equal(config_json, {"dropout": 0.1, "attention_dropout": 0.0}, "dropout")
        yield from check_equal(config_json, {"encoder_attention_heads": 16, "decoder_attention_heads": 16}, "number of heads")
        yield from check_equal(config_json, {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}, "width of the feed-forward")
        if config_json.get("decoder_vocab_size") not in (None, config_json.get("vocab_size")):
            vocab_size = config_json.get("vocab_size")
            yield f"decoder_vocab_size is {config_json['decoder_vocab_size']}; only vocab_size {vocab_size} is supported."

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of Marian's config.json."""
        return ModelConfig(
            architecture="encoder_decoder",
            vocab_size=config_json["vocab_size"],
            sequence_length=config_json["max_position_embeddings"],
            hidden_size=config_json["d_model"],
            num_layers=config_json["encoder_layers"],
            num_decoder_layers=config_json["decoder_layers"],
            num_attention_heads=config_json["encoder_attention_heads"],
            intermediate_size=config_json["encoder_ffn_dim"],
            norm="layernorm",
            norm_position="post",
            positions="sinusoidal",
            activation=our_value(_ACTIVATIONS, config_json.get("activation_function", "gelu")),
            biases=True,
            tie_embeddings=True,
            dropout=config_json.get("dropout", 0.1),
            initializer_range=config_json.get("init_std", 0.02),
        )

    def layer_counterparts(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Yield Marian's tensors of one layer."""
        if kind is not Block:
            return
        stack, number = stack_and_index(config, block)
        for theirs, name in _PARTS.items():
            if stack == "decoder" or not theirs.startswith("encoder_attn"):
                width = config.intermediate_size if theirs == "fc1" else config.hidden_size
                yield from linear(f"model.{stack}.layers.{number}.{theirs}", f"{ours}.{name}", bias=config.biases, zeros=width)

    def duplicates(self, config: ModelConfig) -> dict[str, str]:
        """Return the tensors that Marian's files may hold in addition, each with the tensor that it must equal."""
        return dict.fromkeys(("lm_head.weight", *(f"model.{stack}.embed_tokens.weight" for stack in _STACKS)), self.embedding)
