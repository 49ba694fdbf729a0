"""The gradient noise scale: how large a batch can be before its gradient hardly changes from one batch to the next.

McCandlish et al. 2018, arXiv 1812.06162, appendix A.1. Of the K micro-batches of b sequences in a step, let s be the mean of the squared
norms of their gradients, and m the squared norm of the mean of these gradients. Then

    (K m - s) / (K - 1)            estimates |G|^2, the squared norm of the true gradient: the signal;
    b K / (K - 1) (s - m)          estimates tr(Sigma), the variance of one sequence's gradient: the noise;
    mean of tr(Sigma) / mean of |G|^2   is the noise scale, in sequences.

Both estimates are unbiased for every K and b, but their ratio in one step is not, so both are averaged over many steps first.
"""

import dataclasses
import itertools
import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from launch.training.gradient_squares import OTHERS, PARTS, GradientSquares

TOTAL = "total"
_NAMES = (TOTAL, *PARTS)
_BLOCKS_PER_HORIZON = 10
_HORIZONS_KEPT = 4
"""Older blocks have a weight below e^-4."""
_LEAST_BLOCKS = 10
"""Number of blocks from which on there is an interval."""
_RESAMPLES = 2000
_COVERAGE = 0.9
_DRAWN = 0.75
"""Share of the blocks that a resample draws. With all of so few blocks the interval would be too narrow: on simulated gradients it held
the true noise scale in 80 to 86 % of the cases."""


@dataclasses.dataclass
class _Block:
    """Steps in a row, with sums weighted by the sequences of each step."""

    sequences: int = 0
    steps: int = 0
    signal: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(_NAMES))
    variance: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(_NAMES))


class Estimate(NamedTuple):
    """Noise scale in sequences, with the two means that it is the ratio of."""

    signal: float
    """Mean of |G|^2. An estimate can be 0 or less if the noise is much larger than the gradient."""
    variance: float
    """Mean of tr(Sigma), for one sequence."""
    low: float | None
    """Lower end of the 90 % interval of the noise scale; None if too few steps were measured."""
    high: float | None
    """Upper end of that interval; None if too few steps were measured, or if the steps do not show that the gradient is not 0."""

    @property
    def scale(self) -> float | None:
        """The noise scale; None if the estimated signal is not above 0."""
        return self.variance / self.signal if self.signal > 0 else None


