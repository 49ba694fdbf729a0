"""Batch ramps: what is read, the rates, refusals, and runs that equal one plain process and continue bit for bit."""

import dataclasses
import itertools
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from data.command_line import UserError
from data.sampling.batch_plan import BatchPlan, BatchSettings, Segment, segments_from
from data.sampling.order import rank_share
from launch.checkpoints import checkpoint
from launch.checkpoints.opening import AveragedState
from launch.ranks.layout import Layout
from launch.training import deepspeed_config, run_folder
from launch.training.data import open_data
from launch.training.loop import rate_of_step
from launch.training.plan import plan
from launch.training.recipe import read_run_settings
from launch.training.schedule import learning_rate
from launch.training.settings import RunSettings, share_the_batch
from model.config import ModelConfig
from tests.launch.training.test_resume import assert_same_run, curves, run, statuses, train_plainly

DECAYING = ("cosine", "linear", "wsd")
SMALL = ["--batch.global_batch_size=8", "--optimizer.name=adamw", "--optimizer.learning_rate=5e-3"]
LONG = [*SMALL, "--train_tokens=3.072e6", "--schedule.warmup_steps=60"]
"""1,500 steps of 8 samples of 256 tokens."""

ramps = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=4).map(
    lambda steps: [(0, 3), *((sum(length for length, _ in steps[: number + 1]), steps[number][1]) for number in range(len(steps)))]
)


def plan_of(ramp: list[tuple[int, int]], tokens: int) -> BatchPlan:
    """Return the plan of a ramp of thresholds in samples, of two tokens each."""
    words = " ".join(f"{2 * position}:{size * 4}" for position, size in ramp)
    return BatchPlan(BatchSettings(ramp[-1][1] * 4, 1, words), 2, train_tokens=tokens)


