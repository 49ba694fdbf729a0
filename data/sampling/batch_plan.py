"""Batch plan: which samples each optimizer step reads. Pure arithmetic on integers, without files, ranks or torch.

It is in data/ and not in launch/training because data/show.py, which may not import launch, needs it too.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from annotated_types import Gt, Lt

from data.command_line import UserError

SEESAW = "seesaw"
SEESAW_GROWTH = 16
"""Largest batch of a seesaw ramp without a size, in multiples of the first. Another doubling would save few steps."""
MAX_SEESAW_SIZES = 16
"""Most sizes of seesaw:SIZE:STEP, so that the plan of a run can be read. More sizes save hardly any steps."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_THRESHOLD = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)", re.IGNORECASE | re.ASCII)
_POWERS = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Sizes of a batch as a recipe gives them."""

    global_batch_size: Annotated[int, Gt(0), Lt(2**31)] = 32
    """Sequences per optimizer step, over all ranks. With batch.ramp: the last size of a list, and the first size of seesaw."""
    micro_batch_size: Annotated[int, Gt(0), Lt(2**31)] | None = None
    """Sequences per forward pass of one rank. Gradient accumulation follows from it (default: the largest size that divides the rank's
    share and fits the device, on a CPU at most 8,192 tokens; in a pipeline, at most the size that gives four micro-batches a stage; with
    batch.ramp, a size that divides the shares of all its sizes)."""
    ramp: str | None = None
    """Sizes of the batch over the run (default: one size). A list of THRESHOLD:SIZE, thresholds in tokens with K, M, B or T, such as
    "0:64 20M:128 80M:256": it ends with batch.global_batch_size. Or seesaw (Meterez et al. 2025, arXiv 2510.14717): the batch starts at
    batch.global_batch_size and doubles each time the schedule halves the learning rate, which then falls by the root of 2 alone, up
    to 16 times the first size, or to SIZE with seesaw:SIZE. With seesaw:SIZE:STEP, such as seesaw:32:4, it grows by STEP sequences
    each time the schedule's rate has fallen in proportion: fewer steps for the same SIZE."""

    def __post_init__(self) -> None:
        if self.ramp is not None and (wrong := _wrong_ramp(self.ramp, self.global_batch_size)):
            raise ValueError(f"batch.ramp {self.ramp}: {wrong}")

    @property
    def is_seesaw(self) -> bool:
        """True if the sizes follow from the schedule of the learning rate."""
        return self.ramp is not None and self.ramp.partition(":")[0] == SEESAW

    @property
    def seesaw_step(self) -> int | None:
        """STEP of a ramp seesaw:SIZE:STEP; None for every other."""
        words = (self.ramp or "").split(":")
        return int(words[2]) if self.is_seesaw and len(words) == 3 else None

    @property
    def seesaw_sizes(self) -> list[int]:
        """The sizes of a seesaw ramp: the first one and its doublings, or all that are a multiple of STEP above it."""
        assert self.ramp is not None
        _, *numbers = self.ramp.split(":")
        largest = int(numbers[0]) if numbers else SEESAW_GROWTH * self.global_batch_size
        if self.seesaw_step:
            return list(range(self.global_batch_size, largest + 1, self.seesaw_step))
        return [self.global_batch_size << n for n in range(largest.bit_length()) if self.global_batch_size << n <= largest]

    def accumulation_steps(self, data_parallel_size: int, name_of_ranks: str = "data_parallel_size", size: int | None = None) -> int:
        """Return how many micro-batches (without a micro-batch size: sequences) each rank adds up for a step of `size` sequences.

        `size` is batch.global_batch_size unless it is given. Raises UserError if the ranks cannot share it; `name_of_ranks` is what the
        message calls `data_parallel_size`.
        """
        size = size or self.global_batch_size
        unit = (self.micro_batch_size or 1) * data_parallel_size
        steps, remainder = divmod(size, unit)
        if remainder or not steps:
            name, number = self._part_to_change(size, unit)
            nearest = [str(unit * n) for n in (number // unit, number // unit + 1) if n]
            of_a_rank = f"batch.micro_batch_size {self.micro_batch_size} x " if self.micro_batch_size else ""
            raise UserError(
                f"{name} {number} is not a multiple of {of_a_rank}"
                f"{name_of_ranks} {data_parallel_size}{f' = {unit}' if of_a_rank else ''}.\nNearest: {' or '.join(nearest)}."
            )
        return steps

    def _part_to_change(self, size: int, unit: int) -> tuple[str, int]:
        """Return the setting, or the part of batch.ramp, that makes `size` no multiple of `unit`, and its number."""
        if self.ramp is None:
            return "batch.global_batch_size", size
        if self.seesaw_step and self.global_batch_size % unit == 0:
            return f"batch.ramp {self.ramp}: STEP", self.seesaw_step
        return f"batch.ramp {self.ramp}: size", size


@dataclasses.dataclass(frozen=True)
class BatchSettings(BatchSizes):
    """Sizes of a batch, and what follows them."""

    rate_rule: Literal["sqrt", "linear", "none"] = "sqrt"
    """batch.ramp: factor of the learning rate while the batch has another size than batch.global_batch_size, at which it is
    optimizer.learning_rate. sqrt: the root of the ratio of the sizes (Malladi et al. 2022, arXiv 2205.10287, for Adam); linear: the
    ratio, for SGD; none: 1."""
    beta2_rule: Literal["fixed", "tokens"] = "fixed"
    """batch.ramp: optimizer.beta2 while the batch has another size than batch.global_batch_size. fixed: the same; tokens: to the power
    of the ratio of the sizes, which keeps its half-life in tokens (Marek et al. 2025, arXiv 2507.07101)."""

    def rate_factor(self, size: int) -> float:
        """Return the factor of the learning rate of a step with `size` sequences."""
        return (size / self.global_batch_size) ** _POWERS[self.rate_rule] if self.ramp else 1.0

    def beta2(self, size: int, beta2: float) -> float:
        """Return the beta2 of a step with `size` sequences; `beta2` is that of global_batch_size."""
        return beta2 ** (size / self.global_batch_size) if self.beta2_rule == "tokens" else beta2


def _wrong_ramp(ramp: str, global_batch_size: int) -> str | None:
    """Return what is wrong with a ramp; None if nothing is."""
    if ramp.partition(":")[0] == SEESAW:
        return _wrong_seesaw(ramp.split(":")[1:], global_batch_size)
    parsed = [(word, _THRESHOLD.fullmatch(word)) for word in ramp.split()]
    if wrong := [word for word, match in parsed if match is None] or ([] if parsed else [ramp]):
        return (
            f'"{wrong[0]}" is not THRESHOLD:SIZE, such as 20M:128, and not seesaw. The threshold is a number of tokens, with K, M, B or T.'
        )
    steps = _thresholds(ramp)
    if steps[0][0] != 0:
        return "the first threshold must be 0, the beginning of the run."
    if not all(before < after for (before, _), (after, _) in itertools.pairwise(steps)):
        return "each threshold must be above the one before it."
    if not steps[-1][0] < 1e18:
        return "each threshold must be below 1e18 tokens."
    if not all(0 < size < 2**31 for _, size in steps):
        return "each size must be above 0 and below 2147483648."
    if steps[-1][1] != global_batch_size:
        return (
            f"its last size is {steps[-1][1]}, but batch.global_batch_size {global_batch_size} is the size that the run ends with. "
            f"Give --batch.global_batch_size {steps[-1][1]}."
        )
    return None


def _wrong_seesaw(numbers: Sequence[str], first: int) -> str | None:
    """Return what is wrong with SIZE and STEP of a seesaw ramp that begins at `first`; None if nothing is."""
    if len(numbers) > 2:
        return "write seesaw, seesaw:SIZE or seesaw:SIZE:STEP."
    least = 2 * first if len(numbers) == 1 else first + 1
    if numbers and (not numbers[0].isdecimal() or not least <= int(numbers[0]) < 2**31):
        twice = ", twice batch.global_batch_size" if len(numbers) == 1 else ", above batch.global_batch_size"
        return f"the largest size must be a number of at least {least}{twice}."
    if len(numbers) == 1:
        below = first << (int(numbers[0]) // first).bit_length() - 1
        return None if below == int(numbers[0]) else f"doublings of {first} do not reach {numbers[0]}. Nearest: {below} or {2 * below}."
    if len(numbers) == 2:
        growth = int(numbers[0]) - first
        smallest = -(-growth // (MAX_SEESAW_SIZES - 1))
        if not numbers[1].isdecimal() or not smallest <= int(numbers[1]) <= growth:
            return f"STEP must be a number from {smallest} (which gives at most {MAX_SEESAW_SIZES} sizes) to {growth}."
        step = int(numbers[1])
        if growth % step:
            below = int(numbers[0]) - growth % step
            return f"steps of {step} from {first} do not reach {numbers[0]}. Nearest: {below} or {below + step}."
    return None


def _thresholds(ramp: str) -> list[tuple[float, int]]:
    """Return the thresholds, in tokens, and the sizes of a ramp that is a list."""
    matches = [match for word in ramp.split() if (match := _THRESHOLD.fullmatch(word))]
    return [(float(match[1]) * _UNITS[match[2].upper()], int(match[3])) for match in matches]


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


def segments_from(starts: Iterable[tuple[int, int]]) -> tuple[Segment, ...]:
    """Return the segments of a run whose batch has, from each position on, a size: pairs (position, size).

    A segment ends with the first step that reaches the position of the next size.
    """
    segments: list[Segment] = []
    for position, size in starts:
        step, reached = 0, 0
        if segments:
            last = segments.pop()
            steps = max(0, -(-(position - last.first_position) // last.size))
            step, reached = last.first_step + steps, last.first_position + steps * last.size
            segments += [last] if steps else []
        segments.append(Segment(step, reached, size))
    return tuple(segments)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The samples that each optimizer step of a run reads, and the numbers that follow: steps, samples and tokens.

    A run reads the samples of its blend in one order. A sample's index in that order is its position, and the progress of a run is
    the position that it has reached. So a step of another size begins where the step before it ended. Steps are counted from 0.
    """

    batch: BatchSizes
    """The sizes as a recipe gives them."""
    sequence_length: int
    """Tokens of a sample. Every token counts, padding too; of an encoder-decoder, those of the source alone."""
    train_steps: int | None = None
    """Length of the run in steps; None if train_tokens gives it."""
    train_tokens: float | None = None
    """Length of the run in tokens, rounded down to whole steps; None if train_steps gives it."""
    segments: tuple[Segment, ...] = ()
    """The sizes of the steps, from step 0 on (default: those of `batch`). Those of seesaw must be given."""

    def __post_init__(self) -> None:
        if not self.segments:
            assert not self.batch.is_seesaw, "the sizes of seesaw follow from a schedule"
            thresholds = _thresholds(self.batch.ramp) if self.batch.ramp else [(0.0, self.batch.global_batch_size)]
            starts = [(math.ceil(tokens / self.sequence_length), size) for tokens, size in thresholds]
            object.__setattr__(self, "segments", segments_from(starts))

    def begins_with(self, step: int, segments: Sequence[Segment]) -> bool:
        """True if the first `step` steps of this plan are those of a plan with `segments`."""
        ours, theirs = ([segment for segment in own if segment.first_step < step] for own in (self.segments, segments))
        return ours == theirs

    def after(self, step: int, segments: Sequence[Segment]) -> "BatchPlan":
        """Return this plan for a run that has taken `step` steps as `segments` state.

        Without a ramp, the run takes the other steps with the size of `batch`. A plan with a ramp must begin with these steps.
        """
        if not step or self.begins_with(step, segments):
            return self
        assert not self.batch.ramp, "a ramp that begins otherwise must be refused before"
        taken = dataclasses.replace(self, segments=tuple(segment for segment in segments if segment.first_step < step))
        if taken.segments[-1].size == self.batch.global_batch_size:
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

    def sizes_from(self, step: int) -> list[int]:
        """Sizes of the steps from `step` to the end of the run, in their order, and at least that of `step`."""
        later = [one.size for one in self.segments if step < one.first_step < self.steps]
        return [self.size(step), *later]

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

    def steps_to_read(self, tokens: float) -> int:
        """Return the fewest steps that read at least `tokens`, also beyond the end of the run."""
        position = math.ceil(tokens / self.sequence_length)
        step = self.step_of(position)
        return step + (self.position(step) < position)

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
        taken = [one for one in self.segments if one.first_step < self.steps]
        others = [
            f"; steps {one.first_step + 1:,} to {following.first_step:,} read {one.size}" for one, following in itertools.pairwise(taken)
        ]
        size = taken[-1].size
        accumulation = self.batch.accumulation_steps(data_parallel_size, size=size)
        return (
            f"{size} sequences = micro-batch {self.batch.micro_batch_size} "
            f"x accumulation {accumulation} x data parallel {data_parallel_size}; "
            f"{size * self.sequence_length:,} tokens a step{''.join(others)}"
        )

    def _segment(self, step: int) -> Segment:
        return next(one for one in reversed(self.segments) if one.first_step <= step)
