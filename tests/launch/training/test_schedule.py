"""Learning rate schedules, step by step."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampling.batch_plan import BatchPlan, BatchSettings
from launch.ranks.layout import Layout
from launch.training.schedule import learning_rate
from launch.training.settings import RunSettings, share_the_batch
from model.config import ModelConfig

# 110 steps, 10 of them warm-up: the peak is at step 10, the middle of the decay at 60, and the last step, 109, is after 99/100 of it.
RUN = {"plan": BatchPlan(BatchSettings(3), 1, 110), "peak": 1.0, "warmup_steps": 10, "minimum": 0.2}


@pytest.mark.parametrize(
    "kind, rates",
    [
        ("cosine", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.6, 109: 0.2 + 0.4 * (1 + math.cos(math.pi * 0.99)), 110: 0.2}),
        ("linear", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.6, 109: 0.208, 110: 0.2}),
        ("constant", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 1.0, 109: 1.0, 110: 1.0}),
        ("wsd", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 88: 1.0, 99: 0.6, 109: 0.2 + 0.8 / 22, 110: 0.2}),  # falls over the last 22 steps
    ],
)
def test_rates_of_each_kind_match_values_by_hand(kind, rates):
    for step, rate in rates.items():
        assert learning_rate(step, kind=kind, **RUN) == pytest.approx(rate, abs=1e-12), step


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_rate_after_a_change_of_the_batch_follows_the_samples(kind):
    """50 steps of 4, then 25 of 8: each has the rate of the step of 4 at its position, and the end is the minimum."""
    small = BatchPlan(BatchSettings(4), 1, 100)
    changed = BatchPlan(BatchSettings(8), 1, 75).after(50, small.segments)
    for step in range(76):
        expected = learning_rate(changed.position(step) // 4, small, 1.0, kind, 10, 0.2)
        assert learning_rate(step, changed, 1.0, kind, 10, 0.2) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(75, changed, 1.0, kind, 10, 0.2) == 0.2


@pytest.mark.parametrize("length", [{"train_steps": 40}, {"train_tokens": 40 * 8 * 16}], ids=str)
def test_rate_curve_is_the_same_for_all_ranks_and_accumulations(length):
    """Public failures: rates that decay once a rank or once a micro-batch (accelerate #662 and #963, diffusers #3954)."""
    curves = []
    for ranks, micro_batch_size in itertools.product((1, 2, 4), (None, 1, 2)):
        settings = RunSettings(model=ModelConfig(sequence_length=16), batch=BatchSettings(8, micro_batch_size), **length)
        shared = share_the_batch(settings, Layout(ranks))
        plan = shared.batch_plan
        assert shared.batch.accumulation_steps(ranks) == 8 // ranks // (micro_batch_size or 8 // ranks)
        curves.append([learning_rate(step, plan, 1.0, "cosine", shared.warmup_steps) for step in range(plan.steps + 1)])
    assert all(curve == curves[0] for curve in curves) and len(curves[0]) == 41 and curves[0][-1] == 0.0


def test_first_step_has_the_peak_rate_without_warm_up():
    for kind in ("cosine", "linear", "constant", "wsd"):
        assert learning_rate(0, BatchPlan(BatchSettings(3), 1, 10), 3e-4, kind) == 3e-4


runs = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["cosine", "linear", "constant", "wsd"]),
        "steps": st.integers(2, 400),
        "peak": st.floats(1e-6, 1.0),
        "decay_fraction": st.floats(0.01, 1.0),
    }
).flatmap(
    lambda run: st.fixed_dictionaries(
        {name: st.just(value) for name, value in run.items()}
        | {"warmup_steps": st.integers(0, run["steps"] - 1), "minimum": st.floats(0.0, run["peak"])}
    )
)


@given(runs)
def test_rate_rises_then_falls_within_its_bounds_without_jumps(run):
    steps, warmup, peak, minimum = run["steps"], run["warmup_steps"], run["peak"], run["minimum"]
    plan = BatchPlan(BatchSettings(3), 1, steps)
    schedule = {name: value for name, value in run.items() if name != "steps"}
    rates = [learning_rate(step, plan, **schedule) for step in range(steps + 1)]
    tiny = 1e-12 * peak
    assert rates[0] > 0
    assert all(later > earlier for earlier, later in itertools.pairwise(rates[: warmup + 1])), "warm-up rises"
    assert rates[warmup] == pytest.approx(peak)
    assert all(minimum - tiny <= rate <= peak + tiny for rate in rates[warmup:])
    assert all(later <= earlier + tiny for earlier, later in itertools.pairwise(rates[warmup:])), "then it never rises"
    falling = min(steps - warmup, max(1, round(run["decay_fraction"] * steps))) if run["kind"] == "wsd" else steps - warmup
    steepest = max(peak / (warmup + 1), math.pi / 2 * (peak - minimum) / falling)  # the cosine's slope in its middle
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= steepest + tiny
    if run["kind"] == "wsd":
        assert all(rate == pytest.approx(peak) for rate in rates[warmup : steps - round(run["decay_fraction"] * steps)])
    if run["kind"] in ("cosine", "linear"):
        assert rates[-1] == pytest.approx(minimum, abs=tiny)