@limits(deadline=None, max_examples=40)
@given(ramps, st.integers(400, 900), st.integers(1, 9), st.data())
def test_ramp_reads_every_position_once_with_any_ranks_and_kills(ramp, tokens, interval, data):
    """Each start has other ranks and another micro-batch size, and is killed before any step; steps after a checkpoint are taken again."""
    batch = plan_of(ramp, tokens).batch
    settings = RunSettings(model=ModelConfig(sequence_length=2), batch=batch, train_tokens=tokens)
    read: dict[int, list[int]] = {}
    manifest = {"step": 0, "batch_plan": settings.batch_plan.record()}
    while (first := manifest["step"]) < settings.batch_plan.steps:
        plan = run_folder.plan_after(settings, json.loads(json.dumps(manifest)))
        ranks = data.draw(st.sampled_from([ranks for ranks in (1, 2, 3, 4) if all(size % ranks == 0 for size in plan.sizes_from(first))]))
        shared = share_the_batch(
            dataclasses.replace(settings, batch=dataclasses.replace(batch, micro_batch_size=None)), Layout(ranks), plan, first
        )
        largest = shared.batch.micro_batch_size
        size = data.draw(st.sampled_from([size for size in range(1, largest + 1) if largest % size == 0]))
        end = data.draw(st.integers(first + 1, plan.steps))
        for step in range(first, end):
            positions = np.array(plan.positions(step))
            read[step] = [position for rank in range(ranks) for position in rank_share(positions, size, rank, ranks).ravel().tolist()]
            assert {plan.step_of(position) for position in read[step]} == {step}
        saved = end if end == plan.steps else max(first, end // interval * interval)
        manifest = {"step": saved, "batch_plan": plan.record()}
    thresholds = [max(number for number, (position, _) in enumerate(ramp) if position <= min(read[step])) for step in read]
    assert [len(positions) for positions in read.values()] == [4 * ramp[number][1] for number in thresholds]
    assert sorted(itertools.chain.from_iterable(read.values())) == list(range(plan.position(plan.steps)))
    assert tokens - 2 * 4 * ramp[-1][1] < plan.tokens_before(plan.steps) <= tokens


@limits(deadline=None, max_examples=40)
@given(ramps, st.integers(400, 900), st.sampled_from(DECAYING), st.integers(0, 5), st.floats(0.05, 1))
def test_rate_reaches_the_minimum_at_the_end_of_any_ramp(ramp, tokens, kind, warmup, fraction):
    plan = plan_of(ramp, tokens)
    rates = [
        learning_rate(step, plan, plan.batch.rate_factor(plan.size(step)), kind, min(warmup, plan.steps - 1), 0.01, fraction)
        for step in range(plan.steps + 1)
    ]
    assert rates[-1] == 0.01
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("kind", DECAYING)
def test_a_smaller_batch_has_the_schedule_of_the_last_one_times_its_factor(kind):
    words = ["--batch.ramp=0:8 524288:128", "--batch.global_batch_size=128", "--train_tokens=3.2768e6", "--schedule.warmup_steps=0"]
    settings = read_run_settings([*words, f"--schedule.kind={kind}", "--optimizer.learning_rate=1e-3", "--schedule.min_learning_rate=5e-4"])
    plan = settings.batch_plan
    plain = read_run_settings(["--train_tokens=3.2768e6", "--batch.global_batch_size=8"]).batch_plan
    for step in range(plan.steps):
        of_the_schedule = learning_rate(plan.position(step) // 8, plain, 1e-3, kind, 0, 5e-4)
        assert rate_of_step(settings, plan, step) == pytest.approx(of_the_schedule * math.sqrt(plan.size(step) / 128), rel=1e-12)


@pytest.mark.parametrize(("rule", "power"), [("sqrt", 0.5), ("linear", 1), ("none", 0)])
def test_rate_and_beta2_follow_the_size_of_the_batch(rule, power):
    batch = BatchSettings(16, None, "0:4 1K:16", rule, "tokens")
    assert batch.rate_factor(4) == 0.25**power
    assert batch.rate_factor(16) == 1.0
    assert batch.beta2(4, 0.95) == pytest.approx(0.95**0.25)
    assert batch.beta2(4, 0.95) ** 4 == pytest.approx(batch.beta2(16, 0.95)), "the same half-life in tokens"
    assert BatchSettings(16).rate_factor(4) == 1.0, "without a ramp"


@pytest.mark.parametrize("kind", DECAYING)
def test_seesaw_doubles_where_the_rate_halves_and_keeps_the_noise(kind):
    words = [*LONG, "--schedule.kind", kind]
    plain, seesaw = read_run_settings(words), read_run_settings([*words, "--batch.ramp", "seesaw"])
    plan, before = seesaw.batch_plan, plain.batch_plan
    assert [one.size for one in plan.segments] == [8 << n for n in range(5)]
    for number, segment in enumerate(plan.segments[1:], 1):
        step = before.step_of(segment.first_position)
        rates = [learning_rate(one, before, 1.0, kind, 60) for one in (step - 16, step)]
        assert rates[0] > 2.0**-number >= rates[1] - 1e-9, "at most one step of the largest size later"
    for step in range(0, plan.steps, 7):
        size = plan.size(step)
        rate = learning_rate(step, plan, seesaw.batch.rate_factor(size), kind, 60)
        same_place = learning_rate(plan.position(step) // 8, before, 1.0, kind, 60)
        assert rate / (size / 8) ** 0.5 == pytest.approx(same_place, abs=0.02), "the rate over the root of the size"
    if kind == "cosine":
        assert plan.steps <= 0.65 * before.steps
    assert share_the_batch(seesaw, Layout(1)).batch_plan.segments == plan.segments, "with the default warm-up written out"


def test_seesaw_ends_at_the_size_that_is_given():
    settings = read_run_settings([*LONG, "--schedule.kind", "cosine", "--batch.ramp", "seesaw:32"])
    assert [one.size for one in settings.batch_plan.segments] == [8, 16, 32]


@pytest.mark.parametrize("kind", DECAYING)
def test_seesaw_of_small_steps_grows_where_the_rate_has_fallen_as_much(kind):
    words = [*LONG, "--schedule.kind", kind]
    plan, before = (read_run_settings([*words, *more]).batch_plan for more in (["--batch.ramp", "seesaw:32:4"], []))
    assert [one.size for one in plan.segments] == [8, 12, 16, 20, 24, 28, 32]
    for segment in plan.segments[1:]:
        step = before.step_of(segment.first_position)
        late, at = (learning_rate(one, before, 1.0, kind, 60) for one in (step - 4, step))
        assert late > 8 / segment.size >= at - 1e-9, "at most one step of the largest size later"
    if kind != "wsd":
        assert (
            plan.steps
            < 0.64 * before.steps
            < 0.675 * before.steps
            < read_run_settings([*words, "--batch.ramp", "seesaw:32"]).batch_plan.steps
        )


def test_sizes_without_a_step_are_left_out():
    assert segments_from([(0, 8), (8, 16), (9, 4), (30, 2)]) == (Segment(0, 0, 8), Segment(1, 8, 16), Segment(2, 24, 4), Segment(4, 32, 2))


REFUSALS = {
    "thresholds out of order": (["--batch.ramp=0:4 2K:6 1K:8"], "batch.ramp 0:4 2K:6 1K:8 (command line): each threshold must be above"),
    "first not 0": (["--batch.ramp=1K:8"], "batch.ramp 1K:8 (command line): the first threshold must be 0, the beginning of the run."),
    "not a number": (["--batch.ramp=0:4 1K:x"], '"1K:x" is not THRESHOLD:SIZE, such as 20M:128, and not seesaw.'),
    "empty": (["--batch.ramp="], '"" is not THRESHOLD:SIZE'),
    "threshold beyond all runs": (["--batch.ramp=0:4 " + "9" * 400 + "T:8"], "each threshold must be below 1e18 tokens."),
    "size 0": (["--batch.ramp=0:0 1K:8"], "each size must be above 0"),
    "other last size": (["--batch.ramp=0:4 1K:16"], "Give --batch.global_batch_size 16."),
    "largest size below two": (["--batch.ramp=seesaw:12"], "the largest size must be a number of at least 16"),
    "seesaw of three numbers": (["--batch.ramp=seesaw:16:8:4"], "write seesaw, seesaw:SIZE or seesaw:SIZE:STEP."),
    "step of seesaw": (["--batch.ramp=seesaw:64:3"], "STEP must be a number from 4 (which gives at most 16 sizes) to 56."),
    "seesaw beyond a doubling": (["--batch.ramp=seesaw:33"], "doublings of 8 do not reach 33. Nearest: 32 or 64."),
    "seesaw beyond a step": (["--batch.ramp=seesaw:30:4"], "steps of 4 from 8 do not reach 30. Nearest: 28 or 32."),
    "small seesaw": (["--batch.ramp=seesaw:8:4"], "the largest size must be a number of at least 9, above batch.global_batch_size."),
    "constant": (
        ["--batch.ramp=seesaw", "--schedule.kind=constant"],
        "batch.ramp seesaw (command line) needs a schedule whose rate falls; that of schedule.kind constant (command line) never falls.",
    ),
    "steps": (["--batch.ramp=seesaw", "--train_steps=99"], "needs train_tokens in place of train_steps 99 (command line)"),
    "rule of seesaw": (["--batch.ramp=seesaw", "--batch.rate_rule=linear"], "batch.rate_rule linear (command line) does not apply to"),
    "rule without ramp": (["--batch.beta2_rule=tokens"], "batch.beta2_rule tokens (command line) has no effect without batch.ramp."),
    "both warm-ups": (["--schedule.warmup_steps=15", "--schedule.warmup_tokens=9999"], "both set the warm-up; keep one"),
    "long warm-up": (["--schedule.warmup_tokens=1e7"], "schedule.warmup_tokens 1e+07 (command line) is too long: it must be at most "),
    "warm-up into the last step": (
        ["--train_steps=20", "--schedule.warmup_tokens=40000"],
        "it must be at most 38,912, the tokens of all steps but the last of train_steps 20 (command line).",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_ramp_is_refused_with_one_sentence(name):
    words, message = REFUSALS[name]
    length = [] if any("train_steps" in word for word in words) else ["--train_tokens=3.072e6"]
    with pytest.raises(UserError) as refused:
        read_run_settings([*SMALL, *words, *length])
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_sizes_to_come_must_be_shared_and_passed_ones_are_not_checked():
    settings = read_run_settings([*SMALL, "--batch.ramp=0:6 4K:8", "--batch.micro_batch_size=2"])
    with pytest.raises(UserError, match=r"batch\.ramp 0:6 4K:8 \(command line\): size 6 is not a multiple of .* = 4\.\nNearest: 4 or 8"):
        share_the_batch(settings, Layout(2))
    assert share_the_batch(settings, Layout(2), settings.batch_plan, 3).batch.micro_batch_size == 2
    open_size = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, micro_batch_size=None))
    assert share_the_batch(open_size, Layout(2)).batch.micro_batch_size == 1, "3 and 4 sequences of each rank"
    resumed = share_the_batch(open_size, Layout(2), open_size.batch_plan, 3).batch.micro_batch_size
    assert resumed == 1, "another size would change the last bits of the run"
    assert share_the_batch(open_size, Layout(4), open_size.batch_plan, 3).batch.micro_batch_size == 2, "4 ranks cannot share the passed 6"


def test_refused_size_of_a_seesaw_names_the_part_to_change():
    sizes = BatchSettings(8, 4, "seesaw:32:6")
    with pytest.raises(UserError, match=r"^batch\.ramp seesaw:32:6: STEP 6 is not a multiple of .* = 8\.\nNearest: 8\.$"):
        sizes.accumulation_steps(2, size=14)
    with pytest.raises(UserError, match=r"^batch\.ramp seesaw:32:6: size 8 is not a multiple of .* = 12\.\nNearest: 12\.$"):
        sizes.accumulation_steps(3)


def test_noise_scale_needs_two_micro_batches_in_steps_to_come():
    words = ["--batch.ramp=0:4 4K:12 8K:16", "--batch.global_batch_size=16", "--log.noise_scale=true", "--batch.micro_batch_size=4"]
    settings = read_run_settings(words)
    with pytest.raises(UserError, match=r"a step of 4 sequences has one\. Use --batch\.micro_batch_size 2\.$"):
        share_the_batch(settings, Layout(1))
    assert share_the_batch(settings, Layout(1), settings.batch_plan, settings.batch_plan.segments[1].first_step).batch.micro_batch_size == 4
    shared = dataclasses.replace(settings, batch=BatchSettings(3, 3, "0:9 4K:6 8K:3"))
    with pytest.raises(UserError, match=r"a step of 3 sequences has one\. Use --batch\.micro_batch_size 1\.$"):
        share_the_batch(shared, Layout(1))
    with pytest.raises(UserError, match=r"a step of 1 sequence has one\. Use sizes of 2 or more in --batch\.ramp\.$"):
        share_the_batch(dataclasses.replace(settings, batch=BatchSettings(4, 1, "0:1 4K:4")), Layout(1))


def test_plan_of_a_resumed_ramp_does_not_check_sizes_that_have_passed():
    words = [*SMALL, "--batch.ramp=seesaw:16", "--batch.global_batch_size=2", "--batch.micro_batch_size=2", "--train_tokens=3e6"]
    settings, layout = read_run_settings([*words, "--schedule.kind=cosine"]), Layout(8, 2)
    batches = settings.batch_plan
    with pytest.raises(UserError, match=r"batch\.ramp seesaw:16 \(command line\): size 2 is not a multiple of .* = 8\."):
        share_the_batch(settings, layout)
    settings = share_the_batch(settings, layout, batches, batches.segments[2].first_step)
    merged = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1}
    merged["pipeline"] = {"stages": 2, "partition": "parameters", "schedule": "1f1b"}
    shown = plan(settings, merged, layout, "cpu", batches, None)
    assert "2 stages by parameters, 1f1b, 1 micro-batches; bubble 50.0% of a step" in shown
    assert "16 sequences = micro-batch 2 x accumulation 2 x data parallel 4; 4,096 tokens a step; steps 1 to " in shown
    assert f"; {batches.steps:,} steps, where a batch of 2 would need 5,85" in shown, "at most 16 samples less than 3e6 tokens"
    assert "rate: 0.005 at 2 sequences, cosine" in shown and "advice: batch 512 to 4,096 tokens (published: " in shown
    assert "note: only" not in shown
    assert "decay timescale 0.34 of the run" in shown, "of the batch of 2, at which the rate is 0.005"


def test_plan_notes_a_seesaw_whose_last_size_has_few_steps():
    def shown(ramp: str) -> str:
        settings = read_run_settings([*LONG, "--schedule.kind=cosine", f"--batch.ramp={ramp}"])
        merged = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1}
        return plan(share_the_batch(settings, Layout(1)), merged, Layout(1), "cpu", settings.batch_plan, None)

    assert "    note: only 14 steps read 128 sequences, too few for the optimizer's running means to settle; " in shown("seesaw")
    assert "; end with a smaller SIZE; batch.ramp seesaw:SIZE:STEP then saves as many steps\n" in shown("seesaw")
    assert "note: only" not in shown("seesaw:32:4")


def test_plan_warns_of_a_seesaw_that_does_not_reach_its_size():
    def shown(ramp: str, minimum: float) -> str:
        words = [*LONG, "--schedule.kind=linear", f"--batch.ramp={ramp}", f"--schedule.min_learning_rate={minimum}"]
        settings = read_run_settings(words)
        merged = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1}
        return plan(share_the_batch(settings, Layout(1)), merged, Layout(1), "cpu", settings.batch_plan, None)

    peak = read_run_settings(LONG).optimizer.learning_rate
    for ramp in ("seesaw", "seesaw:32", "seesaw:32:4"):
        no_effect = f" warning: batch.ramp {ramp} has no effect: the schedule's learning rate falls too little before the run ends\n"
        assert no_effect in shown(ramp, peak)
        assert "note: only" not in shown(ramp, peak)
    ends = "warning: the batch ends with 16 sequences and not with 64, because the schedule's learning rate falls too little\n"
    assert ends in shown("seesaw:64", 0.3 * peak)
    assert "falls too little" not in shown("seesaw", 0.3 * peak) + shown("seesaw:16", 0.3 * peak)


