"""Batch plan: steps, samples and tokens of a run follow from one plan, and its steps read every position once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampling.batch_plan import BatchPlan, BatchSettings, Segment, read_segments


@given(st.integers(1, 50), st.integers(1, 20))
def test_steps_read_every_position_once_and_in_order(global_batch_size, steps):
    plan = BatchPlan(BatchSettings(global_batch_size), 16, train_steps=steps)
    read = [position for step in range(plan.steps) for position in plan.positions(step)]
    assert read == list(range(plan.position(plan.steps)))


def plan_of(changes: list[tuple[int, int]], **length) -> BatchPlan:
    """Return the plan of a run that reads each size for a number of steps, resumed at each change."""
    plan, step = BatchPlan(BatchSettings(changes[0][1]), 16, **length), 0
    for number, size in changes:
        plan = BatchPlan(BatchSettings(size), 16, **length).after(step, plan.segments)
        step += number
    return plan


changes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=5)


@given(changes)
def test_steps_of_changing_sizes_read_every_position_once(changes):
    steps = sum(number for number, _ in changes)
    plan = plan_of(changes, train_steps=steps)
    assert [len(plan.positions(step)) for step in range(steps)] == [size for number, size in changes for _ in range(number)]
    read = [position for step in range(steps) for position in plan.positions(step)]
    assert read == list(range(plan.position(steps)))
    assert [plan.step_of(position) for position in read] == [step for step in range(steps) for _ in plan.positions(step)]
    assert [plan.tokens_before(step) for step in range(steps + 1)] == [sum(map(plan.tokens, range(step))) for step in range(steps + 1)]


@given(changes, st.integers(0, 400))
def test_length_in_tokens_stays_when_the_size_changes(changes, more):
    steps = sum(number for number, _ in changes)
    tokens = plan_of(changes, train_steps=steps).tokens_before(steps) + more
    plan = plan_of(changes, train_tokens=tokens)
    assert plan.tokens_before(plan.steps) <= tokens < plan.tokens_before(plan.steps + 1)


@given(changes, st.integers(1, 30))
def test_plan_read_back_at_a_step_keeps_what_was_read_before(changes, step):
    """Also at a step before the last changes, as when the newest checkpoint is damaged."""
    written = plan_of(changes, train_steps=40)
    read = read_segments(json.loads(json.dumps(written.record())))
    plan = BatchPlan(BatchSettings(7), 16, train_steps=40).after(step, read)
    assert [plan.positions(one) for one in range(step)] == [written.positions(one) for one in range(step)]
    assert plan.positions(step) == range(written.position(step), written.position(step) + 7)


def test_tokens_of_steps_add_up_to_the_tokens_before_a_step():
    plan = BatchPlan(BatchSettings(6), 32, train_steps=5)
    assert [plan.tokens_before(step) for step in range(6)] == [sum(map(plan.tokens, range(step))) for step in range(6)]
    assert plan.tokens_before(5) == 5 * 6 * 32


@pytest.mark.parametrize(("train_tokens", "steps"), [(192.0, 1), (383, 1), (384, 2), (1e6, 5208), (191, 0)])
def test_a_length_in_tokens_is_rounded_down_to_whole_steps(train_tokens, steps):
    assert BatchPlan(BatchSettings(6), 32, train_tokens=train_tokens).steps == steps


def test_description_names_the_parts_of_a_batch():
    plan = BatchPlan(BatchSettings(64, 4), 128, train_steps=20)
    assert (
        plan.after(10, [Segment(0, 0, 8), Segment(4, 32, 32)])
        .describe(4)
        .endswith("; 8,192 tokens a step; steps 1 to 4 read 8; steps 5 to 10 read 32")
    )
    assert plan.describe(4) == "64 sequences = micro-batch 4 x accumulation 4 x data parallel 4; 8,192 tokens a step"