class NoiseScale:
    """Running means of the noise scale's two parts, with an interval.

    The weight of a step is its number of sequences, because that many were averaged, and it falls by 1/e for each horizon of sequences
    that follows. So the means cover the same amount of text before and after a boundary of a batch ramp, where K changes.
    """

    def __init__(self, horizon: float, without_tied: bool = False):
        """`horizon`: sequences. `without_tied`: the squares leave out tied embeddings."""
        self._horizon, self._without_tied = horizon, without_tied
        self._blocks: deque[_Block] = deque()

    @property
    def steps(self) -> int:
        """Steps that the means are of."""
        return sum(block.steps for block in self._blocks)

    def add(self, squares: GradientSquares) -> None:
        """Add a step."""
        number, size = squares.num_micro_batches, squares.micro_batch_size
        if not self._blocks or self._blocks[-1].sequences >= self._horizon / _BLOCKS_PER_HORIZON:
            self._blocks.append(_Block())
        block, weight = self._blocks[-1], number * size
        block.sequences += weight
        block.steps += 1
        for row, name in enumerate(_NAMES):
            parts = PARTS if name == TOTAL else (name,)
            alone, together = (sum(values[part] for part in parts) for values in (squares.micro_batch, squares.mean))
            block.signal[row] += weight * (number * together - alone) / (number - 1)
            block.variance[row] += weight * size * number / (number - 1) * (alone - together)
        while sum(kept.sequences for kept in itertools.islice(self._blocks, 1, None)) >= _HORIZONS_KEPT * self._horizon:
            self._blocks.popleft()

    def estimate(self) -> Estimate:
        """Return the estimate for the whole model. At least one step must have been added."""
        sums = self._weighted(TOTAL)
        variance, signal, total = sums.sum(dim=0).tolist()
        return Estimate(signal / total, variance / total, *_interval(sums))

    def scale_of(self, part: str) -> float | None:
        """Return the noise scale of one of PARTS, in sequences; None if its estimated signal is not above 0."""
        variance, signal, _ = self._weighted(part).sum(dim=0).tolist()
        return variance / signal if signal > 0 else None

    def _weighted(self, name: str) -> Tensor:
        """Return the weighted variance, signal and sequences of each block, float64.  [blocks, 3]"""
        row = _NAMES.index(name)
        ends = list(itertools.accumulate(block.sequences for block in self._blocks))
        weights = [math.exp((end - ends[-1]) / self._horizon) for end in ends]
        sums = torch.tensor([[block.variance[row], block.signal[row], block.sequences] for block in self._blocks], dtype=torch.float64)
        return sums * torch.tensor(weights, dtype=torch.float64)[:, None]

    def scalars(self, sequence_length: int, step_tokens: int) -> dict[str, float]:
        """Return the scalars of the noise scale by tag. A noise scale that the steps do not show has none."""
        whole = self.estimate()
        shown = {
            "noise/signal": whole.signal,
            "noise/variance": whole.variance,
            "noise/scale_tokens": whole.scale,
            "noise/low": whole.low,
            "noise/high": whole.high,
            **{f"noise/scale_of_{part}": self.scale_of(part) for part in PARTS if part != OTHERS},
        }
        values = {tag: value for tag, value in shown.items() if value is not None}
        ratios = {tag: value * sequence_length for tag, value in values.items() if tag not in ("noise/signal", "noise/variance")}
        if whole.scale:
            ratios["noise/batch_over_scale"] = step_tokens / ratios["noise/scale_tokens"]
        return values | ratios

    def advice(self, sequence_length: int, step_tokens: int) -> str:
        """Return what the noise scale means for the batch, as one line of the log."""
        if not self._blocks:
            return "Noise scale: no step has been measured."
        whole = self.estimate()
        measured = f"over the last {self.steps:,} steps{', without the tied embedding' if self._without_tied else ''}"
        if whole.low is None:
            return f"Noise scale: no estimate, because the {self.steps:,} measured steps are too few or their noise hides the gradient."
        known = whole.scale if whole.high is not None else None
        low, step = whole.low * sequence_length, f"a step has {step_tokens:,} tokens"
        if known is None:
            text = f"Noise scale: above {_rounded(low)} tokens {measured} (the noise hides the gradient, so there is no upper end)"
            known, fewer, more = whole.low, "at least", "at most"
        else:
            high, fewer, more = (whole.high or 0) * sequence_length, "about", "about"
            text = f"Noise scale: {_rounded(known * sequence_length)} tokens (90 % interval {_rounded(low)} to {_rounded(high)}) {measured}"
        steps, tokens = doubling(known * sequence_length / step_tokens)
        return (
            f"{text}; {step}. A batch of twice the size would need {fewer} {1 - steps:.0%} fewer steps and {more} {tokens - 1:.0%} more "
            "tokens for the same loss. This is a guide, not a guarantee, and the noise scale is a lower bound: measured critical batches "
            "are larger (Merrill et al. 2025, arXiv 2505.23971)."
        )

    def record(self) -> dict:
        """Return the state for a checkpoint's manifest, which `restore` reads."""
        return {"without_tied": self._without_tied, "blocks": [dataclasses.asdict(block) for block in self._blocks]}

    def restore(self, recorded: dict | None) -> bool:
        """Continue with a recorded state of any layout. Returns False, and changes nothing, if there is none of the same parameters."""
        if recorded is None or recorded["without_tied"] != self._without_tied:
            return False
        self._blocks = deque(_Block(**block) for block in recorded["blocks"])
        return True


def doubling(scale: float) -> tuple[float, float]:
    """Return the factors of the steps and of the tokens for the same loss if the batch is doubled.

    `scale`: the noise scale over the batch. From S = S_min (1 + scale) and E = E_min (1 + 1/scale): McCandlish et al. 2018, equation 2.11.
    """
    return (1 + scale / 2) / (1 + scale), (scale + 2) / (scale + 1)


def _interval(sums: Tensor) -> tuple[float | None, float | None]:
    """Return the 90 % interval of the noise scale by a bootstrap of blocks: (variance, signal, sequences) of each, weighted.

    A resample whose signal is not above 0 counts as an infinite noise scale.
    """
    if len(sums) < _LEAST_BLOCKS:
        return None, None
    drawn = round(_DRAWN * len(sums))
    chosen = torch.randint(len(sums), (_RESAMPLES, drawn), generator=torch.Generator().manual_seed(0))
    variance, signal, _ = sums[chosen].sum(dim=1).unbind(dim=1)
    scales = torch.where(signal > 0, variance / signal, math.inf).sort().values
    tail = round((1 - _COVERAGE) / 2 * _RESAMPLES)
    low, high = float(scales[tail]), float(scales[-1 - tail])
    return (low if math.isfinite(low) else None), (high if math.isfinite(high) else None)


def _rounded(tokens: float) -> str:
    """Return a number of tokens with two significant digits."""
    return f"{float(f'{tokens:.2g}'):,.0f}"
