"""The comparison of optimizers selects rates, resumes nothing that is finished, and reports what it reads from the runs' folders."""

import json
import math
import runpy
from pathlib import Path

import pytest

from data.command_line import UserError
from launch.benchmarks.optimizer_comparison import Result, steps_to_reach
from launch.benchmarks.optimizer_runs import Runs
from launch.benchmarks.optimizers import main
from launch.benchmarks.settings import OptimizersSettings
from tests.ranks import REPOSITORY

RECIPE = """
model: {vocab_size: 800, sequence_length: 32, hidden_size: 32, num_layers: 1, num_attention_heads: 2, intermediate_size: 64}
batch: {global_batch_size: 2}
schedule: {warmup_steps: 1}
train_steps: 4
"""


@pytest.fixture
def options(tmp_path) -> list[str]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    return ["--recipe", str(recipe), "--output", str(tmp_path / "runs"), "--data", str(tmp_path / "prepared"), "--micro_batch_size", "2"]


def valley(best: float):
    """Return a stand-in for a run: the nearer its rate is to `best`, the fewer bits. AdamW ends 0.1 bits higher at every rate."""

    def pretrain(runs: Runs, trained, output: Path, steps: int, extra: dict[str, int]):
        runs.trained.append(trained)  # type: ignore[attr-defined]
        end = 1 + 0.1 * (trained.optimizer == "adamw") + abs(math.log2(trained.rate / best)) + 0.01 * trained.seed
        output.mkdir(parents=True)
        lines = [
            {"step": step, "bits_per_byte/validation": end + 1 - step / steps, "time/step": float(step)} for step in range(1, steps + 1)
        ]
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return type("Done", (), {"returncode": 0, "stdout": "", "stderr": ""})

    return pretrain


def rows(printed: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_rates_are_extended_until_the_best_is_between_two_others(options, monkeypatch, capsys):
    monkeypatch.setattr(Runs, "trained", [], raising=False)
    monkeypatch.setattr(Runs, "_pretrain", valley(best=0.032))
    selection = ["--optimizers", "adamw", "muon", "--rates", "0.004", "0.008", "--batch_sizes", "2", "--seeds", "2"]
    main([*options, *selection])
    first = [trained.rate for trained in Runs.trained if trained.optimizer == "muon" and trained.seed == 1]  # type: ignore[attr-defined]
    assert first == [0.004, 0.008, 0.016, 0.032, 0.064]
    table = rows(capsys.readouterr().out)
    assert table["muon"][:4] == ["0.032", "1.015", "1.010 to 1.020", "2"]
    assert table["muon"][5:] == ["90%", "not measured"] and table["adamw"][1] == "1.115" and table["adamw"][5] == "100%"
    Runs.trained.clear()  # type: ignore[attr-defined]
    main([*options, *selection])  # nothing is trained twice
    assert not Runs.trained  # type: ignore[attr-defined]


def test_steps_are_timed_in_turn_after_two_warm_up_steps(options, monkeypatch, capsys):
    monkeypatch.setattr(Runs, "trained", [], raising=False)
    monkeypatch.setattr(Runs, "_pretrain", valley(best=0.004))
    main([*options, "--optimizers", "adamw", "--rates", "0.004", "--batch_sizes", "2", "--seeds", "1"])
    main([*options, "--optimizers", "adamw", "--batch_sizes", "2", "--timing", "true", "--timing_steps", "4", "--timing_rounds", "1"])
    assert rows(capsys.readouterr().out)["adamw"][6] == "4.500"  # the median of steps 3 to 6


def test_picture_has_a_column_for_each_batch_and_a_row_for_each_axis():
    draw = runpy.run_path(str(REPOSITORY / ".readme" / "optimizers_picture.py"))["draw"]
    result = Result({5e-3: 1.5}, 5e-3, [{1: 2.0, 2: 1.5}])
    contenders = {8: {"adamw": result, "muon": result}, 64: {"adamw": result}}
    assert len(draw(contenders, 256, {}).axes) == 2
    timed = draw(contenders, 256, {("adamw", 8): 0.5, ("muon", 8): 1.0, ("adamw", 64): 3.0})
    assert [list(line.get_xdata()) for line in timed.axes[2].lines] == [[0.5, 1.0], [1.0, 2.0]]


def test_larger_batches_get_rates_by_the_square_root_and_equal_tokens(options):
    runs = Runs(OptimizersSettings(output=options[3], recipe=options[1], data=options[5], optimizers=("adamw",), batch_sizes=(2, 8)))
    assert runs.rates(8) == [5e-3, 1e-2, 2e-2, 4e-2] and runs.steps(2) == 4 and runs.steps(8) == 1


def test_runs_of_another_recipe_are_refused(options):
    main([*options, "--train", "false"])
    Path(options[1]).write_text(RECIPE.replace("train_steps: 4", "train_steps: 8"))
    with pytest.raises(UserError, match="holds runs of another recipe or other data"):
        main([*options, "--train", "false"])


def test_step_at_which_a_curve_reaches_a_value_is_interpolated():
    assert steps_to_reach({10: 3.0, 20: 2.0, 30: 1.0}, 1.5) == 25
    assert steps_to_reach({10: 3.0, 20: 2.0}, 1.5) is None and steps_to_reach({10: 1.0}, 1.5) == 10


def test_comparison_trains_by_ordinary_runs(options, prepared, capsys):
    options[5] = str(prepared)
    main([*options, "--optimizers", "adamw", "--rates", "1e-3", "--batch_sizes", "2", "--seeds", "1"])
    bits = float(rows(capsys.readouterr().out)["adamw"][1])
    assert 0 < bits < 10
