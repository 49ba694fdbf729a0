"""Base class of the architectures of transformers: supported options, config.json in both directions, and tensor names."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.compression import packed
from model.config import ModelConfig
from model.layers import Head, TokenEmbedding
from model.transformer import Block, first_uses


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """One Hugging Face tensor and the tensors of ours that it consists of: stacked [out, in], perhaps transposed to [in, out].

    If we have no such tensor (for example a bias that our network lacks), `ours` is empty and the tensor holds zeros.
    """

    theirs: str
    """Name in the Hugging Face checkpoint."""
    ours: tuple[str, ...]
    """Names of our parameters, in the order in which they are stacked along the first dimension."""
    transposed: bool = False
    """True if the file stores the transposed weight [in, out]."""
    zeros: tuple[int, ...] = ()
    """Shape of a tensor of zeros, if `ours` is empty."""

    @property
    def module(self) -> str:
        """Name of the Hugging Face module that the tensor belongs to."""
        return self.theirs.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Token ids and class names that config.json contains."""

    end_of_text: int | None = None
    """Id of the token that ends a document."""
    padding: int | None = None
    """Id of the padding token."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""
    decoder_start: int | None = None
    """Id of the token with which the decoder of an encoder-decoder begins; None: end of text."""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Contents of the generation_config.json of the model that this one was made from, which is copied."""
    begin_of_text: int | None = None
    """Id of the token that begins a document; None: end of text."""

    @property
    def ids(self) -> dict[str, int | list[int] | None]:
        """Ids by their keys in config.json and generation_config.json: the original's, and end of text among those that end a text."""
        if not self.generation:
            begin = self.end_of_text if self.begin_of_text is None else self.begin_of_text
            return {"bos_token_id": begin, "eos_token_id": self.end_of_text, "pad_token_id": self.padding}
        given = self.generation.get("eos_token_id")
        ends = [*(given if isinstance(given, list) else [] if given is None else [given]), self.end_of_text]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        return {
            "bos_token_id": self.generation.get("bos_token_id"),
            "eos_token_id": ends if isinstance(given, list) or len(ends) > 1 else ends[0] if ends else None,
            "pad_token_id": self.generation.get("pad_token_id"),
        }

    @property
    def start(self) -> int:
        """Id with which a target begins. Hugging Face requires one, so it is 0 if none is known."""
        return (self.end_of_text or 0) if self.decoder_start is None else self.decoder_start


NO_TOKENS = SpecialTokens()

_SUPPORTED_BY_ALL: dict[str, Any] = {"per_layer_config": None}
HEADLESS = "the network without its head, as AutoModel saves it"
# Allowed values of options that most architectures lack; `Architecture.allowed` overrides them.
_ALLOWED_BY_DEFAULT: dict[str, tuple | None] = {
    "norm_position": ("pre",),
    "rope_scaling": ("none",),
    "sliding_window": (None,),
    "prefix_attention": (False,),
    "qk_norm": (False,),
    "logit_softcap": (None,),
}


