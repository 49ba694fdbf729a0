"""Which trial goes on to which rung: asynchronous successive halving (ASHA, Li et al. 2018, arXiv 1810.05934, algorithm 2)."""

import math
from collections.abc import Collection, Mapping, Sequence


def rungs(first_tokens: float, factor: int, tokens: float) -> list[float]:
    """Return the tokens of each rung of a run of `tokens`: the first, each further one `factor` times as many, and last the whole run."""
    found: list[float] = []
    while first_tokens * factor ** len(found) < tokens:
        found.append(first_tokens * factor ** len(found))
    return [*found, tokens]


def promotable(scores: Sequence[Mapping[int, float]], promoted: Sequence[Collection[int]], factor: int) -> tuple[int, int] | None:
    """Return the next trial to promote and the index of the rung that it leaves; None if there is none.

    `scores` has, for each rung, the scores of the trials that reached it, lower is better, infinite for a failed one. `promoted` has, for
    each rung, the trials that have left it. A trial is promoted if it is among the best 1 / `factor` of its rung. The highest rung comes
    first, and in a rung the best trial.
    """
    for rung in range(len(scores) - 2, -1, -1):
        ranked = sorted(scores[rung], key=lambda number: (scores[rung][number], number))
        for number in ranked[: len(ranked) // factor]:
            if number not in promoted[rung] and math.isfinite(scores[rung][number]):
                return number, rung
    return None