def test_plan_names_a_size_that_no_step_reads():
    def shown(ramp: str) -> str:
        settings = read_run_settings([*SMALL, "--batch.global_batch_size=32", "--train_tokens=3e6", f"--batch.ramp={ramp}"])
        merged = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1}
        return plan(share_the_batch(settings, Layout(1)), merged, Layout(1), "cpu", settings.batch_plan, None)

    note = "note: no step reads 8 sequences, because a step goes beyond the next threshold of batch.ramp\n"
    assert note in shown("0:4 100:8 110:16 100K:32")
    assert "no step reads" not in shown("0:4 2K:8 100K:32")


def test_dualpipev_needs_its_micro_batches_at_the_smallest_size():
    settings = read_run_settings([*SMALL, "--batch.ramp=0:2 4K:8", "--batch.micro_batch_size=1"])
    written = {"zero_optimization": {"stage": 1}, "pipeline": {"stages": 2, "schedule": "dualpipev"}}
    with pytest.raises(UserError, match=r"needs at least 4 micro-batches .* the smallest size of batch\.ramp 0:2 4K:8, 2, give 2"):
        deepspeed_config.complete(written, "x.json", settings, Layout(2, 2), "cpu", size=2)
    assert deepspeed_config.complete(written, "x.json", settings, Layout(2, 2), "cpu", size=4)["gradient_accumulation_steps"] == 4


