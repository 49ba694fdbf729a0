"""Batch plan: steps, samples and tokens of a run follow from one plan, and its steps read every position once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampling.batch_plan import BatchPlan, BatchSettings


@given(st.integers(1, 50), st.integers(1, 20))
def test_steps_read_every_position_once_and_in_order(global_batch_size, steps):
    plan = BatchPlan(BatchSettings(global_batch_size), 16, train_steps=steps)
    read = [position for step in range(plan.steps) for position in plan.positions(step)]
    assert read == list(range(plan.position(plan.steps)))


def test_tokens_of_steps_add_up_to_the_tokens_before_a_step():
    plan = BatchPlan(BatchSettings(6), 32, train_steps=5)
    assert [plan.tokens_before(step) for step in range(6)] == [sum(map(plan.tokens, range(step))) for step in range(6)]
    assert plan.tokens_before(5) == 5 * 6 * 32


@pytest.mark.parametrize(("train_tokens", "steps"), [(192.0, 1), (383, 1), (384, 2), (1e6, 5208), (191, 0)])
def test_a_length_in_tokens_is_rounded_down_to_whole_steps(train_tokens, steps):
    assert BatchPlan(BatchSettings(6), 32, train_tokens=train_tokens).steps == steps


def test_description_names_the_parts_of_a_batch():
    plan = BatchPlan(BatchSettings(64, 4), 128, train_steps=1)
    assert plan.describe(4) == "64 sequences = micro-batch 4 x accumulation 4 x data parallel 4; 8,192 tokens a step"
