"""The gradient noise scale: estimates against known ones, and what a run with log.noise_scale writes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.command_line import UserError
from launch import REPOSITORY
from launch.checkpoints.checkpoint import folder_name, read_manifest
from launch.ranks.layout import Layout
from launch.training import assembly
from launch.training.gradient_squares import OTHERS, PARTS, GradientSquares
from launch.training.noise_scale import NoiseScale, doubling
from launch.training.plan import plan
from launch.training.recipe import read_run_settings
from launch.training.settings import share_the_batch
from tests.ranks import finish, start_ranks

PRETRAIN = REPOSITORY / "launch" / "pretrain.py"
ON = ["--log.noise_scale", "true"]


def squares(gradients: torch.Tensor, micro_batch_size: int) -> list[GradientSquares]:
    """Return the squares of each step from its micro-batches' gradients.  [steps, micro-batches, parameters]"""
    nothing = dict.fromkeys(PARTS, 0.0)
    alone, together = gradients.square().sum(dim=2).mean(dim=1), gradients.mean(dim=1).square().sum(dim=1)
    return [
        GradientSquares(nothing | {OTHERS: one}, nothing | {OTHERS: mean}, gradients.shape[1], micro_batch_size)
        for one, mean in zip(alone.tolist(), together.tolist(), strict=True)
    ]


def regression_steps(steps: int, num_micro_batches: int, size: int, generator: torch.Generator) -> list[GradientSquares]:
    """Return steps of linear regression: gradients of (x (w - w*) - noise)^2 / 2 at a w that differs from w* by 0.5 in 4 directions."""
    x = torch.randn(steps, num_micro_batches, size, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(x.shape[:-1], generator=generator, dtype=torch.float64)
    return squares(((x.sum(dim=-1) * 0.5 - noise)[..., None] * x).mean(dim=2), size)


# For x ~ N(0, 1): G = w - w*, and the mean of a gradient's square is |G|^2 (4 + 2) + 4.
SIGNAL = 4 * 0.5**2
VARIANCE = SIGNAL * (4 + 1) + 4


@pytest.mark.parametrize(("num_micro_batches", "size"), [(2, 8), (4, 4), (16, 1)])
def test_noise_scale_of_linear_regression_is_known_for_every_split(num_micro_batches, size):
    noise = NoiseScale(horizon=1e9)
    for one in regression_steps(20_000, num_micro_batches, size, torch.Generator().manual_seed(0)):
        noise.add(one)
    found = noise.estimate()
    assert found.signal == pytest.approx(SIGNAL, rel=0.02)
    assert found.variance == pytest.approx(VARIANCE, rel=0.02)
    assert found.scale == pytest.approx(VARIANCE / SIGNAL, rel=0.02)


def test_a_batch_ramp_does_not_change_the_noise_scale():
    generator, noise = torch.Generator().manual_seed(0), NoiseScale(horizon=4000)
    for one in regression_steps(3000, 4, 1, generator) + regression_steps(100, 64, 1, generator):
        noise.add(one)
    found = noise.estimate()
    assert found.scale == pytest.approx(VARIANCE / SIGNAL, rel=0.1)
    assert found.low < VARIANCE / SIGNAL < found.high
    assert 4 * 4000 <= sum(block.sequences for block in noise._blocks) <= 4 * 4000 + 2 * 464


def test_interval_contains_the_true_scale_in_nine_of_ten_runs():
    hits, generator = 0, torch.Generator().manual_seed(3)
    for _ in range(100):
        noise = NoiseScale(horizon=50 * 8)
        for one in regression_steps(100, 8, 1, generator):
            noise.add(one)
        found = noise.estimate()
        hits += found.low <= VARIANCE / SIGNAL <= (found.high or float("inf"))
    assert 84 <= hits <= 96


def test_a_gradient_that_noise_hides_has_a_bound_and_no_number():
    for seed in range(100):
        noise = NoiseScale(horizon=50 * 4)
        for one in squares(torch.randn(60, 4, 50, generator=torch.Generator().manual_seed(seed)), 1):
            noise.add(one)
        if noise.estimate().signal <= 0 and noise.estimate().low is not None:
            break
    scalars = noise.scalars(sequence_length=10, step_tokens=40)
    assert "noise/low" in scalars and not scalars.keys() & {"noise/scale_tokens", "noise/high", "noise/batch_over_scale"}
    line = noise.advice(10, 40)
    assert line.startswith("Noise scale: above ") and "at least" in line and "lower bound" in line


def test_doubling_the_batch_follows_the_paper():
    assert [doubling(scale) for scale in (0.25, 1, 4)] == [
        (pytest.approx(0.9), pytest.approx(1.8)),
        (pytest.approx(0.75), pytest.approx(1.5)),
        (pytest.approx(0.6), pytest.approx(1.2)),
    ]


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (
            ["--batch.global_batch_size=8", "--batch.micro_batch_size=8"],
            1,
            "a step of 8 sequences has one. Use --batch.micro_batch_size 4.",
        ),
        (
            ["--batch.global_batch_size=15", "--batch.micro_batch_size=15"],
            1,
            "a step of 15 sequences has one. Use --batch.micro_batch_size 5.",
        ),
        (["--batch.global_batch_size=1"], 1, "a step of 1 sequence has one. Use --batch.global_batch_size 2 or more."),
        (["--sequence_parallel_size=2"], 2, "is not supported with sequence_parallel_size 2 (command line): each rank has only a part"),
    ],
)
def test_a_noise_scale_that_cannot_be_measured_is_refused(words, ranks, message):
    settings = read_run_settings([*ON, *words])
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        share_the_batch(settings, Layout(ranks, sequence_parallel_size=settings.sequence_parallel_size))
    assert str(refused.value).startswith("log.noise_scale true (command line)")


