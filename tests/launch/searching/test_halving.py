"""ASHA without training: which trials go on, what that costs, and what it finds."""

import math

import numpy as np

from launch.searching.halving import promotable, rungs


def test_rungs_multiply_up_to_the_whole_run():
    assert rungs(1e6, 3, 27e6) == [1e6, 3e6, 9e6, 27e6]
    assert rungs(1e6, 4, 10e6) == [1e6, 4e6, 10e6]


def test_the_best_third_of_a_rung_is_promoted_the_highest_rung_first():
    scores = [{0: 3.0, 1: 1.0, 2: 2.0, 3: 9.0, 4: math.inf, 5: 8.0}, {}, {}]
    assert promotable(scores, [set(), set(), set()], 3) == (1, 0)
    assert promotable(scores, [{1}, set(), set()], 3) == (2, 0)
    assert promotable(scores, [{1, 2}, set(), set()], 3) is None
    assert promotable([scores[0], {1: 1.0, 2: 0.5, 7: 2.0}, {}], [{1}, set(), set()], 3) == (2, 1)
    assert promotable([{0: math.inf, 1: math.inf, 2: math.inf}, {}], [set(), set()], 3) is None


def simulate(seed: int, trials: int = 27, workers: int = 4) -> tuple[float, int]:
    """Return the cost of a search with ASHA, in whole runs, and the true rank of the trial that it finds (0: the best).

    A trial's score at a rung is its end plus what its training still gains plus noise, as learning curves have them.
    """
    random = np.random.default_rng(seed)
    ends, gains = random.normal(size=trials), 1 + 0.2 * random.normal(size=trials)
    tokens = rungs(1.0, 3, 27.0)
    scores: list[dict[int, float]] = [{} for _ in tokens]
    promoted: list[set[int]] = [set() for _ in tokens]
    now, cost, begun, running = 0.0, 0.0, 0, []
    while True:
        while len(running) < workers:
            if best := promotable(scores, promoted, 3):
                number, rung = best[0], best[1] + 1
                promoted[best[1]].add(number)
            elif begun < trials:
                number, rung, begun = begun, 0, begun + 1
            else:
                break
            length = tokens[rung] - (tokens[rung - 1] if rung else 0.0)
            running.append((now + length, number, rung))
            cost += length
        if not running:
            break
        running.sort()
        now, number, rung = running.pop(0)
        scores[rung][number] = ends[number] + 3 * gains[number] / tokens[rung] ** 0.5 + 0.05 * random.normal()
    found = min(scores[-1], key=scores[-1].__getitem__)
    return cost / (trials * tokens[-1]), int(np.argsort(np.argsort(ends + 3 * gains / tokens[-1] ** 0.5))[found])


def test_27_trials_cost_a_third_or_less_and_find_one_of_the_three_best():
    results = [simulate(seed) for seed in range(20)]
    assert max(cost for cost, _ in results) <= 1 / 3
    assert sum(rank < 3 for _, rank in results) >= 16, results
