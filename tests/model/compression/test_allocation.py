"""Tests of the allocation of zeros and bits over blocks, compared with all other allocations."""

import itertools
import random

import pytest
import torch

from model.compression.allocation import choose, outlier_ratio, owl_sparsities
from model.compression.statistics import InputStatistics


@pytest.mark.parametrize("seed", range(8))
def test_choice_is_the_best_of_all_that_fit_the_budget(seed):
    draw = random.Random(seed)
    bits = (3, 4, 8)
    losses = [{b: draw.random() for b in bits} for _ in range(5)]
    sizes = [{b: b * draw.choice((10, 10, 13)) for b in bits} for _ in range(5)]
    budget = draw.randint(sum(options[3] for options in sizes), sum(options[8] for options in sizes))
    total = lambda table, chosen: sum(options[b] for options, b in zip(table, chosen, strict=True))  # noqa: E731
    best = min((c for c in itertools.product(bits, repeat=5) if total(sizes, c) <= budget), key=lambda c: total(losses, c))
    chosen = choose(losses, sizes, budget)
    assert total(sizes, chosen) <= budget
    assert total(losses, chosen) == pytest.approx(total(losses, best))


def test_choice_for_many_blocks_beats_one_number_of_bits_for_all():
    draw = random.Random(0)
    losses = [{4: draw.random(), 8: draw.random() / 10, 16: 0.0} for _ in range(80)]
    sizes = [{4: 100, 8: 200, 16: 400} for _ in range(80)]
    chosen = choose(losses, sizes, 80 * 200)
    assert sum(options[b] for options, b in zip(losses, chosen, strict=True)) < sum(options[8] for options in losses)
    assert choose(losses, sizes, 80 * 400) == [16] * 80


def test_too_small_a_budget_is_refused_with_the_smallest_possible_size():
    with pytest.raises(ValueError, match="no choice of bits fits into 79 bytes; the smallest takes 80"):
        choose([{4: 1.0, 8: 0.0}] * 2, [{4: 40, 8: 80}] * 2, 79)


def test_owl_keeps_more_of_outlier_blocks_and_the_total_sparsity():
    ratios, sizes = [0.01, 0.05, 0.03], [100, 300, 100]
    sparsities = owl_sparsities(ratios, sizes, 0.7, bound=0.1)
    assert sum(s * size for s, size in zip(sparsities, sizes, strict=True)) / 500 == pytest.approx(0.7)
    assert sparsities[0] - sparsities[1] == pytest.approx(0.2)
    assert sparsities[2] == pytest.approx((sparsities[0] + sparsities[1]) / 2)
    assert owl_sparsities([0.1, 0.1], [1, 2], 0.5) == [0.5, 0.5]
    assert min(owl_sparsities([0.0, 1.0], [9, 1], 0.05)) >= 0


def test_outlier_ratio_by_hand():
    ones = torch.eye(4)
    statistics = InputStatistics(4, ones, ones[0], ones[0])
    weights = [torch.full((2, 4), 1.0), torch.tensor([[1.0, -40.0]])]
    large_inputs = InputStatistics(2, torch.diag(torch.tensor([1.0, 4.0])), ones[0, :2], ones[0, :2])
    assert outlier_ratio(weights, [statistics, large_inputs], multiple=5) == 1 / 10  # 80 is above 5 times (9 + 80) / 10
