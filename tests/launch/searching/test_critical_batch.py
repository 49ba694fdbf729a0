"""The critical batch by branches: the rule on simulated training, and the branches of a real run."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.command_line import UserError
from launch.searching.batch_report import batch_section
from launch.searching.critical_batch import critical_batch
from launch.searching.search import Search
from launch.searching.settings import read_search_settings
from launch.searching.trials import Record
from tests.launch.searching.searches import search, tiny_settings
from tests.ranks import REPOSITORY, finish, start_ranks

SIZES = (8, 16, 32, 64, 128, 256, 512)
DIMENSIONS, EXAMPLES = 64, 65536
CURVATURES = np.logspace(-2, 0, DIMENSIONS)


def losses_of_branches(noise: float, random: np.random.Generator | None) -> dict[int, float]:
    """Return the loss of a quadratic after SGD on the same examples with each batch; without `random` its expectation.

    The gradient of an example has variance `noise` in each dimension. The rate follows the root of the batch, from a small one on.
    """
    losses = {}
    for size in SIZES:
        rate, steps = 0.02 * np.sqrt(size / SIZES[0]), EXAMPLES // size
        squares, weights = np.ones(DIMENSIONS), np.ones(DIMENSIONS)
        for _ in range(steps):
            shrink = 1 - rate * CURVATURES
            squares = shrink**2 * squares + rate**2 * noise / size
            if random is not None:
                weights = shrink * weights - rate * np.sqrt(noise / size) * random.normal(size=DIMENSIONS)
        losses[size] = float(CURVATURES @ (squares if random is None else weights**2) / 2)
    return losses


@pytest.mark.parametrize("noise", [1.0, 8.0])
def test_the_rule_finds_the_critical_batch_of_a_noisy_quadratic(noise):
    """Within one doubling of that of the expected losses, for 18 of 20 seeds."""
    expected = losses_of_branches(noise, None)
    tolerance = 0.1 * min(expected.values())
    known = critical_batch(expected, tolerance)
    assert SIZES[0] < known < SIZES[-1], expected
    found = [critical_batch(losses_of_branches(noise, np.random.default_rng(seed)), tolerance) for seed in range(20)]
    assert sum(known / 2 <= size <= 2 * known for size in found) >= 18, (known, found)


def test_the_largest_batch_within_the_tolerance_is_the_critical_one():
    assert critical_batch({8: 3.0, 16: 3.005, 32: 3.02, 64: 3.2}, 0.01) == 16
    assert critical_batch({8: 3.0, 16: 3.02, 32: 3.005}, 0.01) == 32  # 16 was unlucky
    assert critical_batch({8: 3.0, 16: 2.9, 32: 2.92}, 0.01) == 16
    assert critical_batch({8: 3.0}, 0.01) == 8


@pytest.fixture(scope="module")
def parent(prepared, tmp_path_factory):
    """Folder of a run of 40 steps of 8 sequences, with checkpoints of steps 20 and 40, whose rate falls from step 2 on."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    words = [word for text in tiny_settings(prepared) for word in f"--{text}".split()]
    finish(start_ranks(1, REPOSITORY / "launch" / "pretrain.py", *words, "--output", str(folder)))
    return folder