def rates_of(arguments: list[str]) -> list[float]:
    """Return the rates of a linear schedule by hand: straight to 0 over the positions, times the root of the ratio of the sizes."""
    settings = read_run_settings(arguments)
    plan = settings.batch_plan
    total = sum(plan.size(step) for step in range(plan.steps))
    before = itertools.accumulate((plan.size(step) for step in range(plan.steps)), initial=0)
    return [
        settings.optimizer.learning_rate * (plan.size(step) / 16) ** 0.5 * (1 - position / total)
        for step, position in zip(range(plan.steps), before, strict=False)
    ]


# Three steps of 8: on two ranks 6 micro-batches, after which a count that goes on would end the first step of 4 micro-batches too early.
RAMP = ["--batch.ramp", "0:8 700:16", "--batch.global_batch_size", "16", "--schedule.kind", "linear", "--schedule.warmup_steps", "0"]
RAMP += ["--precision", "float32", "--train_steps", "8", "--checkpoint.interval", "1", "--log.sample_interval", "0"]
SIZES = [8] * 3 + [16] * 5


def test_ramp_on_two_ranks_equals_one_plain_process(tiny, tmp_path):
    # With a larger epsilon, gradients of 1e-8 (of tokens that hardly occur) do not turn rounding into steps of another size.
    arguments = [*tiny, *RAMP, "--optimizer.epsilon", "1e-6", "--checkpoint.interval", "0"]
    output = run(2, [*arguments, "--deepspeed", "ds_configs/zero2.json"])
    assert "From step 4 on a step reads 16 samples in place of 8." in output
    assert "ramp: 0:8 700:16 gives steps of 8 (rate x 0.707), then 16 (rate x 1)\n" in output
    assert "untested optimizer" not in output, "a warning of DeepSpeed"
    losses, model = train_plainly(arguments, SIZES, rates_of(arguments))
    found = curves(tmp_path / "run")
    assert list(found["loss/train"].values()) == pytest.approx(losses, abs=1e-6)
    newest = checkpoint.published(tmp_path / "run" / "checkpoints")[0]
    found_weights = AveragedState([newest])
    differences = {name: float((found_weights[name] - model.get_parameter(name).detach()).abs().max()) for name in found_weights}
    assert max(differences.values()) < 1e-6, differences
    assert list(found["optimization/learning_rate"].values()) == pytest.approx(rates_of(arguments))


