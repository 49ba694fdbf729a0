"""Steps against examples: how many steps each batch size needs for the same loss, and the critical batch that follows.

McCandlish et al. 2018, arXiv 1812.06162, section 2.4: runs that reach the same loss in S steps and E examples lie on the hyperbola
1 = S_min / S + E_min / E. The critical batch E_min / S_min needs twice as many steps as an infinite batch, and twice as many examples as a
small one.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Hyperbola:
    """The fewest steps and the fewest examples in which a loss can be reached."""

    min_steps: float
    min_examples: float

    @property
    def critical_batch(self) -> float:
        """Examples per step at which twice the fewest steps and twice the fewest examples are needed."""
        return self.min_examples / self.min_steps

    def steps(self, examples: float) -> float:
        """Return the steps of a run that reads this number of examples, more than the fewest."""
        return self.min_steps / (1 - self.min_examples / examples)


def fit(steps: Sequence[float], examples: Sequence[float]) -> Hyperbola | None:
    """Return the hyperbola with the least squared relative errors; None if the points lie on none, or are fewer than 2."""
    if len(steps) < 2:
        return None
    measured = np.asarray(steps, dtype=float)
    matrix = np.stack([measured, measured / np.asarray(examples, dtype=float)], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(measured)))  # 1 / S = intercept + slope / E
    if intercept <= 0 or slope >= 0:
        return None
    return Hyperbola(1 / intercept, -slope / intercept)


def first_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return where a curve of (tokens, loss) first reaches a loss, between two of its points; None if it never does."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    return None
