"""A walk over the list of layers that holds one layer in memory at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Stream
from model.transformer import Block, Layer, layers, load_into_meta, select_outputs


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer of the walk, with its weights."""

    name: str
    """Prefix of its parameters' names. A tied module comes again under the same name."""
    layer: Layer
    module: nn.Module
    """The layer's module, in eval mode."""
    blocks_before: int
    """Number of blocks in the list before it."""

    def __call__(self, stream: Stream) -> Stream:
        with torch.no_grad():
            return self.module(stream) if self.layer.forward is None else self.layer.forward(self.module, stream)

    @property
    def block(self) -> int | None:
        """Its number among the blocks, from 0; None for other layers."""
        return self.blocks_before if self.layer.module is Block else None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Its parameters by their names in the whole network."""
        return {f"{self.name}.{name}": parameter.data for name, parameter in self.module.named_parameters()}


def walk(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    stored_as: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Yield every layer of the list with its weights from `state`, which are read when the layer's turn comes.

    The weights are rounded to `stored_as`, the type in which a file stores them, and then converted to float32. A layer is freed when
    the caller drops its step.
    """
    blocks = 0
    for number, layer in enumerate(layers(dataclasses.replace(config, dropout=0.0))):
        yield _build(f"tied_modules.{layer.tied_key}" if layer.tied_key else str(number), layer, state, device, stored_as, blocks)
        blocks += layer.module is Block


def outputs(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    samples: Sequence[Stream],
    device: torch.device | str = "cpu",
    stored_as: torch.dtype = torch.float32,
    prepare: Callable[[Step], object] = lambda step: None,
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """Yield the network's outputs for each sample, in order. A sample is the input of the first layer.

    Memory holds one block and the hidden states of all samples, at the end the layers after the last block and one sample's logits.
    `prepare` is called with each step before a sample passes through it.
    """
    streams, last_steps = list(samples), []
    for step in walk(config, state, device, stored_as):
        prepare(step)
        if step.blocks_before < config.total_blocks:
            for number, stream in enumerate(streams):
                streams[number] = step(stream)
        else:
            last_steps.append(step)
        del step  # before the next one is read
    for stream in streams:
        for step in last_steps:
            stream = step(stream)
        yield select_outputs(config, stream)


def _build(name: str, layer: Layer, state: Mapping[str, Tensor], device: torch.device | str, stored_as: torch.dtype, blocks: int) -> Step:
    with torch.device("meta"):
        module = layer.module(*layer.arguments)
    weights = {own: state[f"{name}.{own}"].to(device, stored_as).float() for own, _ in module.named_parameters()}
    return Step(name, layer, load_into_meta(module, weights, device).requires_grad_(False), blocks)
