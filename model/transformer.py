"""The ordered list of layers for a config, and the same list built as one module."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import (
    Block,
    Classifier,
    EmbeddingNorm,
    FinalNorm,
    Head,
    HeadBias,
    KeyValueCache,
    Passed,
    Positions,
    RelativePositions,
    TokenEmbedding,
    TokenTransform,
    TokenTypes,
)

TIED_EMBEDDING = "embedding"

Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One entry of the list: how to build it, and, where it shares a module with another entry, under which key."""

    module: Callable[..., nn.Module]
    arguments: tuple = ()
    tied_key: str | None = None
    forward: Callable | None = None
    """What to call in place of the module's forward (a tied module's further uses): (module, inputs) -> outputs."""


def as_head(embedding: nn.Module, inputs: Passed) -> Passed:
    """The tied embedding as the head: vectors to logits."""
    return embedding(inputs, use="head")


def as_target(embedding: nn.Module, inputs: Passed) -> Passed:
    """The shared embedding where the decoder begins: the target's tokens to vectors, the source's encoding beside them."""
    return embedding(inputs, use="target")


def layers(config: ModelConfig, seed: int = 0, recompute: bool = False) -> list[Layer]:
    """The network as data, in order. The pipeline, ZeRO-3, the plain module and compression all read this list."""
    is_pair = config.architecture == "encoder_decoder"
    tied_key = TIED_EMBEDDING if is_pair or (config.tie_embeddings and config.token_head) else None
    entries = [Layer(TokenEmbedding, (config, seed), tied_key)]
    if config.token_types:
        entries.append(Layer(TokenTypes, (config, seed)))
    entries += _positions(config, seed, is_decoder=config.architecture == "decoder")
    if config.architecture == "encoder":
        entries.append(Layer(EmbeddingNorm, (config,)))
    entries += _blocks(config, seed, recompute, range(config.num_layers), is_decoder=config.architecture == "decoder")
    if is_pair:
        entries.append(Layer(TokenEmbedding, (config, seed), tied_key, as_target))
        entries += _positions(config, seed, is_decoder=True)
        entries += _blocks(config, seed, recompute, range(config.num_layers, config.total_blocks), is_decoder=True)
    if config.num_classes:
        entries.append(Layer(Classifier, (config, seed)))
    if not config.token_head:
        return entries
    if config.architecture == "encoder":
        entries.append(Layer(TokenTransform, (config, seed)))
    entries.append(Layer(TokenEmbedding, (config, seed), tied_key, as_head) if config.tie_embeddings else Layer(Head, (config, seed)))
    if config.architecture == "encoder":
        entries.append(Layer(HeadBias, (config,)))
    return entries


def first_uses(config: ModelConfig) -> Iterator[tuple[str, Layer]]:
    """Each module of the list once, behind what its parameters' names begin with."""
    seen = set()
    for number, layer in enumerate(layers(config)):
        name = f"tied_modules.{layer.tied_key}" if layer.tied_key else str(number)
        if name not in seen:
            seen.add(name)
            yield name, layer


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of the network's parameters, by name, in their order; none takes memory."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}


def _positions(config: ModelConfig, seed: int, is_decoder: bool) -> list[Layer]:
    kinds = {"learned": Positions, "sinusoidal": Positions, "relative": RelativePositions}
    return [Layer(kinds[config.positions], (config, seed, is_decoder))] if config.positions in kinds else []


def _blocks(config: ModelConfig, seed: int, recompute: bool, numbers: range, is_decoder: bool) -> list[Layer]:
    """A stack, and the norm behind it where its blocks have none there."""
    stack = [Layer(Block, (config, number, seed, recompute, is_decoder)) for number in numbers]
    return [*stack, Layer(FinalNorm, (config,))] if config.norm_position == "pre" else stack


def outputs_of(config: ModelConfig, passed: Passed) -> Tensor | tuple[Tensor, Tensor]:
    """What the network says, from the tuple behind its last layer: logits of tokens, with those of classes where there are some."""
    return (passed[0], passed[2]) if config.num_classes else passed[0]


def filled(module: Module, weights: Mapping[str, Tensor], device: torch.device | str) -> Module:
    """A module that was built as shapes alone (meta), with these tensors themselves as its weights, in its eval mode."""
    module.load_state_dict(weights, assign=True)
    for buffer in module.buffers():  # tables of positions are real even where weights are only shapes
        buffer.data = buffer.data.to(device)
    return module.eval()


class Transformer(nn.Module):
    """The list as one module.

    A decoder or encoder takes (tokens, segments [, token types]), an encoder-decoder (source, source segments, tokens, segments),
    each [batch, seq], and gives logits [batch, seq, vocab]; with classes the pair of them and the classes' [batch, classes], the
    first of which says nothing where there is no head for tokens.

    Children bear the names that DeepSpeed's PipelineModule gives them ("0", "1", ...; "tied_modules.<key>"), so parameter
    names are the same in both.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, recompute: bool = False):
        super().__init__()
        self.config = config
        self.tied_modules = nn.ModuleDict()
        self._steps: list[tuple[str, Callable | None]] = []
        for number, layer in enumerate(layers(config, seed, recompute)):
            if layer.tied_key is None:
                self.add_module(str(number), layer.module(*layer.arguments))
                self._steps.append((str(number), layer.forward))
            else:
                if layer.tied_key not in self.tied_modules:
                    self.tied_modules[layer.tied_key] = layer.module(*layer.arguments)
                self._steps.append((f"tied_modules.{layer.tied_key}", layer.forward))
        self._first_of_decoder = next((place for place, (_, forward) in enumerate(self._steps) if forward is as_target), 0)

    def forward(self, *inputs: Tensor, cache: KeyValueCache | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if cache is None:
            return outputs_of(self.config, self._run(self._steps, inputs))
        if self._first_of_decoder:  # the source is read once
            if cache.encoding is None:
                cache.encoding = self._run(self._steps[: self._first_of_decoder], inputs)[0]
            inputs = cache.encoding, *inputs[1:]
        outputs = outputs_of(self.config, self._run(self._steps[self._first_of_decoder :], inputs, cache))
        cache.length += inputs[-2].shape[1]
        return outputs

    def _run(self, steps: list[tuple[str, Callable | None]], passed: Passed, cache: KeyValueCache | None = None) -> Passed:
        for name, forward in steps:
            module = self.get_submodule(name)
            passed = module(passed, cache) if forward is None else forward(module, passed)
        return passed

    @classmethod
    def holding(
        cls, config: ModelConfig, state: Mapping[str, Tensor], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Transformer":
        """The network with these weights, each read once, in its eval mode."""
        with torch.device("meta"):
            network = cls(config)
        return filled(network, {name: tensor.to(device, dtype) for name, tensor in state.items()}, device)

    def blocks(self) -> list[Block]:
        return [child for child in self.children() if isinstance(child, Block)]
