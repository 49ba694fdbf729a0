"""The list of layers, walked one layer at a time: what is in memory is one layer and what passes through it."""

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
    """What the names of its parameters begin with; a tied module comes again under the same name."""
    layer: Layer
    module: nn.Module
    """In its eval mode."""
    blocks_before: int
    """Blocks of the list that come before it."""

    def __call__(self, passed: Stream) -> Stream:
        with torch.no_grad():
            return self.module(passed) if self.layer.forward is None else self.layer.forward(self.module, passed)

    @property
    def block(self) -> int | None:
        """Its number, from 0, where it is a block."""
        return self.blocks_before if self.layer.module is Block else None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By their names in the whole network."""
        return {f"{self.name}.{name}": parameter.data for name, parameter in self.module.named_parameters()}


def walk(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    stored_as: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Every layer of the list, built with the weights that `state` has for it, each read when it is its turn.

    The weights are rounded to `stored_as`, as a file keeps them, and are float32 then. A caller that keeps no step keeps no layer.
    """
    blocks = 0
    for number, layer in enumerate(layers(dataclasses.replace(config, dropout=0.0))):
        yield _built(f"tied_modules.{layer.tied_key}" if layer.tied_key else str(number), layer, state, device, stored_as, blocks)
        blocks += layer.module is Block


def outputs(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    samples: Sequence[Stream],
    device: torch.device | str = "cpu",
    stored_as: torch.dtype = torch.float32,
    prepare: Callable[[Step], object] = lambda step: None,
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """What the network says of each sample, in their order; a sample is what its first layer takes.

    Beside one block memory holds the hidden states of all samples, then what lies behind the last block and one sample's logits.
    `prepare` is called with each step before anything passes through it.
    """
    passed, behind = list(samples), []
    for step in walk(config, state, device, stored_as):
        prepare(step)
        if step.blocks_before < config.total_blocks:
            for number, sample in enumerate(passed):
                passed[number] = step(sample)
        else:
            behind.append(step)
        del step  # before the next one is read
    for sample in passed:
        for step in behind:
            sample = step(sample)
        yield select_outputs(config, sample)


def _built(name: str, layer: Layer, state: Mapping[str, Tensor], device: torch.device | str, stored_as: torch.dtype, blocks: int) -> Step:
    with torch.device("meta"):
        module = layer.module(*layer.arguments)
    weights = {own: state[f"{name}.{own}"].to(device, stored_as).float() for own, _ in module.named_parameters()}
    return Step(name, layer, load_into_meta(module, weights, device).requires_grad_(False), blocks)
