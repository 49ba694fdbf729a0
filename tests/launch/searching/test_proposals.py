"""Proposals without training: the same for any worker, better than chance, fast, and robust to failed trials."""

import itertools
import math
import statistics
import time

import pytest

from launch.searching.proposals import Known, propose
from launch.searching.space import read_dimension

SPACE = [
    read_dimension("optimizer.learning_rate log 1e-5 1e-1"),
    read_dimension("optimizer.weight_decay log 1e-3 1"),
    read_dimension("batch.global_batch_size log 8 256"),
]


def quadratic(values: dict[str, str]) -> float:
    """Distance from the best point, in decades and octaves."""
    rate, decay, size = (float(value) for value in values.values())
    return (math.log10(rate) + 3) ** 2 + 0.3 * (math.log10(decay) + 1) ** 2 + 0.2 * (math.log2(size) - 5) ** 2


def best_after(method: str, seed: int, trials: int) -> float:
    known: list[Known] = []
    for number in range(trials):
        values = propose(SPACE, method, seed, number, known)
        known.append(Known(values, quadratic(values)))
    return min(one.score for one in known if one.score is not None)


@pytest.mark.parametrize("method", ["random", "qmc", "tpe"])
def test_a_proposal_depends_only_on_the_seed_the_number_and_the_scores(method):
    known = [Known(values := propose(SPACE, "random", 7, number, []), quadratic(values)) for number in range(12)]
    assert propose(SPACE, method, 1, 12, known) == propose(SPACE, method, 1, 12, known)
    assert len({tuple(propose(SPACE, method, 1, number, known).values()) for number in range(12, 18)}) == 6
    assert propose(SPACE, method, 1, 12, known) != propose(SPACE, method, 2, 12, known)


def test_qmc_covers_each_setting_more_evenly_than_random():
    def largest_gap(method: str) -> float:
        shares = sorted(math.log10(float(propose(SPACE, method, 1, number, [])["optimizer.learning_rate"])) for number in range(16))
        return max(after - before for before, after in itertools.pairwise(shares))

    assert largest_gap("qmc") < 0.75 < largest_gap("random")  # 16 points over 4 decades: a point in each quarter of a decade


def test_tpe_in_32_trials_reaches_the_best_of_64_random_ones():
    random = statistics.median(best_after("random", seed, 64) for seed in range(20))
    assert statistics.median(best_after("tpe", seed, 32) for seed in range(20)) <= random


def test_gp_in_16_trials_reaches_the_best_of_64_random_ones():
    random = statistics.median(best_after("random", seed, 64) for seed in range(5))
    assert statistics.median(best_after("gp", seed, 16) for seed in range(3)) <= random


def test_a_proposal_after_500_trials_takes_less_than_half_a_second():
    known = [Known(values := propose(SPACE, "random", 1, number, []), quadratic(values)) for number in range(500)]
    propose(SPACE, "tpe", 1, 500, known)
    start = time.process_time()
    propose(SPACE, "tpe", 1, 500, known)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("method", ["tpe", "gp"])
def test_failed_running_and_paused_trials_are_taken_into_account(method):
    random = [propose(SPACE, "random", 1, number, []) for number in range(15)]
    known = [Known(values, math.inf if number % 3 == 0 else quadratic(values)) for number, values in enumerate(random)]
    running = [Known(propose(SPACE, "random", 2, 0, []), None)]
    paused = [Known(propose(SPACE, "random", 3, 0, []), 0.5, rung=0)] if method == "tpe" else []
    assert set(propose(SPACE, method, 1, 17, [*known, *running, *paused])) == {one.name for one in SPACE}
    assert propose(SPACE, method, 1, 3, [Known(values, math.inf) for values in random[:3]])
