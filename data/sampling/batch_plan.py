"""Batch plan: which samples each optimizer step reads. Pure arithmetic on integers, without files, ranks or torch.

It is in data/ and not in launch/training because data/show.py, which may not import launch, needs it too.
"""

import dataclasses
from typing import Annotated

from annotated_types import Gt

from data.command_line import UserError


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Sizes of a batch as a recipe gives them."""

    global_batch_size: Annotated[int, Gt(0)] = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Gt(0)] | None = None
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


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The samples that each optimizer step of a run reads, and the numbers that follow: steps, samples and tokens.

    A run reads the samples of its blend in one order. A sample's index in that order is its position, and the progress of a run is
    the position that it has reached. Steps are counted from 0. Today every step reads equally many samples.
    """

    batch: BatchSettings
    sequence_length: int
    """Tokens of a sample. Every token counts, padding too; of an encoder-decoder, those of the source alone."""
    train_steps: int | None = None
    """Length of the run in steps; None if train_tokens gives it."""
    train_tokens: float | None = None
    """Length of the run in tokens, rounded down to whole steps; None if train_steps gives it."""

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole run."""
        if self.train_steps is not None:
            return self.train_steps
        assert self.train_tokens is not None, "a plan without a length has no last step"
        return int(self.train_tokens // self.tokens(0))

    def position(self, step: int) -> int:
        """Position of the first sample of a step: the number of samples read by all steps before it."""
        return step * self.batch.global_batch_size

    def positions(self, step: int) -> range:
        """Positions of the samples that a step reads."""
        return range(self.position(step), self.position(step + 1))

    def tokens(self, step: int) -> int:
        """Tokens that a step reads."""
        return len(self.positions(step)) * self.sequence_length

    def tokens_before(self, step: int) -> int:
        """Tokens read by all steps before a step."""
        return self.position(step) * self.sequence_length

    def describe(self, data_parallel_size: int) -> str:
        """Return one line: how the ranks share a batch, and the tokens of a step."""
        return (
            f"{self.batch.global_batch_size} sequences = micro-batch {self.batch.micro_batch_size} "
            f"x accumulation {self.batch.accumulation_steps(data_parallel_size)} x data parallel {data_parallel_size}; "
            f"{self.tokens(0):,} tokens a step"
        )
