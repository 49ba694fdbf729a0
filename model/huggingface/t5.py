"""T5: Raffel et al. 2019, arXiv 1910.10683, and its version 1.1 (Shazeer 2020, arXiv 2002.05202).

RMSNorm before each part, relative positions, no biases. Version 1.0 has a tied head and scales its input; 1.1 has an untied head.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.config import RELATIVE_BUCKETS, RELATIVE_DISTANCE, ModelConfig, is_gated
from model.huggingface.architecture import Architecture, Counterpart, SpecialTokens, check_one_of, our_value, stack_and_index
from model.layers import FinalNorm
from model.positions import RelativePositions
from model.transformer import Block

_ACTIVATIONS = {"relu": "relu", "geglu": "gated-gelu", "swiglu": "gated-silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
_LINEAR = {"q": "query", "k": "key", "v": "value", "o": "output"}


class T5(Architecture):
    """T5, the encoder-decoder for any task that maps text to text.

    With tie_word_embeddings true, transformers 4 ties the head and scales its input. Transformers 5 uses the key only for the scaling
    and always ties the head, except if the files hold a head that differs from the embedding; then it keeps both and prints a warning.
    """

    label = "T5"
    classes = ("T5ForConditionalGeneration",)
    allowed = {"positions": ("relative",), "norm": ("rmsnorm",), "activation": tuple(_ACTIVATIONS), "biases": (False,)}
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    supported = {
        "relative_attention_num_buckets": RELATIVE_BUCKETS,
        "relative_attention_max_distance": RELATIVE_DISTANCE,
        "is_causal": True,
        "is_encoder_decoder": True,
        "is_decoder": False,
    }
    other_names = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv"}
    not_null = ("layer_norm_epsilon", "dropout_rate", "initializer_range")
    headless = ("T5Model", "T5EncoderModel")
    prefix = ""
    # A table for cross-attention, which old files hold and no code reads.
    constants = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    embedding = "shared.weight"

    def auto_class(self, config: ModelConfig) -> str:
        """Return the Auto class of transformers that loads T5."""
        return "AutoModelForSeq2SeqLM"

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that T5 cannot express."""
        yield from super().unsupported_options(config)
        if config.num_key_value_heads != config.num_attention_heads:
            yield (
                f"model.num_key_value_heads {config.num_key_value_heads} has no counterpart in T5; "
                f"it must be num_attention_heads {config.num_attention_heads}."
            )

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return T5's keys of config.json."""
        return {
            "n_positions": config.sequence_length,
            "d_model": config.hidden_size,
            "d_kv": config.head_size,
            "d_ff": config.intermediate_size,
            "num_layers": config.num_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "num_heads": config.num_attention_heads,
            "relative_attention_num_buckets": RELATIVE_BUCKETS,
            "relative_attention_max_distance": RELATIVE_DISTANCE,
            "feed_forward_proj": _ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_epsilon,
            "dropout_rate": config.dropout,
            "is_encoder_decoder": True,
            "decoder_start_token_id": tokens.start,
        }

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in T5's config.json that our network does not have."""
        yield from super().unsupported_features(config_json)
        yield from check_one_of(config_json, "feed_forward_proj", "relu", _ACTIVATIONS)
        # Older files also hold what follows from feed_forward_proj, and transformers reads that instead.
        projection = str(config_json.get("feed_forward_proj", "relu"))
        name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
        for key, value in (("dense_act_fn", name), ("is_gated_act", projection.startswith("gated-"))):
            if config_json.get(key, value) != value:
                given, fitting = json.dumps(config_json[key]), json.dumps(value)
                yield f'{key} is {given}; only {fitting} is supported with feed_forward_proj "{projection}".'

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of T5's config.json.

        Transformers 5 always writes tie_word_embeddings as true, and its former value as scale_decoder_outputs.
        """
        return ModelConfig(
            architecture="encoder_decoder",
            vocab_size=config_json["vocab_size"],
            sequence_length=config_json.get("n_positions", 512),
            hidden_size=config_json["d_model"],
            num_layers=config_json["num_layers"],
            num_decoder_layers=config_json.get("num_decoder_layers"),
            num_attention_heads=config_json["num_heads"],
            head_size=config_json["d_kv"],
            intermediate_size=config_json["d_ff"],
            norm="rmsnorm",
            norm_epsilon=config_json.get("layer_norm_epsilon", 1e-6),
            positions="relative",
            activation=our_value(_ACTIVATIONS, config_json.get("feed_forward_proj", "relu")),
            biases=False,
            tie_embeddings=config_json.get("scale_decoder_outputs", config_json.get("tie_word_embeddings") is not False),
            dropout=config_json.get("dropout_rate", 0.1),
            initializer_range=config_json.get("initializer_range", 0.02),
        )

    def layer_counterparts(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Yield T5's tensors of one layer."""
        stack, number = stack_and_index(config, block)
        if kind is RelativePositions:
            yield Counterpart(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{ours}.weight",))
        elif kind is Block:
            yield from _block(config, ours, f"{stack}.block.{number}", is_decoder=stack == "decoder")
        elif kind is FinalNorm:
            stack, _ = stack_and_index(config, block - 1)
            yield Counterpart(f"{stack}.final_layer_norm.weight", (f"{ours}.norm.weight",))

    def duplicates(self, config: ModelConfig) -> dict[str, str]:
        """Return the tensors that T5's files may hold in addition, each with the tensor that it must equal."""
        return super().duplicates(config) | dict.fromkeys(
            (f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")), self.embedding
        )


def _block(config: ModelConfig, ours: str, theirs: str, is_decoder: bool) -> Iterator[Counterpart]:
    attention = {f"SelfAttention.{name}": f"attention.{own}" for name, own in _LINEAR.items()} | {"layer_norm": "attention_norm"}
    cross = {f"EncDecAttention.{name}": f"cross_attention.{own}" for name, own in _LINEAR.items()} | {"layer_norm": "cross_attention_norm"}
    up = {"wi_0": "gate", "wi_1": "up"} if is_gated(config) else {"wi": "up"}
    inner = {f"DenseReluDense.{name}": f"feed_forward.{own}" for name, own in (up | {"wo": "down"}).items()}
    parts = [attention, *([cross] if is_decoder else []), inner | {"layer_norm": "feed_forward_norm"}]
    for number, part in enumerate(parts):
        for name, own in part.items():
            yield Counterpart(f"{theirs}.layer.{number}.{name}.weight", (f"{ours}.{own}.weight",))