def test_ramp_resumes_before_at_and_after_a_boundary_bit_for_bit(tiny, tmp_path):
    arguments = [*tiny, *RAMP, "--batch.beta2_rule", "tokens"]
    whole = tmp_path / "whole"
    run(1, [*arguments, "--output", str(whole)])
    for step in (2, 3, 4):
        stopped = tmp_path / f"stopped{step}"
        shutil.copytree(whole, stopped)
        remove_checkpoints_after(step, stopped)
        assert f"Resuming from step {step} of 8" in run(1, [*arguments, "--output", str(stopped)])
        assert_same_run(whole, stopped)
    stopped.rename(tmp_path / "other")
    remove_checkpoints_after(2, tmp_path / "other")
    assert "Resuming from step 2 of 8" in run(1, [*arguments, "--output", str(tmp_path / "other"), "--batch.micro_batch_size", "8"])
    assert_equal_run(whole, tmp_path / "other")
    refuses_other_ramps([*arguments, "--output", str(whole), "--train_steps", "20"])


def remove_checkpoints_after(step: int, output: Path) -> None:
    for folder in checkpoint.published(output / "checkpoints"):
        if checkpoint.step_of(folder) > step:
            shutil.rmtree(folder)


def assert_equal_run(one: Path, other: Path) -> None:
    """Check that two runs have the same steps, and the same losses, norms, rates and last weights to rounding."""
    ours, theirs = curves(one), curves(other)
    for name, values in ours.items():
        assert theirs[name] == pytest.approx(values, rel=1e-5), name
    first, second = (AveragedState(checkpoint.published(folder / "checkpoints")[:1]) for folder in (one, other))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5


