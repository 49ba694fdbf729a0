"""The critical batch from steps against examples, with values by hand (McCandlish et al. 2018)."""

import numpy as np
import pytest

from launch.searching.hyperbola import first_to_reach, fit


def test_points_of_a_hyperbola_give_its_critical_batch():
    sizes = np.array([4.0, 8.0, 16.0, 64.0, 256.0])
    steps = 100 * (1 + 32 / sizes)  # S = S_min (1 + B_crit / B)
    found = fit(steps, steps * sizes)
    assert found is not None
    assert (found.min_steps, found.min_examples, found.critical_batch) == pytest.approx((100, 3200, 32))
    assert found.steps(2 * found.min_examples) == pytest.approx(2 * found.min_steps)


def test_noise_of_two_percent_changes_the_critical_batch_by_a_third():
    sizes, random = 8.0 * 2 ** np.arange(6), np.random.default_rng(1)
    for _ in range(20):
        steps = 100 * (1 + 64 / sizes) * (1 + 0.02 * random.normal(size=6))
        found = fit(steps, steps * sizes)
        assert found is not None and 64 / 1.33 < found.critical_batch < 64 * 1.33


def test_points_without_a_hyperbola_give_none():
    assert fit([100], [800]) is None
    assert fit([100, 100, 100], [800, 1600, 3200]) is None  # a larger batch saves no step
    assert fit([100, 50, 25], [800, 800, 800]) is None  # every batch needs the same examples


def test_the_first_crossing_of_a_loss_lies_between_two_points():
    curve = [(100.0, 5.0), (200.0, 4.0), (300.0, 4.2), (400.0, 3.0)]
    assert first_to_reach(curve, 4.5) == 150
    assert first_to_reach(curve, 4.0) == 200
    assert first_to_reach(curve, 3.6) == pytest.approx(350)
    assert first_to_reach(curve, 2.0) is None
