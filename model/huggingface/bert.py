"""BERT: Devlin et al. 2018, arXiv 1810.04805. Bidirectional, LayerNorm behind each part, learned positions, two token types."""

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
from model.layers import Classifier, EmbeddingNorm, HeadBias, TokenTransform, TokenTypes
from model.positions import LearnedPositions
from model.transformer import Block

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_DROPOUTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_TOKEN_HEAD, _BOTH_HEADS, _CLASSES = "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"
_TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_PARTS = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}


class Bert(Architecture):
    """Masked tokens alone, with next-sentence prediction beside them, or the classes of a text alone: three classes of theirs."""

    label = "BERT"
    classes = (_TOKEN_HEAD, _BOTH_HEADS, _CLASSES)
    allowed = {
        "positions": ("learned",),
        "norm": ("layernorm",),
        "norm_position": ("post",),
        "activation": tuple(_ACTIVATIONS),
    }
    needed = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    supported = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute", "tie_word_embeddings": True}
    constants = (".position_ids",)
    embedding = "bert.embeddings.word_embeddings.weight"

    def class_of(self, config: ModelConfig) -> str:
        if not config.token_head:
            return _CLASSES
        return _BOTH_HEADS if config.num_classes else _TOKEN_HEAD

    def auto_class(self, config: ModelConfig) -> str:
        return {
            _TOKEN_HEAD: "AutoModelForMaskedLM",
            _BOTH_HEADS: "AutoModelForPreTraining",
            _CLASSES: "AutoModelForSequenceClassification",
        }[self.class_of(config)]

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        yield from super().refusals(config)
        yield from whole_heads(config, self.label)
        if config.token_head and not config.tie_embeddings:
            yield "model.tie_embeddings false has no counterpart in BERT; it must be true."
        if config.token_head and config.num_classes not in (0, 2):
            yield (
                f"model.num_classes {config.num_classes} has no counterpart in BERT beside model.token_head; "
                "it must be 0, 2 (next-sentence prediction), or stand alone."
            )

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        stated = {
            "max_position_embeddings": config.sequence_length,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "type_vocab_size": _their_token_types(config),
            "hidden_act": _ACTIVATIONS[config.activation],
            "layer_norm_eps": config.norm_epsilon,
            "classifier_dropout": None,
            "tie_word_embeddings": True,  # of a classifier, which has no head to tie, too
        } | dict.fromkeys(_DROPOUTS, config.dropout)
        if self.class_of(config) == _CLASSES:
            labels = tokens.labels or tuple(f"LABEL_{number}" for number in range(config.num_classes))
            if len(labels) != config.num_classes:
                raise ValueError(f"There are {len(labels)} labels for model.num_classes {config.num_classes}.")
            stated |= {
                "id2label": {str(number): label for number, label in enumerate(labels)},
                "label2id": {label: number for number, label in enumerate(labels)},
            }
        return stated

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        yield from super().unknown_features(stated)
        yield from one_of(stated, "hidden_act", "gelu", _ACTIVATIONS)
        of_classifier = {} if stated.get("classifier_dropout") is None else {"classifier_dropout": None}
        yield from all_alike(stated, _DROPOUTS | of_classifier, "dropout")
        if (problem := stated.get("problem_type")) not in (None, "single_label_classification"):
            yield f'problem_type is "{problem}"; only one class a text is supported.'

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        named = (stated.get("architectures") or [_TOKEN_HEAD])[0]
        return ModelConfig(
            architecture="encoder",
            vocab_size=stated["vocab_size"],
            sequence_length=stated["max_position_embeddings"],
            hidden_size=stated["hidden_size"],
            num_layers=stated["num_hidden_layers"],
            num_attention_heads=stated["num_attention_heads"],
            intermediate_size=stated["intermediate_size"],
            norm="layernorm",
            norm_position="post",
            norm_epsilon=stated.get("layer_norm_eps", 1e-12),
            positions="learned",
            activation=ours_of(_ACTIVATIONS, stated.get("hidden_act", "gelu")),
            biases=True,
            tie_embeddings=True,
            token_types=stated.get("type_vocab_size", 2),
            num_classes={_TOKEN_HEAD: 0, _BOTH_HEADS: 2, _CLASSES: len(stated.get("id2label") or (0, 1))}[named],
            token_head=named != _CLASSES,
            dropout=stated.get("hidden_dropout_prob", 0.1),
            initializer_range=stated.get("initializer_range", 0.02),
        )

    def counterparts(self, config: ModelConfig) -> Iterator[Counterpart]:
        if not config.token_types:
            yield Counterpart(_TOKEN_TYPES, (), zeros=(_their_token_types(config), config.hidden_size))
        yield from super().counterparts(config)

    def of_layer(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        biases = {"bias": config.biases, "zeros": config.hidden_size}
        if kind is TokenTypes:
            yield Counterpart(_TOKEN_TYPES, (f"{ours}.weight",))
        elif kind is LearnedPositions:
            yield Counterpart("bert.embeddings.position_embeddings.weight", (f"{ours}.weight",))
        elif kind is EmbeddingNorm:
            yield from linear("bert.embeddings.LayerNorm", f"{ours}.norm", **biases)
        elif kind is Block:
            for theirs, name in _PARTS.items():
                inner = {"zeros": config.intermediate_size} if theirs == "intermediate.dense" else {}
                yield from linear(f"bert.encoder.layer.{block}.{theirs}", f"{ours}.{name}", **biases | inner)
        elif kind is Classifier:
            yield from linear("bert.pooler.dense", f"{ours}.pooler", bias=True)
            yield from linear("cls.seq_relationship" if config.token_head else "classifier", f"{ours}.classes", bias=True)
        elif kind is TokenTransform:
            yield from linear("cls.predictions.transform.dense", f"{ours}.dense", **biases)
            yield from linear("cls.predictions.transform.LayerNorm", f"{ours}.norm", **biases)
        elif kind is HeadBias:
            yield Counterpart("cls.predictions.bias", (f"{ours}.weight",))

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return {"cls.predictions.decoder.weight": self.embedding, "cls.predictions.decoder.bias": "cls.predictions.bias"}

    def current_name(self, name: str) -> str:
        """Google's own checkpoints were converted with TensorFlow's names of a norm's weights."""
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    def seen_with(self, stated: Mapping[str, Any], tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Google's own checkpoints call themselves BertForMaskedLM and hold next-sentence prediction too."""
        has_both = stated.get("architectures") == [_TOKEN_HEAD] and "cls.seq_relationship.weight" in tensors
        return {**stated, "architectures": [_BOTH_HEADS]} if has_both else stated


def _their_token_types(config: ModelConfig) -> int:
    """BERT always has token types; a network without gets a table of zeros for the two that tokenizers give."""
    return config.token_types or 2