@pytest.mark.slow
def test_killed_ramp_reads_every_position_once_on_changing_ranks(tiny, tmp_path):
    """Public failures: data read twice after a resume within accumulation (gpt-neox #308); another micro-batch size that changes the steps
    (transformers #43708); ranks that cannot share a size that has passed (OLMo-core #332)."""
    ramp = ["--batch.ramp", "0:4 1K:8 2K:16", "--batch.global_batch_size", "16", "--train_steps", "16", "--checkpoint.interval", "3"]
    arguments = [*tiny, *ramp, "--precision", "float32", "--optimizer.epsilon", "1e-6", "--log.sample_interval", "0"]
    whole, stopped, record = tmp_path / "whole", tmp_path / "stopped", tmp_path / "samples.jsonl"
    run(1, [*arguments, "--batch.micro_batch_size", "4", "--output", str(whole)])
    starts = (  # ranks, micro-batch size, JSON, step before which rank 0 is killed, counted from that start
        (1, 2, "zero1", 5),
        (2, 1, "zero2", 7),
        (4, 2, "zero3", 4),  # 4 x 2 = 8 sequences: 4, the first size, could not be shared
        (1, 4, "zero1", None),
    )
    for ranks, size, json_name, kill in starts:
        words = [*arguments, "--output", str(stopped), "--batch.micro_batch_size", str(size), "--deepspeed", f"ds_configs/{json_name}.json"]
        more = {"RECORD": str(record)} | ({"FAULT": f"0:step:{kill}"} if kill else {})
        ended = statuses(ranks, words, **more)
        assert (-signal.SIGKILL in ended) if kill else (ended == [0]), ended
        with record.open("a") as lines:
            lines.write("{}\n")
    read: dict[int, list[list[int]]] = {}
    num_reads, start_of = 0, {}
    for start, lines in enumerate(record.read_text().split("{}\n")):
        for entry in map(json.loads, lines.splitlines()):
            step, num_reads = entry["step"], num_reads + len(entry["samples"])
            read[step] = (read[step] if start_of.get(step) == start else []) + entry["samples"]
            start_of[step] = start
    assert [len(read[step]) for step in range(16)] == [4] * 8 + [8] * 4 + [16] * 4
    assert set(start_of.values()) == {0, 1, 2, 3} and num_reads > 128, "each start has taken steps that stayed, and some were taken again"
    blend = open_data(read_run_settings(arguments)).sampling.blend
    expected = np.stack(blend.draw(np.arange(128)), axis=-1).tolist()
    assert sorted(sample for samples in read.values() for sample in samples) == sorted(expected)
    assert_equal_run(whole, stopped)


