"""What an architecture of transformers says of itself: which of our options it holds, its config.json both ways, its tensors."""

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
    """One tensor of theirs and what it is made of: ours, stacked [out, in] and perhaps transposed to [in, out].

    Where there is none of ours (a bias that we left out) theirs has the shape `zeros` and holds zeros.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    zeros: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """Whose tensor it is."""
        return self.theirs.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """What a config.json says of the tokenizer, and of the classes that a text can have."""

    end_of_text: int | None = None
    """Ends a document; it also begins one."""
    padding: int | None = None
    """Stands where no token is."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""
    decoder_start: int | None = None
    """Begins the target of a decoder behind an encoder; None: end of text does."""

    @property
    def start(self) -> int:
        """Of a target; 0 where nothing is said, for there has to be one."""
        return (self.end_of_text or 0) if self.decoder_start is None else self.decoder_start


NO_TOKENS = SpecialTokens()

# What most architectures do not have; each says beside it what else it needs or allows.
_RARE: dict[str, tuple | None] = {
    "norm_position": ("pre",),
    "rope_scaling": ("none",),
    "sliding_window": (None,),
    "prefix_attention": (False,),
    "qk_norm": (False,),
    "logit_softcap": (None,),
}


class Architecture:
    """One architecture of transformers. Its config.json is `stated`, a mapping as read from JSON."""

    label: str
    """Its name for people."""
    classes: tuple[str, ...]
    """Classes of transformers that a folder may name."""
    allowed: dict[str, tuple | None]
    """Options of ours with the values that have a counterpart; None where all have, though they have none in most architectures."""
    needed: tuple[str, ...]
    """Keys without which a config.json says too little; each has a whole number."""
    embedding: str
    """Their name of the embedding."""
    supported: dict[str, Any] = {}
    """Keys of a config.json of which we have one value alone, which is also what a missing key means."""
    constants: tuple[str, ...] = ()
    """How the names of tensors end that hold nothing learnt."""
    zeros: tuple[str, ...] = ()
    """Tensors that must hold zeros, because we have no such thing."""

    def class_of(self, config: ModelConfig) -> str:
        """The class of transformers that has this network."""
        return self.classes[0]

    def auto_class(self, config: ModelConfig) -> str:
        """The class of transformers that finds that class."""
        return "AutoModelForCausalLM"

    def refusals(self, config: ModelConfig) -> Iterator[str]:
        """A sentence for each option of ours that has no counterpart."""
        for option, values in (_RARE | self.allowed).items():
            if values is not None and (value := getattr(config, option)) not in values:
                need = " or ".join(spell(value) for value in values)
                yield f"model.{option} {spell(value)} has no counterpart in {self.label}; it must be {need}."

    def state(self, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
        """What config.json says beside what all of them say."""
        raise NotImplementedError

    def unknown_features(self, stated: Mapping[str, Any]) -> Iterator[str]:
        """A sentence for each feature of a config.json that we do not have."""
        if stated.get("auto_map"):
            yield '"auto_map" is not supported.'
        if quantization := stated.get("quantization_config"):
            try:
                packed.parse_configuration(quantization)
            except ValueError as error:
                yield str(error)
        if len(classes := stated.get("architectures") or [self.classes[0]]) != 1 or classes[0] not in self.classes:
            yield f"architectures is {classes}; only {' or '.join(self.classes)} is supported."
        for key, value in self.supported.items():
            if stated.get(key, value) != value:
                yield f"{key} is {json.dumps(stated[key])}; only {json.dumps(value)} is supported."

    def unstated(self, stated: Mapping[str, Any]) -> Iterator[str]:
        """A sentence for each key that is needed and has no number."""
        for key in self.needed:
            if key not in stated:
                yield f'"{key}" is missing.'
            elif type(stated[key]) is not int:
                yield f"{key} is {json.dumps(stated[key])}; it must be a whole number."

    def read(self, stated: Mapping[str, Any]) -> ModelConfig:
        """The configuration that a config.json states; keys that old files leave out have the values of transformers' classes."""
        raise NotImplementedError

    def counterparts(self, config: ModelConfig) -> Iterator[Counterpart]:
        """Every tensor of theirs, in the order of our list of layers. A tied head is the embedding, and not named again."""
        block = 0
        for ours, layer in first_uses(config):
            if layer.module is TokenEmbedding:
                yield Counterpart(self.embedding, (f"{ours}.weight",))
            elif layer.module is Head:
                yield Counterpart("lm_head.weight", (f"{ours}.weight",))
            else:
                yield from self.of_layer(config, layer.module, ours, block)
            block += layer.module is Block

    def of_layer(self, config: ModelConfig, kind: Callable, ours: str, block: int) -> Iterator[Counterpart]:
        """Their tensors of one layer, neither embedding nor head; behind so many blocks, our names begin with `ours`."""
        raise NotImplementedError

    def copies(self, config: ModelConfig) -> dict[str, str]:
        """Tensors that a file may hold a second time, by what they are copies of."""
        return {"lm_head.weight": self.embedding} if config.tie_embeddings else {}

    def current_name(self, name: str) -> str:
        """A tensor's name, which old files spell otherwise."""
        return name

    def seen_with(self, stated: Mapping[str, Any], tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a config.json states, made true by what the files hold."""
        return stated


def linear(theirs: str, *ours: str, bias: bool, zeros: int = 0, transposed: bool = False) -> Iterator[Counterpart]:
    """Weight and bias of a linear layer or norm, of several stacked; where theirs has a bias and ours none, `zeros` is its length."""
    yield Counterpart(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed)
    if bias:
        yield Counterpart(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))
    elif zeros:
        yield Counterpart(f"{theirs}.bias", (), zeros=(zeros,))


def side_of(config: ModelConfig, block: int) -> tuple[str, int]:
    """The part of an encoder-decoder that a block is in, and its number there."""
    return ("encoder", block) if block < config.num_layers else ("decoder", block - config.num_layers)


def whole_heads(config: ModelConfig, label: str) -> Iterator[str]:
    """Sentences for heads that are grouped, or do not share out the width among them."""
    if config.num_key_value_heads != config.num_attention_heads:
        yield (
            f"model.num_key_value_heads {config.num_key_value_heads} has no counterpart in {label}; "
            f"it must be num_attention_heads {config.num_attention_heads}."
        )
    if config.head_size * config.num_attention_heads != config.hidden_size:
        yield (
            f"model.head_size {config.head_size} has no counterpart in {label}; "
            f"times num_attention_heads {config.num_attention_heads} it must be hidden_size {config.hidden_size}."
        )


def one_of(stated: Mapping[str, Any], key: str, default: str, values: Mapping[str, str]) -> Iterator[str]:
    """A sentence where a key has none of the values (theirs, by ours)."""
    if (value := stated.get(key, default)) not in values.values():
        yield f'{key} is "{value}"; supported are {", ".join(values.values())}.'


def all_alike(stated: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> Iterator[str]:
    """A sentence where keys differ that must have one value."""
    found = {key: stated.get(key, default) for key, default in defaults.items()}
    if len(set(found.values())) > 1:
        yield f"{found} differ; only one {what} for all is supported."


def ours_of(values: Mapping[str, str], theirs: str) -> str:
    """Our word for theirs."""
    return next(ours for ours, word in values.items() if word == theirs)


def spell(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
