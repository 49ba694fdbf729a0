"""Runs of launch/pretrain.py that benchmarks start, and the curves that they leave."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from data.command_line import UserError
from launch import REPOSITORY
from launch.training.settings import RunSettings


def pretrain(settings: Mapping[str, object], captured: bool = False) -> subprocess.CompletedProcess[str]:
    """Train in one process with these settings, by name, and return how it ended. `captured`: keep its output, which is else printed."""
    command = [sys.executable, "launch/pretrain.py", *words_of(settings)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=captured, text=True)


def words_of(settings: Mapping[str, object]) -> list[str]:
    """Return settings by name as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def unfinished(run: Path, status: int) -> UserError:
    """Return the error for a run that ended with `status` and is not finished; its own message has been printed."""
    return UserError(f"The run in {run} did not end. {'Correct its settings.' if status == 2 else 'The same command resumes it.'}")


def warmup_share(recipe: RunSettings) -> float:
    """Return the share of the steps of a recipe in which the rate rises."""
    return recipe.warmup_steps / recipe.batch_plan.steps


def read_curve(run: Path, name: str) -> dict[int, float]:
    """Return the values of a curve in TensorBoard by step; none if the run has not written it."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return {entry["step"]: entry[name] for entry in map(json.loads, lines) if name in entry}