def refuses_other_ramps(arguments: list[str]) -> None:
    """Check which ramps a run of 3 steps of 8 and 5 of 16 samples may resume with: 3,328 tokens."""

    def inspect(ramp: str, size: int, *more: str) -> run_folder.Start:
        words = [*arguments, "--allow_changes", "--batch.ramp", ramp, "--batch.global_batch_size", str(size), *more]
        settings = read_run_settings(words)
        plan, step = run_folder.find_plan(settings)
        settings = share_the_batch(settings, Layout(1), plan, step)
        record = json.loads((Path(settings.output) / "run.json").read_text())
        return run_folder.inspect(settings, record["data_fingerprint"], record["deepspeed"])

    longer = inspect("0:8 700:16 4K:32", 32)
    assert [tuple(one) for one in longer.plan.segments] == [(0, 0, 8), (3, 24, 16), (10, 136, 32)]
    assert "batch.ramp: 0:8 700:16 -> 0:8 700:16 4K:32" in "\n".join(longer.changes)
    assert longer.notes[-2:] == (
        "The peak learning rate of a step of 16 samples changes from 0.005 to 0.00354, because it follows from batch.ramp and "
        "batch.global_batch_size. To keep it, give --optimizer.learning_rate 0.00707.",
        "beta2 of a step of 16 samples changes from 0.95 to 0.9747, because it follows from batch.ramp and batch.global_batch_size. To "
        "keep it, give --optimizer.beta2 0.9025.",
    )
    other_rule = inspect("0:8 700:16 4K:32", 32, "--batch.beta2_rule", "fixed")
    assert other_rule.notes[-1] == longer.notes[-2], "another rule is named among the changes"
    with pytest.raises(
        UserError, match=r"gives other sizes than the run has read: 8 from token 0, 16 from token 768\. Keep .* token 3,328, "
    ):
        inspect("0:8 2K:16", 16)
