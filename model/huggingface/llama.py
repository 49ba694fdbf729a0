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
_THETA = 10000.0  # if config.json does not name it
# Keys whose values are fixed in our scalings, as in their papers and in Llama 3.1.
_ROPE_CONSTANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "yarn": {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


class Llama(Architecture):
    """Llama with its language modelling head."""

    label = "Llama"
    classes = ("LlamaForCausalLM",)
    allowed = {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "activation": ("swiglu",),
        "rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
    }
    needed = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    supported: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0, "is_causal": True, "sliding_window": None}
    not_null: tuple[str, ...] = ("tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "initializer_range")
    headless = ("LlamaModel",)
    prefix = "model."
    constants = (".rotary_emb.inv_freq",)
    embedding = "model.embed_tokens.weight"
    norms = _NORMS
    """Hugging Face name of each norm of a block -> our name."""

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that Llama cannot express."""
        yield from super().unsupported_options(config)
        if config.hidden_size % config.num_attention_heads:
            yield (
                f"model.hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}, which Llama requires. Qwen3 (model.qk_norm true) does not require it."
            )

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return Llama's keys of config.json."""
        return _shape(config) | {"mlp_bias": config.biases}

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in Llama's config.json that our network does not have."""
        yield from super().unsupported_features(config_json)
        has_biases, mlp_biases = (config_json.get(name, False) for name in ("attention_bias", "mlp_bias"))
        if mlp_biases != has_biases and None not in (has_biases, mlp_biases):  # null is named by `not_null`
            yield (
                f"mlp_bias is {json.dumps(mlp_biases)}; only {json.dumps(has_biases)} is supported with attention_bias "
                f"{json.dumps(has_biases)}."
            )
        if set(config_json.get("layer_types") or ()) - {"full_attention"}:
            yield f"layer_types {sorted(set(config_json['layer_types']))} are not supported, only full_attention."
        yield from _unsupported_rope(config_json)

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of Llama's config.json."""
        return ModelConfig(
            **_read_shape(config_json), head_size=config_json.get("head_dim"), biases=config_json.get("attention_bias", False)
        )

    def layer_counterparts(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Yield Llama's tensors of one layer."""
        if kind is Block:
            for theirs, name in (self.norms | _LINEAR).items():
                yield from linear(f"model.layers.{block}.{theirs}", f"{ours}.{name}", bias=config.biases and theirs in _LINEAR)
        elif kind is FinalNorm:
            yield Counterpart("model.norm.weight", (f"{ours}.norm.weight",))


class Qwen3(Llama):
    """Llama with a norm for queries and keys, and heads of any width: Yang et al. 2025, arXiv 2505.09388."""

    label = "Qwen3"
    classes = ("Qwen3ForCausalLM",)
    headless = ("Qwen3Model",)
    allowed = Llama.allowed | {"qk_norm": (True,), "biases": (False,), "sliding_window": None}
    supported = {key: value for key, value in Llama.supported.items() if key != "sliding_window"} | {"attention_bias": False}
    not_null = ("tie_word_embeddings", "rms_norm_eps", "initializer_range", "head_dim", "use_sliding_window", "max_window_layers")
    norms = _NORMS | {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that Qwen3 cannot express."""
        yield from Architecture.unsupported_options(self, config)

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return Qwen3's keys of config.json."""
        window = config.sliding_window
        kind = "full_attention" if window is None else "sliding_attention"
        return _shape(config) | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window else config.num_layers,
            "layer_types": [kind] * config.num_layers,
        }

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in Qwen3's config.json that our network does not have."""
        yield from Architecture.unsupported_features(self, config_json)
        if len(set(_layer_types(config_json))) > 1:
            yield "A mixture of layers with and without a sliding window is not supported."
        elif unknown := set(_layer_types(config_json)) - {"full_attention", "sliding_attention"}:
            yield f"layer_types {sorted(unknown)} are not supported."
        yield from _unsupported_rope(config_json)

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of Qwen3's config.json."""
        has_window = config_json.get("use_sliding_window", False) and _layer_types(config_json)[0] == "sliding_attention"
        heads = config_json.get("num_key_value_heads", 32)
        return ModelConfig(
            **_read_shape(config_json) | {"num_key_value_heads": heads},
            head_size=config_json.get("head_dim", 128),
            qk_norm=True,
            sliding_window=config_json.get("sliding_window", 4096) if has_window else None,
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


def _read_shape(config_json: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope_settings(config_json)
    kind = _rope_kind(rope)
    scaling = {}
    if kind != "default":
        scaling = {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind in ("yarn", "llama3"):
        given = rope.get("original_max_position_embeddings", config_json["max_position_embeddings"])
        scaling["rope_original_length"] = config_json.get("original_max_position_embeddings", given)
    return scaling | {
        "vocab_size": config_json["vocab_size"],
        "sequence_length": config_json["max_position_embeddings"],
        "hidden_size": config_json["hidden_size"],
        "num_layers": config_json["num_hidden_layers"],
        "num_attention_heads": config_json["num_attention_heads"],
        "num_key_value_heads": config_json.get("num_key_value_heads"),
        "intermediate_size": config_json["intermediate_size"],
        "norm": "rmsnorm",
        "norm_epsilon": config_json.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_theta": _rope_theta(config_json),
        "activation": "swiglu",
        "tie_embeddings": config_json.get("tie_word_embeddings", False),
        "initializer_range": config_json.get("initializer_range", 0.02),
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of rotary positions for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    theta, scaling = config.rope_theta, dict[str, Any]()
    if config.rope_scaling == "ntk":  # transformers gets a larger base instead
        theta *= config.rope_factor ** (config.head_size / (config.head_size - 2))
    elif config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        if config.rope_original_length is not None and config.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = config.rope_original_length
        scaling |= {key: value for key, value in _ROPE_CONSTANTS[config.rope_scaling].items() if key.endswith("_freq_factor")}
    config_json: dict[str, Any] = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}
    return config_json | ({"rope_scaling": scaling} if scaling else {})


def _rope_settings(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of rotary positions that transformers uses: rope_scaling, and rope_parameters only without it."""
    return config_json.get("rope_scaling") or config_json.get("rope_parameters") or {}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_theta(config_json: Mapping[str, Any]) -> float:
    return _rope_settings(config_json).get("rope_theta", config_json.get("rope_theta", _THETA))


def _unsupported_rope(config_json: Mapping[str, Any]) -> Iterator[str]:
    rope = _rope_settings(config_json)
    kind = _rope_kind(rope)
    if layers := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        yield f"rope_parameters that differ by kind of layer ({', '.join(layers)}) are not supported."
        return
    if not isinstance(theta := _rope_theta(config_json), int | float):
        yield f"rope_theta is {json.dumps(theta)}; it must be a number."
        return
    unread = (config_json.get("rope_parameters") or {}).get("rope_theta", theta)
    if "rope_theta" not in rope and unread != theta:
        yield (
            f"rope_scaling and rope_parameters are both given. transformers reads only rope_scaling, so rope_theta would be {theta:g} and "
            f"not {unread:g}. Write all of them into rope_parameters, and remove rope_scaling."
        )
    if rope.get("partial_rotary_factor", config_json.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor is not supported."
    if kind == "default":
        return
    if kind not in _ROPE_CONSTANTS:
        yield f'rope scaling "{kind}" is not supported, only {", ".join(_ROPE_CONSTANTS)}.'
        return
    if not rope.get("factor"):
        yield f'rope scaling "{kind}" has no "factor".'
    if rope.get("truncate", True) is None:
        yield f'truncate of rope scaling "{kind}" is null; only true is supported.'
    for key, value in _ROPE_CONSTANTS[kind].items():
        if (given := rope.get(key)) is not None and given != value:
            only = "the default" if value is None else json.dumps(value)
            yield f'{key} of rope scaling "{kind}" is {json.dumps(given)}; only {only} is supported.'


def _layer_types(config_json: Mapping[str, Any]) -> list[str]:
    """Return the type of each layer; if config.json does not list them, they are derived as in transformers' Qwen3."""
    num_layers = config_json.get("num_hidden_layers") or 1
    if config_json.get("layer_types"):
        return config_json["layer_types"]
    has_window = config_json.get("use_sliding_window", False) and config_json.get("sliding_window", 4096) is not None
    first = config_json.get("max_window_layers", 28)
    return ["sliding_attention" if has_window and layer >= first else "full_attention" for layer in range(num_layers)]
