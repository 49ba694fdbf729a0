"""Micro-batches of samples: those that a rank reads at a training step, and the fixed order of an evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.command_line import UserError
from data.sampling.batch_plan import BatchPlan
from data.sampling.order import Blend, rank_share
from data.sampling.packing import PackedSamples
from data.sampling.samples import IGNORED, Sample, Samples, padding_like
from data.shards import TokenStream


class Batch(NamedTuple):
    """One micro-batch: the fields of Sample with one row a sample, int64. Fields that the objective does not have are None."""

    tokens: Tensor
    """[micro_batch_size, sequence_length], or [micro_batch_size, target_length] if there is a source"""
    segments: Tensor
    """Shape of `tokens`."""
    targets: Tensor
    """Shape of `tokens`."""
    token_types: Tensor | None = None
    """Shape of `tokens`."""
    source: Tensor | None = None
    """[micro_batch_size, sequence_length]"""
    source_segments: Tensor | None = None
    """[micro_batch_size, sequence_length]"""
    classes: Tensor | None = None
    """[micro_batch_size]"""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the network, in its order."""
        if self.source is not None and self.source_segments is not None:
            return self.source, self.source_segments, self.tokens, self.segments
        return (self.tokens, self.segments) if self.token_types is None else (self.tokens, self.segments, self.token_types)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `function` applied to each tensor."""
        return Batch._make(None if field is None else function(field) for field in self)


def target_tokens(batches: list[Batch]) -> int:
    """Return the number of targets that are predicted."""
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)


def target_classes(batches: list[Batch]) -> int:
    """Return the number of classes that are predicted."""
    return sum(int((batch.classes != IGNORED).sum()) for batch in batches if batch.classes is not None)


class TrainingBatches:
    """The batches of one rank; which samples they are is a pure function of the step, the plan, the blend and the rank."""

    def __init__(
        self,
        sources: Sequence[Samples],
        blend: Blend,
        plan: BatchPlan,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`plan` must have a micro-batch size. Raises UserError if `world` ranks cannot share its batch. (A ramp is checked by its user,
        because sizes that were passed before a resume do not count.)"""
        assert plan.batch.micro_batch_size is not None
        if not plan.batch.ramp:
            plan.batch.accumulation_steps(world)
        self.sources = sources
        self.blend = blend
        self.plan = plan
        self.micro_batch_size = plan.batch.micro_batch_size
        self.rank, self.world = rank, world

    def step(self, number: int) -> list[Batch]:
        """Return this rank's micro-batches of an optimizer step; steps are counted from 0."""
        return [
            _stack([self.sources[source].sample(sample, epoch) for source, epoch, sample in rows])
            for rows in self.step_samples(number).tolist()
        ]

    def step_samples(self, number: int) -> NDArray[np.int64]:
        """Return source, epoch and sample of every row of this rank's micro-batches.  -> [accumulation, micro_batch_size, 3]"""
        step = self.plan.positions(number)
        positions = np.arange(step.start, step.stop, dtype=np.int64)
        share = rank_share(positions, self.micro_batch_size, self.rank, self.world)
        return np.stack(self.blend.draw(share.ravel()), axis=-1).reshape(*share.shape, 3)


def num_evaluation_samples(stream: TokenStream, sequence_length: int, stride: int) -> int:
    """Return how many samples, `stride` tokens apart, cover a stream; a begin-of-text token at its start is only read."""
    num_tokens = len(stream) - (stream.begin_of_text is not None)
    return 1 + max(0, -(-(num_tokens - sequence_length) // stride))


def evaluation_batches(
    stream: TokenStream,
    sequence_length: int,
    micro_batch_size: int,
    end_of_text: int,
    rank: int = 0,
    world: int = 1,
    limit_samples: int | None = None,
    document_mask: bool = False,
    stride: int | None = None,
) -> Iterator[Batch]:
    """Yield the whole stream in a fixed order. Every token is a target once, the first one after end_of_text; the last sample is padded.

    If the documents begin with begin_of_text, it is no target, and each sample begins with it.

    Each rank gets the same number of batches, because ranks must call the model together; the last batches may be padding.
    `limit_samples` takes that many samples, evenly spread. Samples begin `stride` tokens apart (default: sequence_length); where they
    overlap, the later sample reads the tokens again but does not predict them again.
    """
    if len(stream) == 0:
        raise UserError("The split to evaluate on has 0 tokens: no document was held out. Prepare the data with a larger --held_out.")
    stride = stride or sequence_length
    packed = PackedSamples(stream, sequence_length, end_of_text, document_mask)
    num_samples = num_evaluation_samples(stream, sequence_length, stride)
    for numbers in _evenly_spread(num_samples, limit_samples, micro_batch_size, rank, world):
        rows = _rows(lambda number: packed.window(number * stride), numbers)
        for number, row in zip(numbers, rows, strict=True):
            if number > 0:
                row.targets[: sequence_length - stride] = IGNORED  # predicted by the sample before
        yield _stack(rows)


def held_out_batches(
    samples: Samples, micro_batch_size: int, rank: int = 0, world: int = 1, limit_samples: int | None = None
) -> Iterator[Batch]:
    """Yield samples of any objective in a fixed order, drawn as in epoch 0.

    Each rank gets the same number of batches, because ranks must call the model together; the last batches may be padding.
    `limit_samples` takes that many samples, evenly spread.
    """
    for numbers in _evenly_spread(samples.num_samples, limit_samples, micro_batch_size, rank, world):
        yield _stack(_rows(lambda number: samples.sample(number, 0), numbers))


def _evenly_spread(num_samples: int, limit_samples: int | None, micro_batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Return the sample numbers of each of a rank's micro-batches; -1 for padding.  -> [batches][micro_batch_size]"""
    taken = min(num_samples, limit_samples or num_samples)
    samples = np.arange(taken, dtype=np.int64) * num_samples // taken
    padding = np.full(-taken % (micro_batch_size * world), -1, dtype=np.int64)
    return rank_share(np.concatenate([samples, padding]), micro_batch_size, rank, world).tolist()


def _rows(read: Callable[[int], Sample], numbers: list[int]) -> list[Sample]:
    """Return the samples of these numbers, with padding of the same shape for -1."""
    return [padding_like(read(0)) if number < 0 else read(number) for number in numbers]


def _stack(samples: list[Sample]) -> Batch:
    """Return samples as the rows of a micro-batch.  [sequence_length] each"""
    return Batch._make(None if rows[0] is None else torch.from_numpy(np.stack(rows)) for rows in zip(*samples, strict=True))
