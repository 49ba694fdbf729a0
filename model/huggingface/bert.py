"""BERT: Devlin et al. 2018, arXiv 1810.04805. Bidirectional, LayerNorm after each part, learned positions, two token types."""

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
    """BERT with a head for masked tokens, for these and next-sentence prediction, or for classes: three classes of transformers."""

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
    not_null = ("layer_norm_eps", "initializer_range", "type_vocab_size", *_DROPOUTS)
    headless = ("BertModel",)
    prefix = "bert."
    constants = (".position_ids",)
    embedding = "bert.embeddings.word_embeddings.weight"

    def transformers_class(self, config: ModelConfig) -> str:
        """Return the class of transformers for this network's heads."""
        if not config.token_head:
            return _CLASSES
        return _BOTH_HEADS if config.num_classes else _TOKEN_HEAD

    def auto_class(self, config: ModelConfig) -> str:
        """Return the Auto class of transformers that loads BERT."""
        return {
            _TOKEN_HEAD: "AutoModelForMaskedLM",
            _BOTH_HEADS: "AutoModelForPreTraining",
            _CLASSES: "AutoModelForSequenceClassification",
        }[self.transformers_class(config)]

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that BERT cannot express."""
        yield from super().unsupported_options(config)
        yield from check_heads(config, self.label)
        if config.token_head and not config.tie_embeddings:
            yield "model.tie_embeddings false has no counterpart in BERT; it must be true."
        if config.token_head and config.num_classes not in (0, 2):
            yield (
                f"model.num_classes {config.num_classes} has no counterpart in BERT together with model.token_head; "
                "use 0, 2 (next-sentence prediction), or model.token_head false."
            )

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return BERT's keys of config.json."""
        config_json = {
            "max_position_embeddings": config.sequence_length,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "type_vocab_size": _their_token_types(config),
            "hidden_act": _ACTIVATIONS[config.activation],
            "layer_norm_eps": config.norm_epsilon,
            "classifier_dropout": None,
            "tie_word_embeddings": True,  # also for a classifier, which has no head to tie
        } | dict.fromkeys(_DROPOUTS, config.dropout)
        if self.transformers_class(config) == _CLASSES:
            labels = tokens.labels or tuple(f"LABEL_{number}" for number in range(config.num_classes))
            if len(labels) != config.num_classes:
                raise ValueError(f"The number of labels is {len(labels)}; it must be model.num_classes {config.num_classes}.")
            config_json |= {
                "id2label": {str(number): label for number, label in enumerate(labels)},
                "label2id": {label: number for number, label in enumerate(labels)},
            }
        return config_json

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in BERT's config.json that our network does not have."""
        yield from super().unsupported_features(config_json)
        yield from check_one_of(config_json, "hidden_act", "gelu", _ACTIVATIONS)
        classifier = {} if config_json.get("classifier_dropout") is None else {"classifier_dropout": None}
        yield from check_equal(config_json, _DROPOUTS | classifier, "dropout")
        if (problem := config_json.get("problem_type")) not in (None, "single_label_classification"):
            yield f'problem_type is "{problem}"; only one class a text is supported.'

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of BERT's config.json."""
        class_name = (config_json.get("architectures") or [_TOKEN_HEAD])[0]
        return ModelConfig(
            architecture="encoder",
            vocab_size=config_json["vocab_size"],
            sequence_length=config_json["max_position_embeddings"],
            hidden_size=config_json["hidden_size"],
            num_layers=config_json["num_hidden_layers"],
            num_attention_heads=config_json["num_attention_heads"],
            intermediate_size=config_json["intermediate_size"],
            norm="layernorm",
            norm_position="post",
            norm_epsilon=config_json.get("layer_norm_eps", 1e-12),
            positions="learned",
            activation=our_value(_ACTIVATIONS, config_json.get("hidden_act", "gelu")),
            biases=True,
            tie_embeddings=True,
            token_types=config_json.get("type_vocab_size", 2),
            num_classes={_TOKEN_HEAD: 0, _BOTH_HEADS: 2, _CLASSES: _number_of_classes(config_json)}[class_name],
            token_head=class_name != _CLASSES,
            dropout=config_json.get("hidden_dropout_prob", 0.1),
            initializer_range=config_json.get("initializer_range", 0.02),
        )

    def counterparts(self, config: ModelConfig) -> Iterator[Counterpart]:
        """Yield all of BERT's tensors, with token types of zeros if the network has none."""
        if not config.token_types:
            yield Counterpart(_TOKEN_TYPES, (), zeros=(_their_token_types(config), config.hidden_size))
        yield from super().counterparts(config)

    def layer_counterparts(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Yield BERT's tensors of one layer."""
        bias, hidden = config.biases, config.hidden_size
        if kind is TokenTypes:
            yield Counterpart(_TOKEN_TYPES, (f"{ours}.weight",))
        elif kind is LearnedPositions:
            yield Counterpart("bert.embeddings.position_embeddings.weight", (f"{ours}.weight",))
        elif kind is EmbeddingNorm:
            yield from linear("bert.embeddings.LayerNorm", f"{ours}.norm", bias=bias, zeros=hidden)
        elif kind is Block:
            for theirs, name in _PARTS.items():
                width = config.intermediate_size if theirs == "intermediate.dense" else hidden
                yield from linear(f"bert.encoder.layer.{block}.{theirs}", f"{ours}.{name}", bias=bias, zeros=width)
        elif kind is Classifier:
            yield from linear("bert.pooler.dense", f"{ours}.pooler", bias=True)
            yield from linear("cls.seq_relationship" if config.token_head else "classifier", f"{ours}.classes", bias=True)
        elif kind is TokenTransform:
            yield from linear("cls.predictions.transform.dense", f"{ours}.dense", bias=bias, zeros=hidden)
            yield from linear("cls.predictions.transform.LayerNorm", f"{ours}.norm", bias=bias, zeros=hidden)
        elif kind is HeadBias:
            yield Counterpart("cls.predictions.bias", (f"{ours}.weight",))

    def duplicates(self, config: ModelConfig) -> dict[str, str]:
        """Return the tensors that BERT's files may hold in addition, each with the tensor that it must equal."""
        return {"cls.predictions.decoder.weight": self.embedding, "cls.predictions.decoder.bias": "cls.predictions.bias"}

    def current_name(self, name: str) -> str:
        """Return the current name of a norm's weights, for which Google's checkpoints have TensorFlow's names."""
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    def corrected_by_tensors(self, config_json: Mapping[str, Any], tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return BertForPreTraining as the class of Google's checkpoints: they name BertForMaskedLM but hold both heads."""
        has_both = config_json.get("architectures") == [_TOKEN_HEAD] and "cls.seq_relationship.weight" in tensors
        return {**config_json, "architectures": [_BOTH_HEADS]} if has_both else config_json


def _number_of_classes(config_json: Mapping[str, Any]) -> int:
    """Return the number of labels, or else num_labels, which transformers reads only without labels."""
    labels = config_json.get("id2label")
    return config_json.get("num_labels", 2) if labels is None else len(labels)


def _their_token_types(config: ModelConfig) -> int:
    """Number of token types in the file. BERT always has some: a network without them gets zeros for the two of its tokenizer."""
    return config.token_types or 2