def test_branches_of_a_run_have_its_rate_times_the_root_of_the_batch(parent, tmp_path):
    """The branch with the parent's batch reads what the parent read; all branches read equally many tokens; the parent stays as it is."""
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    arguments = ["--preset", "critical_batch", "--branch.parent", str(parent), "--branch.step", "20", "--branch.tokens", "4096"]
    arguments += ["--output", str(tmp_path / "s"), "--workers", "2"]
    status, printed = search(arguments)
    assert status == 0 and "5 of 5 trials done" in printed, printed
    rate = metrics(parent, "optimization/learning_rate")[20]
    for trial, factor in zip(Search(read_search_settings(arguments)).trials, (0.5, 1, 2, 4, 8), strict=True):
        (run,) = trial.runs
        rates, tokens = metrics(run.folder, "optimization/learning_rate"), metrics(run.folder, "progress/tokens")
        assert list(rates.values()) == pytest.approx([rate * factor**0.5] * len(rates), rel=1e-5)
        assert min(rates) == 21 and len(rates) == 16 / factor and tokens[max(tokens)] == 20 * 256 + 4096
        if factor == 1:
            assert metrics(run.folder, "loss/train")[21] == metrics(parent, "loss/train")[21]
    assert before == {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    page = (tmp_path / "s" / "report.html").read_text()
    assert "too short" in page and "The critical batch" in page


def test_the_report_proposes_a_ramp_from_the_losses_of_branches(parent, tmp_path):
    """The losses are written by hand."""
    arguments = ["--preset", "critical_batch", "--branch.parent", str(parent), "--branch.step", "20", "--output", str(tmp_path / "s")]
    one = Search(read_search_settings([*arguments, "--branch.tokens", str(32 * 64 * 32)]))
    for number, (size, loss) in enumerate({4: 3.0, 8: 3.002, 16: 3.009, 32: 3.02, 64: 3.1}.items()):
        trial = one.trials.create(number)
        trial.write({"batch.global_batch_size": str(size)})
        trial.runs[0].write(Record("finished", 0, ({"loss/validation": loss},)))
    _, _, figure, note = batch_section(one)
    assert figure is not None
    assert note.startswith("At 5,120 tokens the critical batch is 16 sequences (512 tokens): the largest whose loss is at most 0.01 above")
    assert '--batch.ramp "0:8 5120:16" --batch.global_batch_size 16.' in note


def metrics(folder: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def test_a_rung_with_a_decay_has_the_score_of_its_branch(prepared, tmp_path):
    """The branch reads 0.25 of the rung's tokens with a rate that falls to 0; the run itself resumes at the rung with its own rate."""
    arguments = ["--space", "optimizer.learning_rate 1e-3 1e-2", "--method", "grid", "--output", str(tmp_path / "s")]
    arguments += ["--rungs.first_tokens", "4096", "--rungs.factor", "2", "--rungs.decay", "0.25"]
    arguments += ["--settings", *tiny_settings(prepared), "schedule.kind constant"]
    status, printed = search(arguments)
    assert status == 0, printed
    _, best = (trial.runs[0] for trial in Search(read_search_settings(arguments)).trials)
    branch, record = best.branch(0), best.record
    rates = metrics(branch.folder, "optimization/learning_rate")
    assert list(rates) == [17, 18, 19, 20] and list(rates.values()) == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert record.metrics[0]["loss/validation"] == metrics(branch.folder, "loss/validation")[20]
    assert metrics(best.folder, "optimization/learning_rate") == {step: pytest.approx(1e-2 * min(step / 3, 1)) for step in range(1, 33)}
    assert list(metrics(best.folder, "loss/validation")) == [16, 32] and record.target == 1  # the best of two leaves only the first rung


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "preset critical_batch needs branch.parent."),
        ({"branch.parent": "nowhere", "branch.tokens": "1e6"}, "parent nowhere is not the folder of a run: run.json is missing."),
        ({"branch.parent": "RUN", "branch.tokens": "1e6", "branch.step": "30"}, "has no checkpoint of step 30. It has 20, 40."),
        ({"branch.parent": "RUN", "branch.tokens": "100"}, "branch.tokens 100 is less than a step of"),
        ({"branch.parent": "RUN", "branch.tokens": "1e6", "repeat": "2"}, "repeat 2 (command line) is not supported with preset"),
        ({"branch.parent": "RUN", "branch.tokens": "1e6", "recipe": "x.yaml"}, "recipe x.yaml (command line) has no effect with preset"),
    ],
)
def test_a_mistake_in_the_branches_is_one_sentence(chosen, message, parent, tmp_path):
    given = [word for name, value in chosen.items() for word in (f"--{name}", value.replace("RUN", str(parent)))]
    with pytest.raises(UserError) as error:
        Search(read_search_settings(["--preset", "critical_batch", *given, "--output", str(tmp_path / "s")]))
    assert message in str(error.value)
    assert not (tmp_path / "s").exists()