@pytest.mark.parametrize(
    ("words", "size"),
    [(["8"], 4), (["15"], 5), (["2"], 1), (["64", "--batch.ramp=0:6 20K:64"], 2), (["64", "--batch.ramp=seesaw:128"], 32)],
)
def test_one_data_rank_has_two_micro_batches_by_default(words, size):
    settings = read_run_settings([*ON, "--train_tokens=1e6", "--batch.global_batch_size", *words])
    assert share_the_batch(settings, Layout(1)).batch.micro_batch_size == size


def test_plan_states_that_the_noise_scale_asks_for_the_micro_batches():
    def shown(*words: str) -> str:
        settings = share_the_batch(read_run_settings(["--train_tokens=3e6", "--batch.global_batch_size=8", *words]), Layout(1))
        merged = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}
        return plan(settings, merged, Layout(1), "cpu", settings.batch_plan, None)

    note, advice = "note: log.noise_scale compares the micro-batches of a step", "note: accumulation 2 without data parallelism"
    assert note in shown(*ON) and advice not in shown(*ON)
    chosen = shown(*ON, "--batch.micro_batch_size=4")
    assert note not in chosen and advice in chosen
    assert note not in shown()


def test_two_data_ranks_are_two_micro_batches():
    assert share_the_batch(read_run_settings([*ON, "--batch.global_batch_size=2"]), Layout(2)).batch.micro_batch_size == 1


def test_a_horizon_without_noise_scale_is_refused():
    with pytest.raises(UserError, match=r"log.noise_horizon 20 \(command line\) has no effect without log.noise_scale"):
        read_run_settings(["--log.noise_horizon", "20"])


def lines_of(run: Path) -> list[str]:
    return [line[20:] for line in (run / "log.txt").read_text().splitlines() if "oise scale" in line]


def test_a_run_writes_the_noise_scale_and_three_lines_of_advice(tiny, tmp_path):
    words = [*tiny, *ON, "--log.noise_horizon", "10", "--train_steps", "40", "--log.sample_interval", "0", "--precision", "float32"]
    finish(start_ranks(1, PRETRAIN, *words, OMP_NUM_THREADS="1"))
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = {entry["step"]: entry for entry in entries if "noise/signal" in entry}
    assert sorted(written) == [*range(4, 41, 4)], "at each interval of log.interval"
    last = written[40]
    assert last["noise/low"] < last["noise/scale_tokens"] < last["noise/high"]
    assert last["noise/scale_tokens"] == pytest.approx(32 * last["noise/variance"] / last["noise/signal"])
    assert last["noise/batch_over_scale"] == pytest.approx(8 * 32 / last["noise/scale_tokens"])
    assert {"noise/scale_of_norms", "noise/scale_of_attention", "noise/scale_of_feed_forward", "noise/scale_of_embedding"} <= last.keys()
    assert "noise/low" not in written[4], "four steps have no interval"
    early, quarter, end = lines_of(tmp_path / "run")
    assert early == "Noise scale: no estimate, because the 2 measured steps are too few or their noise hides the gradient."
    for line, steps in ((quarter, 10), (end, 40)):
        assert re.match(rf"Noise scale: .* over the last {steps} steps; a step has 256 tokens\. A batch of twice the size would need", line)
    recorded = read_manifest(tmp_path / "run" / "checkpoints" / folder_name(40))["noise_scale"]
    assert sum(block["steps"] for block in recorded["blocks"]) == 40


def test_horizon_is_long_enough_for_an_interval_at_the_largest_batch():
    settings = read_run_settings([*ON, "--log.noise_horizon=10", "--batch.ramp=seesaw", "--schedule.kind=cosine", "--train_tokens=1e7"])
    plan = settings.batch_plan
    noise = assembly._noise_scale(SimpleNamespace(settings=settings, layout=Layout(1)), plan, 0, None)
    assert plan.size(plan.steps - 1) == 16 * settings.batch.global_batch_size
    for _ in range(15):
        noise.add(GradientSquares(dict.fromkeys(PARTS, 2.0), dict.fromkeys(PARTS, 1.0), 16, settings.batch.global_batch_size))
    assert noise.estimate().low is not None


def test_the_noise_scale_of_other_parameters_is_not_restored():
    noise = NoiseScale(horizon=10, without_tied=True)
    noise.add(GradientSquares(dict.fromkeys(PARTS, 2.0), dict.fromkeys(PARTS, 1.0), 4, 2))
    recorded = json.loads(json.dumps(noise.record()))
    assert not NoiseScale(horizon=10).restore(recorded) and not NoiseScale(horizon=10).restore(None)
    other = NoiseScale(horizon=10, without_tied=True)
    assert other.restore(recorded) and other.estimate() == noise.estimate()
