"""Days, energy, price and checkpoints by hand."""

import pytest

from launch.training.planning.cost import checkpoint_interval, run_cost


def test_cost_of_a_day_on_ten_devices():
    cost = run_cost(86400, 10, watts=700, power_share=0.5, pue=1.2, price=2.5)
    assert (cost.days, cost.gpu_hours, cost.price) == (1, 240, 600)
    assert cost.kilowatt_hours == pytest.approx(240 * 0.7 * 0.5 * 1.2)
    assert run_cost(86400, 10, 700, 0.5, 1.2, None).price is None


def test_checkpoint_interval_is_youngs():
    """16,384 GPUs fail every 54 x 24 / 419 = 3.09 hours; with 60 seconds to write, sqrt(2 x 60 x 11,135) = 1,156 s."""
    assert checkpoint_interval(60, 16384) == pytest.approx(1156, abs=1)
    assert checkpoint_interval(240, 16384) == pytest.approx(2 * 1156, abs=2)
