"""T5: Raffel et al. 2019, arXiv 1910.10683, and its version 1.1 (Shazeer 2020, arXiv 2002.05202).

RMSNorm before each part, buckets of distances, no biases. Version 1.0 scales what enters its tied head; 1.1 has a head of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.config import RELATIVE_BUCKETS, RELATIVE_DISTANCE, ModelConfig, is_gated
from model.huggingface.architecture import Architecture, Counterpart, SpecialTokens, one_of, ours_of, side_of
from model.layers import FinalNorm
from model.positions import RelativePositions
from model.transformer import Block

_ACTIVATIONS = {"relu": "relu", "geglu": "gated-gelu", "swiglu": "gated-silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
_LINEAR = {"q": "query", "k": "key", "v": "value", "o": "output"}


class T5(Architecture):
    """Transformers 4 ties and scales the head where tie_word_embeddings says so. Transformers 5 takes from it whether to scale, and
    ties whatever it says, unless the files hold a head that differs from the embedding: with a warning it leaves that as it is.
    """

    label = "T5"
    classes = ("T5ForConditionalGeneration",)
    allowed = {"positions": ("relative",), "norm": ("rmsnorm",), "activation": tuple(_ACTIVATIONS), "biases": (False,)}
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    supported = {"relative_attention_num_buckets": RELATIVE_BUCKETS, "relative_attention_max_distance": RELATIVE_DISTANCE}
    # Old files hold a table for attention to the source, which nothing reads.
    constants = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    embedding = "shared.weight"

    def auto_class(self, config: ModelConfig) -> str:
        return "AutoModelForSeq2SeqLM"

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        yield from super().refusals(config)
        if config.num_key_value_heads != config.num_attention_heads:
            yield (
                f"model.num_key_value_heads {config.num_key_value_heads} has no counterpart in T5; "
                f"it must be num_attention_heads {config.num_attention_heads}."
            )

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
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

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        yield from super().unknown_features(stated)
        yield from one_of(stated, "feed_forward_proj", "relu", _ACTIVATIONS)

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        """Transformers 5 writes tie_word_embeddings as true whatever the files hold, and what it was in scale_decoder_outputs."""
        return ModelConfig(
            architecture="encoder_decoder",
            vocab_size=stated["vocab_size"],
            sequence_length=stated.get("n_positions", 512),
            hidden_size=stated["d_model"],
            num_layers=stated["num_layers"],
            num_decoder_layers=stated.get("num_decoder_layers"),
            num_attention_heads=stated["num_heads"],
            head_size=stated["d_kv"],
            intermediate_size=stated["d_ff"],
            norm="rmsnorm",
            norm_epsilon=stated.get("layer_norm_epsilon", 1e-6),
            positions="relative",
            activation=ours_of(_ACTIVATIONS, stated.get("feed_forward_proj", "relu")),
            biases=False,
            tie_embeddings=stated.get("scale_decoder_outputs", stated.get("tie_word_embeddings", True)),
            dropout=stated.get("dropout_rate", 0.1),
            initializer_range=stated.get("initializer_range", 0.02),
        )

    def of_layer(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        side, number = side_of(config, block)
        if kind is RelativePositions:
            yield Counterpart(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{ours}.weight",))
        elif kind is Block:
            yield from _block(config, ours, f"{side}.block.{number}", is_decoder=side == "decoder")
        elif kind is FinalNorm:
            side, _ = side_of(config, block - 1)
            yield Counterpart(f"{side}.final_layer_norm.weight", (f"{ours}.norm.weight",))

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return super().copies(config) | dict.fromkeys((f"{side}.embed_tokens.weight" for side in ("encoder", "decoder")), self.embedding)


def _block(config: ModelConfig, ours: str, theirs: str, is_decoder: bool) -> Iterator[Counterpart]:
    attention = {f"SelfAttention.{name}": f"attention.{word}" for name, word in _LINEAR.items()} | {"layer_norm": "attention_norm"}
    cross = {f"EncDecAttention.{name}": f"cross_attention.{word}" for name, word in _LINEAR.items()} | {
        "layer_norm": "cross_attention_norm"
    }
    up = {"wi_0": "gate", "wi_1": "up"} if is_gated(config) else {"wi": "up"}
    inner = {f"DenseReluDense.{name}": f"feed_forward.{word}" for name, word in (up | {"wo": "down"}).items()}
    parts = [attention, *([cross] if is_decoder else []), inner | {"layer_norm": "feed_forward_norm"}]
    for number, part in enumerate(parts):
        for name, word in part.items():
            yield Counterpart(f"{theirs}.layer.{number}.{name}.weight", (f"{ours}.{word}.weight",))