class Architecture:
    """One architecture of transformers. `config_json` is the content of its config.json."""

    label: str
    """Name of the architecture in messages."""
    classes: tuple[str, ...]
    """Classes of transformers that config.json may name."""
    allowed: dict[str, tuple | None]
    """Our options and their supported values. None allows every value of an option that most architectures lack."""
    needed: tuple[str, ...]
    """Keys of config.json that must be present, each with an integer."""
    embedding: str
    """Hugging Face name of the embedding."""
    supported: dict[str, Any] = {}
    """Keys of config.json with the only value that we support, which is also the default of transformers."""
    other_names: dict[str, str] = {}
    """Other names that transformers accepts for keys of config.json -> the key. They override the key."""
    not_null: tuple[str, ...] = ()
    """Further keys that we read and that transformers does not allow to be null."""
    headless: tuple[str, ...]
    """Classes of the network without its head, which AutoModel saves."""
    prefix: str
    """Start of the names of tensors outside the head, which files that AutoModel saves lack."""
    constants: tuple[str, ...] = ()
    """Suffixes of the names of tensors that are not learned; they are ignored."""
    zeros: tuple[str, ...] = ()
    """Tensors that must be zero, because our network has no such parameter."""

    def transformers_class(self, config: ModelConfig) -> str:
        """Return the name of the class of transformers for this network."""
        return self.classes[0]

    def auto_class(self, config: ModelConfig) -> str:
        """Return the name of the Auto class of transformers that loads this network."""
        return "AutoModelForCausalLM"

    def unsupported_options(self, config: ModelConfig) -> Iterator[str]:
        """Yield a message for each of our options that this architecture cannot express."""
        for option, values in (_ALLOWED_BY_DEFAULT | self.allowed).items():
            if values is not None and (value := getattr(config, option)) not in values:
                need = " or ".join(value_as_text(value) for value in values)
                yield f"model.{option} {value_as_text(value)} has no counterpart in {self.label}; it must be {need}."

    def write_config(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """Return the keys of config.json that are specific to this architecture."""
        raise NotImplementedError

    def unsupported_features(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each feature in a config.json that our network does not have."""
        if config_json.get("auto_map"):
            yield '"auto_map" is not supported.'
        if quantization := config_json.get("quantization_config"):
            try:
                packed.parse_configuration(quantization)
            except ValueError as error:
                yield str(error)
        classes = config_json.get("architectures") or [self.classes[0]]
        if len(classes) == 1 and classes[0] in self.headless:
            yield f"architectures is {classes}, {HEADLESS}; only {' or '.join(self.classes)} is supported."
        elif len(classes) != 1 or classes[0] not in self.classes:
            yield f"architectures is {classes}; only {' or '.join(self.classes)} is supported."
        for key, value in (_SUPPORTED_BY_ALL | self.supported).items():
            if config_json.get(key, value) != value:
                yield f"{key} is {json.dumps(config_json[key])}; only {json.dumps(value)} is supported."
        for name, key in self.other_names.items():
            if name in config_json and config_json[name] != config_json.get(key):
                given = f"{key} {json.dumps(config_json[key])}" if key in config_json else f"no {key}"
                yield f"{name} is {json.dumps(config_json[name])} next to {given}; transformers reads both as {key}. Keep one {key}."
        for key in self.not_null:
            if config_json.get(key, 0) is None:
                yield f"{key} is null, which transformers refuses too. Remove it for its default, or give it a value."

    def missing_keys(self, config_json: Mapping[str, Any]) -> Iterator[str]:
        """Yield a message for each needed key that is missing or not an integer."""
        for key in self.needed:
            if key not in config_json:
                yield f'"{key}" is missing.'
            elif type(config_json[key]) is not int:
                yield f"{key} is {json.dumps(config_json[key])}; it must be a whole number."

    def read_config(self, config_json: Mapping[str, Any]) -> ModelConfig:
        """Return the configuration of a config.json. Keys that old files lack have the defaults of transformers."""
        raise NotImplementedError

    def counterparts(self, config: ModelConfig) -> Iterator[Counterpart]:
        """Yield all Hugging Face tensors in the order of our list of layers. A tied head is the embedding and is not yielded again."""
        block = 0
        for ours, layer in first_uses(config):
            if layer.module is TokenEmbedding:
                yield Counterpart(self.embedding, (f"{ours}.weight",))
            elif layer.module is Head:
                yield Counterpart("lm_head.weight", (f"{ours}.weight",))
            else:
                yield from self.layer_counterparts(config, layer.module, ours, block)
            block += layer.module is Block

    def layer_counterparts(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Yield the Hugging Face tensors of one layer that is neither embedding nor head.

        `kind` is the layer's class, `ours` the prefix of its parameter names, `block` the number of blocks before it.
        """
        raise NotImplementedError

    def duplicates(self, config: ModelConfig) -> dict[str, str]:
        """Return tensors that a file may hold in addition, each with the name of the tensor that it must equal."""
        return {"lm_head.weight": self.embedding} if config.tie_embeddings else {}

    def current_name(self, name: str) -> str:
        """Return the current name of a tensor that old files may call differently."""
        return name

    def corrected_by_tensors(self, config_json: Mapping[str, Any], tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return config.json, corrected if the tensors in the files contradict it."""
        return config_json


def linear(theirs: str, *ours: str, bias: bool, zeros: int = 0, transposed: bool = False) -> Iterator[Counterpart]:
    """Yield weight and bias of a norm or linear layer, or of several stacked ones.

    If only the Hugging Face layer has a bias, `zeros` is the length of that bias, which is written as zeros.
    """
    yield Counterpart(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed)
    if bias:
        yield Counterpart(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))
    elif zeros:
        yield Counterpart(f"{theirs}.bias", (), zeros=(zeros,))


def stack_and_index(config: ModelConfig, block: int) -> tuple[str, int]:
    """Return "encoder" or "decoder" for a block of an encoder-decoder, and the block's index in that stack."""
    return ("encoder", block) if block < config.num_layers else ("decoder", block - config.num_layers)


def check_heads(config: ModelConfig, label: str) -> Iterator[str]:
    """Yield a message if heads share keys and values, and one if the heads' sizes do not add up to the hidden size."""
    if config.num_key_value_heads != config.num_attention_heads:
        yield (
            f"model.num_key_value_heads {config.num_key_value_heads} has no counterpart in {label}; "
            f"it must be num_attention_heads {config.num_attention_heads}."
        )
    if config.head_size * config.num_attention_heads != config.hidden_size:
        yield (
            f"model.head_size {config.head_size} has no counterpart in {label}; "
            f"head_size x num_attention_heads {config.num_attention_heads} must be hidden_size {config.hidden_size}."
        )


def check_one_of(config_json: Mapping[str, Any], key: str, default: str, values: Mapping[str, str]) -> Iterator[str]:
    """Yield a message if a key has an unsupported value. `values`: our value -> the value in config.json."""
    if (value := config_json.get(key, default)) not in values.values():
        yield f'{key} is "{value}"; supported are {", ".join(values.values())}.'


def check_equal(config_json: Mapping[str, Any], defaults: Mapping[str, Any], quantity: str) -> Iterator[str]:
    """Yield a message if keys differ that must have the same value. `defaults`: each key with its default."""
    values = {key: config_json.get(key, default) for key, default in defaults.items()}
    if len(set(values.values())) > 1:
        given = ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items())
        yield f"{given} differ; only one {quantity} for all is supported."


def our_value(values: Mapping[str, str], theirs: str) -> Any:
    """Return our value for one of config.json. `values`: our value -> the value in config.json."""
    return next(ours for ours, value in values.items() if value == theirs)


def value_as_text(value: object) -> str:
    """Return an option's value as a recipe writes it."""
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
