"""The runs of launch/benchmarks/optimizers.py: start launch/pretrain.py, and read the curves of finished runs."""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data.command_line import UserError
from launch.benchmarks.settings import OptimizersSettings
from launch.benchmarks.training_runs import pretrain, read_curve, unfinished, warmup_share
from launch.training.recipe import read_run_settings

_CURVE = "bits_per_byte/validation"
VALIDATIONS = 6
"""Points of a curve."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of the comparison."""

    optimizer: str
    batch_size: int
    """Sequences per step."""
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.optimizer}-batch{self.batch_size}-rate{self.rate:.2e}-seed{self.seed}"


class Runs:
    """All runs in the folder of a comparison."""

    def __init__(self, settings: OptimizersSettings):
        """Raises UserError for an invalid recipe or optimizer, and if the folder holds runs of another recipe or of other data."""
        self._settings = settings
        self.folder = Path(settings.output).resolve()
        recipe = read_run_settings(["--config", settings.recipe])
        for name in settings.optimizers:
            read_run_settings(["--config", settings.recipe, "--optimizer.name", name])
        plan = recipe.batch_plan
        self.tokens_per_sequence = recipe.model.sequence_length
        self._sequences = plan.position(plan.steps)
        self._warmup_share = warmup_share(recipe)
        self._check_folder()

    def _check_folder(self) -> None:
        """Record the recipe and the data at the first start."""
        made_from = {"recipe": Path(self._settings.recipe).read_text(), "data": str(Path(self._settings.data).resolve())}
        record = self.folder / "comparison.json"
        if record.exists() and json.loads(record.read_text()) != made_from:
            raise UserError(
                f"{self.folder} holds runs of another recipe or other data ({record}). Choose another --output, or remove the folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(made_from, indent=1))

    def steps(self, batch_size: int) -> int:
        """Return the number of steps that read as many sequences as the recipe's run, rounded."""
        return max(round(self._sequences / batch_size), 1)

    def rates(self, batch_size: int) -> list[float]:
        """Return the rates that every optimizer is trained with at a batch size."""
        return sorted(three_digits(rate * math.sqrt(batch_size / self._settings.batch_sizes[0])) for rate in self._settings.rates)

    def curve(self, trained: Trained) -> dict[int, float] | None:
        """Return the validation bits per byte of a finished run by step, and None of another."""
        curve = read_curve(self.folder / trained.name, _CURVE)
        return curve if max(curve, default=0) == self.steps(trained.batch_size) else None

    def finished(self, optimizer: str, batch_size: int, seed: int) -> dict[float, float]:
        """Return the last bits per byte of the finished runs of one seed by rate."""
        folders = self.folder.glob(f"{optimizer}-batch{batch_size}-rate*-seed{seed}")
        rates = sorted(float(folder.name.split("-rate")[1].removesuffix(f"-seed{seed}")) for folder in folders)
        found = {rate: self.curve(Trained(optimizer, batch_size, rate, seed)) for rate in rates}
        return {rate: curve[max(curve)] for rate, curve in found.items() if curve}

    def train(self, trained: Trained) -> float:
        """Train a run unless it is finished. Return its last bits per byte, infinite if its loss did not stay finite."""
        if self.curve(trained) is None:
            steps = self.steps(trained.batch_size)
            interval = max(steps // VALIDATIONS, 1)
            evaluation = {"log.validation_interval": interval, "log.validation_samples": 0}
            saving = {"checkpoint.interval": interval, "checkpoint.keep": 2}
            print(f"training {trained.name}, {steps:,} steps ...", file=sys.stderr, flush=True)
            done = self._pretrain(trained, self.folder / trained.name, steps, evaluation | saving)
            if "not finite" in done.stderr:
                return math.inf
            if done.returncode:
                print(f"{done.stdout}{done.stderr}", file=sys.stderr)
                raise unfinished(self.folder / trained.name, done.returncode)
        curve = self.curve(trained)
        assert curve is not None
        return curve[max(curve)]

    def seconds_per_step(self, optimizer: str, batch_size: int, steps: int) -> float:
        """Return the median seconds of a step, in a new run of a few steps without the first two."""
        trained = Trained(optimizer, batch_size, self.rates(batch_size)[0], 1)
        with tempfile.TemporaryDirectory() as folder:
            run, options = Path(folder) / "run", {"log.validation_interval": 0, "checkpoint.interval": 0, "log.interval": 1}
            done = self._pretrain(trained, run, steps + 2, options)
            if done.returncode:
                raise UserError(f"{done.stdout}{done.stderr}\nThe timed run of {trained.optimizer} did not end.")
            seconds = list(read_curve(run, "time/step").values())
        return statistics.median(seconds[2:])

    def _pretrain(self, trained: Trained, output: Path, steps: int, options: dict[str, int]) -> subprocess.CompletedProcess[str]:
        chosen: dict[str, object] = {
            "deepspeed": "ds_configs/zero1.json",
            "config": Path(self._settings.recipe).resolve(),
            "data.path": Path(self._settings.data).resolve(),
            "output": output,
            "optimizer.name": trained.optimizer,
            "optimizer.learning_rate": trained.rate,
            "seed": trained.seed,
            "batch.global_batch_size": trained.batch_size,
            "batch.micro_batch_size": math.gcd(trained.batch_size, self._settings.micro_batch_size),
            "train_steps": steps,
            "schedule.warmup_steps": min(round(steps * self._warmup_share), steps - 1),
            "log.sample_interval": 0,
        }
        return pretrain(chosen | options, captured=True)


def three_digits(rate: float) -> float:
    """Return a rate rounded to three digits, which is what the name of a run's folder holds."""
    return float(f"{rate:.2e}")
