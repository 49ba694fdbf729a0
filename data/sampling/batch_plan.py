"""Batch plan: which samples each optimizer step reads. Pure arithmetic on integers, without files, ranks or torch.

It is in data/ and not in launch/training because data/show.py, which may not import launch, needs it too.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from annotated_types import Gt, Lt

from data.command_line import UserError


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Sizes of a batch as a recipe gives them."""

    global_batch_size: Annotated[int, Gt(0), Lt(2**31)] = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Gt(0), Lt(2**31)] | None = None
    """Sequences per forward pass of one rank. Gradient accumulation follows from it (default: the whole share of the rank, which needs
    no accumulation; in a pipeline, the size that gives four micro-batches a stage)."""

    def accumulation_steps(self, data_parallel_size: int, name_of_ranks: str = "data_parallel_size") -> int:
        """Return how many micro-batches (without a micro-batch size: sequences) each rank adds up for one optimizer step.

        Raises UserError if the global batch cannot be divided; `name_of_ranks` is what the message calls `data_parallel_size`.
        """
        unit = (self.micro_batch_size or 1) * data_parallel_size
        steps, remainder = divmod(self.global_batch_size, unit)
        if remainder or not steps:
            nearest = [str(unit * n) for n in (steps, steps + 1) if n]
            size = f"batch.micro_batch_size {self.micro_batch_size} x " if self.micro_batch_size else ""
            raise UserError(
                f"batch.global_batch_size {self.global_batch_size} is not a multiple of {size}"
                f"{name_of_ranks} {data_parallel_size}{f' = {unit}' if size else ''}.\nNearest: {' or '.join(nearest)}."
            )
        return steps


class Segment(NamedTuple):
    """Steps in a row that read equally many samples; a segment ends where the next one begins."""

    first_step: int
    first_position: int
    """Position of the first sample of the first step."""
    size: int
    """Samples that each step reads."""


def read_segments(record: Sequence[Mapping[str, int]]) -> tuple[Segment, ...]:
    """Return the segments that BatchPlan.record returned."""
    return tuple(Segment(**segment) for segment in record)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The samples that each optimizer step of a run reads, and the numbers that follow: steps, samples and tokens.

    A run reads the samples of its blend in one order. A sample's index in that order is its position, and the progress of a run is
    the position that it has reached. So a step of another size begins where the step before it ended. Steps are counted from 0.
    """

    batch: BatchSettings
    """The sizes of the last segment."""
    sequence_length: int
    """Tokens of a sample. Every token counts, padding too; of an encoder-decoder, those of the source alone."""
    train_steps: int | None = None
    """Length of the run in steps; None if train_tokens gives it."""
    train_tokens: float | None = None
    """Length of the run in tokens, rounded down to whole steps; None if train_steps gives it."""
    segments: tuple[Segment, ...] = ()
    """The sizes of the steps, from step 0 on (default: one segment of the size of `batch`)."""

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(0, 0, self.batch.global_batch_size),))

    def after(self, step: int, segments: Sequence[Segment]) -> "BatchPlan":
        """Return this plan for a run that has taken `step` steps as `segments` state, and takes the others with the size of `batch`."""
        taken = dataclasses.replace(self, segments=tuple(segment for segment in segments if segment.first_step < step))
        if not step or taken.segments[-1].size == self.batch.global_batch_size:
            return taken
        now = Segment(step, taken.position(step), self.batch.global_batch_size)
        return dataclasses.replace(taken, segments=(*taken.segments, now))

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole run."""
        if self.train_steps is not None:
            return self.train_steps
        assert self.train_tokens is not None, "a plan without a length has no last step"
        segment = next(one for one in reversed(self.segments) if one.first_position * self.sequence_length <= self.train_tokens)
        left = self.train_tokens - segment.first_position * self.sequence_length
        return segment.first_step + int(left // (segment.size * self.sequence_length))

    def size(self, step: int) -> int:
        """Samples that a step reads."""
        return self._segment(step).size

    def position(self, step: int) -> int:
        """Position of the first sample of a step: the number of samples read by all steps before it."""
        segment = self._segment(step)
        return segment.first_position + (step - segment.first_step) * segment.size

    def positions(self, step: int) -> range:
        """Positions of the samples that a step reads."""
        return range(self.position(step), self.position(step + 1))

    def step_of(self, position: int) -> int:
        """Step that reads the sample at a position."""
        segment = next(one for one in reversed(self.segments) if one.first_position <= position)
        return segment.first_step + (position - segment.first_position) // segment.size

    def tokens(self, step: int) -> int:
        """Tokens that a step reads."""
        return self.size(step) * self.sequence_length

    def tokens_before(self, step: int) -> int:
        """Tokens read by all steps before a step."""
        return self.position(step) * self.sequence_length

    def record(self) -> list[dict[str, int]]:
        """Return the segments as a checkpoint and run.json hold them."""
        return [segment._asdict() for segment in self.segments]

    def describe(self, data_parallel_size: int) -> str:
        """Return one line: how the ranks share a batch, the tokens of a step, and the steps that have another size."""
        others = [
            f"; steps {one.first_step + 1:,} to {following.first_step:,} read {one.size}"
            for one, following in itertools.pairwise(self.segments)
        ]
        return (
            f"{self.batch.global_batch_size} sequences = micro-batch {self.batch.micro_batch_size} "
            f"x accumulation {self.batch.accumulation_steps(data_parallel_size)} x data parallel {data_parallel_size}; "
            f"{self.batch.global_batch_size * self.sequence_length:,} tokens a step{''.join(others)}"
        )

    def _segment(self, step: int) -> Segment:
        return next(one for one in reversed(self.segments) if one.first_step <= step)
