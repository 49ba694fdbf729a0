"""Comparison of two networks on the same text, each read into memory layer by layer."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from data.sampling.batches import Batch, target_tokens
from launch.compressing.workers import Workers
from launch.evaluation.evaluation_sets import first_inputs
from launch.evaluation.quality import Comparison, compared
from launch.evaluation.score import perplexity
from model.config import ModelConfig
from model.loss import IGNORED, token_losses
from model.walk import Step, outputs

# Hidden states of a network in memory at a time. With this many tokens, reading a block's weights again for the next tokens takes a small
# part of the time that the tokens take to pass through it.
_HIDDEN_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclasses.dataclass(frozen=True)
class StreamedModel:
    """A model that is read into memory layer by layer: its shape, its weights, and how they are stored."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    prepare: Callable[[Step], object] = lambda step: None
    """Called with each step before it runs, as model.walk.outputs does."""

    def outputs(self, batches: Sequence[Batch], device: torch.device) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Yield the network's outputs for each batch."""
        return outputs(self.config, self.state, first_inputs(batches, device), device, prepare=self.prepare)


def compare(before: StreamedModel, after: StreamedModel, batches: Sequence[Batch], workers: Workers) -> Comparison:
    """Compare two networks on this rank's share of the batches, and return the sum over the ranks."""
    total = Comparison()
    for group in _groups_that_fit(batches, before.config.hidden_size, workers.device):
        both_outputs = (model.outputs(group, workers.device) for model in (before, after))
        for batch, old, new in zip(group, *both_outputs, strict=True):
            total += compared(*_logits_and_targets(old, new, batch.map(lambda tensor: tensor.to(workers.device))))
    return functools.reduce(Comparison.__add__, workers.all_gather(total))


def perplexity_of(model: StreamedModel, batches: Sequence[Batch], device: torch.device) -> float:
    """Return the perplexity per target of a network that predicts tokens."""
    total = 0.0
    for group in _groups_that_fit(batches, model.config.hidden_size, device):
        for batch, logits in zip(group, model.outputs(group, device), strict=True):
            assert isinstance(logits, Tensor)
            total += token_losses(logits, batch.targets.to(device)).sum(dtype=torch.float64).item()
    return perplexity(total / target_tokens(list(batches)))


def _groups_that_fit(batches: Sequence[Batch], hidden_size: int, device: torch.device) -> Iterator[Sequence[Batch]]:
    """Yield the batches in groups whose hidden states fit into _HIDDEN_BYTES."""
    if batches:
        size = 4 * hidden_size * max(batch.tokens.numel() + (0 if batch.source is None else batch.source.numel()) for batch in batches)
        count = max(1, _HIDDEN_BYTES[device.type] // size)
        yield from (batches[start : start + count] for start in range(0, len(batches), count))


def _logits_and_targets(
    old: Tensor | tuple[Tensor, Tensor], new: Tensor | tuple[Tensor, Tensor], batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both logits and the targets: of tokens, or, if no token is a target, of classes.  -> 2 x [.., choices], [..]"""
    if isinstance(old, tuple) and isinstance(new, tuple):
        if batch.classes is not None and not (batch.targets != IGNORED).any():
            return old[1], new[1], batch.classes
        old, new = old[0], new[0]
    assert isinstance(old, Tensor) and isinstance(new, Tensor)
    return old, new, batch.targets
