"""GPT-2: Radford et al. 2019. LayerNorm before each part, learned positions, biases, linear weights [in, out]."""

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
    whole_heads,
)
from model.layers import FinalNorm
from model.positions import LearnedPositions
from model.transformer import Block

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
_DROPOUTS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)


class GPT2(Architecture):
    label = "GPT-2"
    classes = ("GPT2LMHeadModel",)
    allowed = {"positions": ("learned",), "norm": ("layernorm",), "activation": tuple(_ACTIVATIONS)}
    needed = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    supported = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    constants = (".attn.bias", ".attn.masked_bias")
    embedding = "transformer.wte.weight"

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        yield from super().refusals(config)
        yield from whole_heads(config, self.label)

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        return {
            "n_positions": config.sequence_length,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "activation_function": _ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_epsilon,
        } | dict.fromkeys(_DROPOUTS, config.dropout)

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        yield from super().unknown_features(stated)
        yield from one_of(stated, "activation_function", "gelu_new", _ACTIVATIONS)
        yield from all_alike(stated, _DROPOUTS, "dropout")

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig(
            vocab_size=stated["vocab_size"],
            sequence_length=stated["n_positions"],
            hidden_size=stated["n_embd"],
            num_layers=stated["n_layer"],
            num_attention_heads=stated["n_head"],
            intermediate_size=stated.get("n_inner"),
            norm="layernorm",
            norm_epsilon=stated.get("layer_norm_epsilon", 1e-5),
            positions="learned",
            activation=ours_of(_ACTIVATIONS, stated.get("activation_function", "gelu_new")),
            biases=True,
            tie_embeddings=stated.get("tie_word_embeddings", True),
            dropout=stated.get("resid_pdrop", 0.1),
            initializer_range=stated.get("initializer_range", 0.02),
        )

    def of_layer(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        if kind is LearnedPositions:
            yield Counterpart("transformer.wpe.weight", (f"{ours}.weight",))
        elif kind is Block:
            yield from _block(config, ours, f"transformer.h.{block}")
        elif kind is FinalNorm:
            yield from linear("transformer.ln_f", f"{ours}.norm", bias=config.biases, zeros=config.hidden_size)

    def current_name(self, name: str) -> str:
        """The first checkpoints were saved without the outer module's name."""
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _block(config: ModelConfig, ours: str, theirs: str) -> Iterator[Counterpart]:
    """GPT-2 keeps linear weights [in, out]."""
    hidden, bias = config.hidden_size, config.biases
    fused = [f"{ours}.attention.{name}" for name in ("query", "key", "value")]
    yield from linear(f"{theirs}.ln_1", f"{ours}.attention_norm", bias=bias, zeros=hidden)
    yield from linear(f"{theirs}.attn.c_attn", *fused, bias=bias, zeros=3 * hidden, transposed=True)
    yield from linear(f"{theirs}.attn.c_proj", f"{ours}.attention.output", bias=bias, zeros=hidden, transposed=True)
    yield from linear(f"{theirs}.ln_2", f"{ours}.feed_forward_norm", bias=bias, zeros=hidden)
    yield from linear(f"{theirs}.mlp.c_fc", f"{ours}.feed_forward.up", bias=bias, zeros=config.intermediate_size, transposed=True)
    yield from linear(f"{theirs}.mlp.c_proj", f"{ours}.feed_forward.down", bias=bias, zeros=hidden, transposed=True)
