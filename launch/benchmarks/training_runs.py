"""Runs of launch/pretrain.py that benchmarks start, and the curves that they leave."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch import REPOSITORY
from launch.training.settings import RunSettings


def pretrain(settings: Mapping[str, object], captured: bool = False) -> subprocess.CompletedProcess[str]:
    """Train in one process with these settings, by name, and return how it ended. `captured`: keep its output, which is else printed."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return subprocess.run([sys.executable, "launch/pretrain.py", *words], cwd=REPOSITORY, capture_output=captured, text=True)


def warmup_share(recipe: RunSettings) -> float:
    """Return the share of the steps of a recipe in which the rate rises."""
    return recipe.warmup_steps / recipe.batch_plan.steps


def read_curve(run: Path, name: str) -> dict[int, float]:
    """Return the values of a curve in TensorBoard by step; none if the run has not written it."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return {entry["step"]: entry[name] for entry in map(json.loads, lines) if name in entry}
