"""GPT-2: Radford et al. 2019. LayerNorm before each part, learned positions, biases, linear weights [in, out]."""

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
)
from model.layers import FinalNorm
from model.positions import LearnedPositions
from model.transformer import Block

_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
_DROPOUTS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)


class GPT2(Architecture):
    """GPT-2 with its language modelling head."""

    label = "GPT-2"
    classes = ("GPT2LMHeadModel",)
    allowed = {"positions": ("learned",), "norm": ("layernorm",), "activation": tuple(_ACTIVATIONS)}
    needed = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    supported = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "is_causal": True,
        "sliding_window": None,
    }
    other_names = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    not_null = ("tie_word_embeddings", "layer_norm_epsilon", "initializer_range", *_DROPOUTS)
    headless = ("GPT2Model",)
    prefix = "transformer."
    constants = (".attn.bias", ".attn.masked_bias")
    embedding = "transformer.wte.weight"

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that GPT-2 cannot express."""
        yield from super().unsupported_options(config)
        yield from check_heads(config, self.label)

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return GPT-2's keys of config.json."""
        return {
            "n_positions": config.sequence_length,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "activation_function": _ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_epsilon,
        } | dict.fromkeys(_DROPOUTS, config.dropout)

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in GPT-2's config.json that our network does not have."""
        yield from super().unsupported_features(config_json)
        yield from check_one_of(config_json, "activation_function", "gelu_new", _ACTIVATIONS)
        yield from check_equal(config_json, _DROPOUTS, "dropout")

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of GPT-2's config.json."""
        return ModelConfig(
            vocab_size=config_json["vocab_size"],
            sequence_length=config_json["n_positions"],
            hidden_size=config_json["n_embd"],
            num_layers=config_json["n_layer"],
            num_attention_heads=config_json["n_head"],
            intermediate_size=config_json.get("n_inner"),
            norm="layernorm",
            norm_epsilon=config_json.get("layer_norm_epsilon", 1e-5),
            positions="learned",
            activation=our_value(_ACTIVATIONS, config_json.get("activation_function", "gelu_new")),
            biases=True,
            tie_embeddings=config_json.get("tie_word_embeddings", True),
            dropout=config_json.get("resid_pdrop", 0.1),
            initializer_range=config_json.get("initializer_range", 0.02),
        )

    def layer_counterparts(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Yield GPT-2's tensors of one layer."""
        if kind is LearnedPositions:
            yield Counterpart("transformer.wpe.weight", (f"{ours}.weight",))
        elif kind is Block:
            yield from _block(config, ours, f"transformer.h.{block}")
        elif kind is FinalNorm:
            yield from linear("transformer.ln_f", f"{ours}.norm", bias=config.biases, zeros=config.hidden_size)

    def current_name(self, name: str) -> str:
        """Return the name with the outer module's prefix, which the first checkpoints lack."""
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _block(config: ModelConfig, ours: str, theirs: str) -> Iterator[Counterpart]:
    """Yield the tensors of a block; GPT-2 stores linear weights as [in, out]."""
    hidden, bias = config.hidden_size, config.biases
    fused = [f"{ours}.attention.{name}" for name in ("query", "key", "value")]
    yield from linear(f"{theirs}.ln_1", f"{ours}.attention_norm", bias=bias, zeros=hidden)
    yield from linear(f"{theirs}.attn.c_attn", *fused, bias=bias, zeros=3 * hidden, transposed=True)
    yield from linear(f"{theirs}.attn.c_proj", f"{ours}.attention.output", bias=bias, zeros=hidden, transposed=True)
    yield from linear(f"{theirs}.ln_2", f"{ours}.feed_forward_norm", bias=bias, zeros=hidden)
    yield from linear(f"{theirs}.mlp.c_fc", f"{ours}.feed_forward.up", bias=bias, zeros=config.intermediate_size, transposed=True)
    yield from linear(f"{theirs}.mlp.c_proj", f"{ours}.feed_forward.down", bias=bias, zeros=hidden, transposed=True)
