"""launch/benchmarks/seesaw.py starts ordinary runs of the demo's recipe, and compares the last validation of two runs of a seed."""

import json
from pathlib import Path

import pytest

from data.command_line import UserError
from launch.benchmarks import seesaw


def write_curve(folder: Path, steps: int, loss: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": 1, "loss/train": 9.0}, {"step": 2, "loss/validation": 8.0}, {"step": steps, "loss/validation": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_that_are_missing_are_trained_and_compared(tmp_path, monkeypatch, capsys):
    started = []

    def pretrain(chosen):
        started.append(chosen)
        write_curve(chosen["output"], *((50, 2.5) if chosen["batch.ramp"] == "seesaw:32:4" else (100, 2.25)))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(seesaw, "pretrain", pretrain)
    words = ["--output", str(tmp_path), "--data", str(tmp_path / "prepared"), "--ramp", "seesaw:32:4"]
    words += ["--batch_size", "4", "--optimizer", "muon", "--train_tokens", "100000", "--seeds", "1"]
    write_curve(tmp_path / "plain_1", 100, 2.0)
    assert seesaw.main(words) == 0
    assert [(one["seed"], one["batch.ramp"], one["data.path"]) for one in started] == [(1, "seesaw:32:4", tmp_path / "prepared")]
    assert started[0].items() >= {"optimizer.name": "muon", "optimizer.learning_rate": 0.005, "batch.global_batch_size": 4}.items()
    assert (started[0]["train_tokens"], started[0]["schedule.warmup_tokens"]) == ("100000", "4000"), "the warm-up has the demo's share"
    assert "| 1 | 100 | 50 | 0.500 | 2.0000 | 2.5000 | +0.5000 |" in capsys.readouterr().out
    monkeypatch.setattr(seesaw, "pretrain", lambda chosen: type("Done", (), {"returncode": 1}))
    with pytest.raises(UserError, match=r"plain_3 did not end\. The same command resumes it"):
        seesaw.main([*words[:-1], "3"])
    monkeypatch.setattr(seesaw, "pretrain", lambda chosen: type("Done", (), {"returncode": 2}))
    with pytest.raises(UserError, match=r"plain_3 did not end\. Correct its settings\.$"):
        seesaw.main([*words[:-1], "3"])
    with pytest.raises(UserError, match=r'^batch\.ramp foo \(command line\): "foo" is not THRESHOLD:SIZE'):
        seesaw.main([*words, "--ramp", "foo"])
