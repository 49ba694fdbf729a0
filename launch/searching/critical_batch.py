"""The critical batch, measured by branches (Merrill et al. 2025, arXiv 2505.23971): one checkpoint trains on with several batch sizes.

All branches read the same number of tokens from the checkpoint on, each with the parent's rate times the square root of the ratio of the
batches, held constant. The largest batch whose loss is within a tolerance of that of every smaller batch loses nothing.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from data.command_line import UserError, as_text, flatten
from data.sampling.batch_plan import Segment, read_segments
from launch.checkpoints import checkpoint
from launch.searching.branch import checkpoint_at, parent_recipe
from launch.searching.presets import Point, Preset
from launch.searching.space import number_text, read_dimension
from launch.training.settings import RunSettings

FACTORS = (0.5, 1, 2, 4, 8)
"""Batches of the branches, as multiples of the parent's."""
LEAST_STEPS = 32
"""Steps of the largest branch below which its loss still depends on the change of the batch more than on its size."""
_SET_FOR_A_BRANCH = ("output", "size", "train_", "pause_", "schedule.", "batch.", "log.", "checkpoint.", "resume", "allow_", "dry_run")
"""Settings of a run, or beginnings of their names, that a branch does not take from its parent."""


@dataclasses.dataclass(frozen=True)
class Parent:
    """The checkpoint that is branched, and what its run did there."""

    folder: Path
    origin: Path
    """Folder of the checkpoint."""
    recipe: dict
    """Settings of the run by dotted name."""
    segments: tuple[Segment, ...]
    """Batches of the run up to the checkpoint."""
    position: int
    """Samples that the run had read."""
    learning_rate: float
    """Learning rate of the last step before the checkpoint."""

    @property
    def batch(self) -> int:
        """Sequences of the last step before the checkpoint."""
        return self.segments[-1].size

    @property
    def tokens(self) -> int:
        """Tokens that the run had read."""
        return self.position * int(self.recipe["model.sequence_length"])


def read_parent(folder: Path, step: int | None) -> Parent:
    """Read a run and one of its checkpoints, the newest by default. Raises UserError if either is missing."""
    recipe = flatten(parent_recipe(folder))
    origin = checkpoint_at(folder, step)
    at = checkpoint.step_of(origin)
    record = checkpoint.read_manifest(origin)["batch_plan"]
    segments = tuple(one for one in read_segments(record) if one.first_step < at)
    last = segments[-1]
    rates = [(line["step"], line["optimization/learning_rate"]) for line in _metrics(folder) if "optimization/learning_rate" in line]
    before = [rate for number, rate in rates if number <= at]
    if not before:
        raise UserError(f"parent {folder}: metrics.jsonl has no learning rate of step {at}.")
    return Parent(folder, origin, recipe, segments, last.first_position + (at - last.first_step) * last.size, before[-1])


def words_of_parent(parent: Parent) -> list[str]:
    """Return the parent's settings as options of launch/pretrain.py, without those that each branch has of its own."""
    default = flatten(dataclasses.asdict(RunSettings()))
    words = ["--config=/dev/null"]  # no recipe, in place of the demo's
    for name, value in parent.recipe.items():
        if not name.startswith(_SET_FOR_A_BRANCH) and name in default and value != _as_json(default[name]):
            words += [f"--{name}", *map(as_text, value)] if isinstance(value, list) else [f"--{name}={as_text(value)}"]
    return [*words, "--schedule.kind=constant", "--schedule.warmup_steps=0", f"--batch.global_batch_size={parent.batch}"]


def branches(parent: Parent, tokens: float) -> Preset:
    """Return a branch for each batch size. `tokens` is the length of each."""
    length, points = int(parent.recipe["model.sequence_length"]), []
    so_far = [f"{one.first_position * length}:{one.size}" for one in parent.segments]
    sizes = [int(parent.batch * factor) for factor in FACTORS if parent.batch * factor == int(parent.batch * factor)]
    for size in sizes:
        steps = round(tokens / (size * length))
        if not steps:
            raise UserError(f"branch.tokens {tokens:g} is less than a step of {size} x {length} = {size * length:,} tokens.")
        ramp = " ".join([*so_far, *([] if size == parent.batch else [f"{parent.tokens}:{size}"])])
        more = {
            "train_steps": "null",
            "train_tokens": str(parent.tokens + steps * size * length),
            "optimizer.learning_rate": number_text(parent.learning_rate * math.sqrt(size / parent.batch), False),
            "log.validation_interval": "0",
            "checkpoint.interval": str(max(steps // 2, 1)),
            "allow_changes": "true",
        }
        points.append(Point({"batch.global_batch_size": str(size)}, more | ({"batch.ramp": ramp} if " " in ramp else {})))
    return Preset([read_dimension(f"batch.global_batch_size {' '.join(map(str, sizes))}")], points)


def critical_batch(losses: Mapping[int, float], tolerance: float) -> int:
    """Return the largest batch whose loss is at most `tolerance` above that of every smaller batch. `losses` has them by batch."""
    return max(size for size in losses if all(losses[size] <= losses[other] + tolerance for other in losses if other < size))


def _metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")] if path.exists() else []


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
