"""Llama: Touvron et al. 2023, arXiv 2302.13971. RMSNorm before each part, rotary positions, SwiGLU."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.config import ModelConfig
from model.huggingface.architecture import Architecture, Counterpart, SpecialTokens, linear
from model.layers import FinalNorm
from model.transformer import Block

_LINEAR = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
# Of the keys beside rope_theta, what our scalings hold fixed, as their papers and Llama 3.1 do.
_ROPE_CONSTANTS = {
    "linear": {},
    "yarn": {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


class Llama(Architecture):
    label = "Llama"
    classes = ("LlamaForCausalLM",)
    allowed = {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "activation": ("swiglu",),
        "rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    }
    needed = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    supported: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0}
    constants = (".rotary_emb.inv_freq",)
    embedding = "model.embed_tokens.weight"
    norms = _NORMS
    """Their names of a block's norms, and ours."""

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        yield from super().refusals(config)
        if config.hidden_size % config.num_attention_heads:
            yield (
                f"model.hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                f"{config.num_attention_heads}, as it must be in Llama; in Qwen3 (qk_norm) it need not."
            )

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        return _shape(config) | {"mlp_bias": config.biases}

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        yield from super().unknown_features(stated)
        has_biases = stated.get("attention_bias", False)
        if (stated.get("mlp_bias", False)) != has_biases:
            yield (
                f"mlp_bias is {json.dumps(stated.get('mlp_bias', False))}; "
                f"only {json.dumps(has_biases)} is supported beside that attention_bias."
            )
        if set(stated.get("layer_types") or ()) - {"full_attention"}:
            yield f"layer_types {sorted(set(stated['layer_types']))} are not supported, only full_attention."
        yield from _unknown_rope(stated)

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig(**_read_shape(stated), head_size=stated.get("head_dim"), biases=stated.get("attention_bias", False))

    def of_layer(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        if kind is Block:
            for theirs, name in (self.norms | _LINEAR).items():
                yield from linear(f"model.layers.{block}.{theirs}", f"{ours}.{name}", bias=config.biases and theirs in _LINEAR)
        elif kind is FinalNorm:
            yield Counterpart("model.norm.weight", (f"{ours}.norm.weight",))


class Qwen3(Llama):
    """Yang et al. 2025, arXiv 2505.09388: Llama with a norm over queries and keys, and heads of any width."""

    label = "Qwen3"
    classes = ("Qwen3ForCausalLM",)
    allowed = Llama.allowed | {"qk_norm": (True,), "biases": (False,), "sliding_window": None}
    supported = Llama.supported | {"attention_bias": False}
    norms = _NORMS | {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        yield from Architecture.refusals(self, config)

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        window = config.sliding_window
        kind = "full_attention" if window is None else "sliding_attention"
        return _shape(config) | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window else config.num_layers,
            "layer_types": [kind] * config.num_layers,
        }

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        yield from Architecture.unknown_features(self, stated)
        if len(set(_kinds_of_layers(stated))) > 1:
            yield "layers with and without a sliding window beside one another are not supported."
        elif strange := set(_kinds_of_layers(stated)) - {"full_attention", "sliding_attention"}:
            yield f"layer_types {sorted(strange)} are not supported."
        yield from _unknown_rope(stated)

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        slides = stated.get("use_sliding_window", False) and _kinds_of_layers(stated)[0] == "sliding_attention"
        return ModelConfig(
            **_read_shape(stated),
            head_size=stated.get("head_dim") or 128,
            qk_norm=True,
            sliding_window=stated.get("sliding_window", 4096) if slides else None,
        )


def _shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.sequence_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "attention_dropout": 0.0,
        "attention_bias": config.biases,
    } | _rope(config)


def _read_shape(stated: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope_stated(stated)
    kind = _kind_of_rope(rope)
    scaling = {}
    if kind != "default":
        scaling = {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind in ("yarn", "llama3"):
        scaling["rope_original_length"] = rope.get("original_max_position_embeddings", stated["max_position_embeddings"])
    return scaling | {
        "vocab_size": stated["vocab_size"],
        "sequence_length": stated["max_position_embeddings"],
        "hidden_size": stated["hidden_size"],
        "num_layers": stated["num_hidden_layers"],
        "num_attention_heads": stated["num_attention_heads"],
        "num_key_value_heads": stated.get("num_key_value_heads"),
        "intermediate_size": stated["intermediate_size"],
        "norm": "rmsnorm",
        "norm_epsilon": stated.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_theta": rope.get("rope_theta", stated.get("rope_theta", 10000.0)),
        "activation": "swiglu",
        "tie_embeddings": stated.get("tie_word_embeddings", False),
        "initializer_range": stated.get("initializer_range", 0.02),
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions as transformers 4 reads them (rope_theta, rope_scaling) and as 5 does (rope_parameters)."""
    theta, scaling = config.rope_theta, {}
    if config.rope_scaling == "ntk":  # by a larger base: to them it is one that was always so large
        theta *= config.rope_factor ** (config.head_size / (config.head_size - 2))
    elif config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        if config.rope_original_length is not None and config.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = config.rope_original_length
        scaling |= {key: value for key, value in _ROPE_CONSTANTS[config.rope_scaling].items() if key.endswith("_freq_factor")}
    stated: dict[str, Any] = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}
    return stated | ({"rope_scaling": scaling} if scaling else {})


def _rope_stated(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    return stated.get("rope_parameters") or stated.get("rope_scaling") or {}


def _kind_of_rope(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _unknown_rope(stated: Mapping[str, Any]) -> Iterator[str]:
    rope = _rope_stated(stated)
    kind = _kind_of_rope(rope)
    if rope.get("partial_rotary_factor", stated.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor is not supported."
    if kind == "default":
        return
    if kind not in _ROPE_CONSTANTS:
        yield f'rope scaling "{kind}" is not supported, only {", ".join(_ROPE_CONSTANTS)}.'
        return
    if not rope.get("factor"):
        yield f'rope scaling "{kind}" lacks its factor.'
    for key, value in _ROPE_CONSTANTS[kind].items():
        if (given := rope.get(key)) is not None and given != value:
            only = "the default" if value is None else json.dumps(value)
            yield f'{key} of rope scaling "{kind}" is {json.dumps(given)}; only {only} is supported.'


def _kinds_of_layers(stated: Mapping[str, Any]) -> list[str]:
    """Layer by layer, as Qwen3's class works them out where they are not stated."""
    num_layers = stated.get("num_hidden_layers") or 1
    if stated.get("layer_types"):
        return stated["layer_types"]
    slides = stated.get("use_sliding_window", False) and stated.get("sliding_window", 4096) is not None
    first = stated.get("max_window_layers", 28)
    return ["sliding_attention" if slides and layer >= first else "full_attention" for layer in range(num_layers)]
