"""Searches of the tests: the demo's recipe in 12 steps, with a stand-in for training."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.searching.search import Search
from launch.searching.settings import read_search_settings
from launch.searching.trials import TrialRun
from tests.ranks import REPOSITORY, clean_environment

STAND_IN = Path(__file__).with_name("stand_in_for_training.py")
GRID = ("optimizer.learning_rate log 1e-4 1e-1 7", "optimizer.weight_decay 0 0.1")
SETTINGS = ("train_steps 12", "schedule.kind constant", "schedule.warmup_steps 0", "log.sample_interval 0")
TOKENS_OF_A_STEP = 32 * 256


def words(output: Path, space: Sequence[str] = GRID, settings: Sequence[str] = (), **chosen: object) -> list[str]:
    """Return a command line of launch/search.py for the demo's recipe in 12 steps."""
    chosen = {"launcher": f"{sys.executable} {STAND_IN}", "method": "grid", "output": str(output)} | chosen
    given = [word for name, value in chosen.items() for word in (f"--{name.replace('__', '.')}", str(value))]
    return ["--space", *space, "--settings", *SETTINGS, *settings, *given]


def start(arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "launch" / "search.py"), *arguments]
    environment = clean_environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def search(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a search to its end; return its status and what it printed."""
    process = start(arguments)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def runs(arguments: Sequence[str]) -> list[TrialRun]:
    return [run for trial in Search(read_search_settings(arguments)).trials for run in trial.runs]


def tiny_settings(prepared: Path) -> list[str]:
    """Return the settings of a real run of 40 steps, with checkpoints of steps 20 and 40."""
    model = {"vocab_size": 800, "sequence_length": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    chosen = {f"model.{name}": value for name, value in model.items()} | {"data": prepared, "optimizer.name": "adamw", "train_steps": 40}
    chosen |= {"batch.global_batch_size": 8, "schedule.warmup_steps": 2, "log.validation_samples": 4, "checkpoint.interval": 20}
    chosen |= {"log.validation_interval": 0, "log.sample_interval": 0, "precision": "float32"}
    return [f"{name} {value}" for name, value in chosen.items()]
