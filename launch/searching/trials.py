"""Folder of a search. It is the only record: any number of workers, on any machines that share its disk, read and write it.

search.json                   the space, the recipe and whatever else decides the trials: written first, compared at each start
trials/0007/trial.json        the values of trial 7. Its folder is created by the one worker that proposes it
trials/0007/seed_1/           an ordinary run of launch/pretrain.py: run.json, metrics.jsonl, checkpoints/, tb/
trials/0007/seed_1.json       where the run stands: its rung, its last metrics, or why it failed
trials/0007/seed_1.lock       locked by the worker that runs it
trials/0007/seed_1.out        what the run has printed
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from data.command_line import UserError
from data.files import lock_file, output_complaint, write_file
from launch.checkpoints import checkpoint
from launch.searching.space import Values

_LOCK_WARNING = "Make sure that only one worker uses this search."


@dataclasses.dataclass(frozen=True)
class Record:
    """Where a run of a trial stands, as seed_S.json holds it."""

    state: Literal["open", "finished", "diverged", "failed"] = "open"
    """open: not at its end; diverged: its loss or gradient was not finite; failed: it cannot be run."""
    target: int = 0
    """Index of the rung that the run trains to."""
    metrics: tuple[dict[str, float], ...] = ()
    """Last value of each curve at each rung that the run has reached."""
    seconds: float = 0.0
    """Time that the run has taken, over all starts."""
    failures: int = 0
    """Starts in a row that failed without a new checkpoint."""
    reason: str = ""
    """Last lines of the output of a run that diverged or failed."""

    @property
    def has_work(self) -> bool:
        """True if the run has not reached its target."""
        return self.state == "open" and len(self.metrics) <= self.target


class TrialRun:
    """One run of a trial, with one seed."""

    def __init__(self, trial: "Trial", seed: int, folder: Path | None = None):
        self.trial, self.seed = trial, seed
        self.folder = folder or trial.folder / f"seed_{seed}"

    @property
    def record(self) -> Record:
        """Where the run stands."""
        path = self.folder.with_suffix(".json")
        if not path.exists():
            return Record()
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Record(**fields | {"metrics": tuple(fields["metrics"])})

    def write(self, record: Record) -> None:
        """Replace the record. Only the worker that has locked the run may do so."""
        write_file(self.folder.with_suffix(".json"), json.dumps(dataclasses.asdict(record), indent=1))

    def branch(self, rung: int) -> "TrialRun":
        """Return the branch of the run that decays after a rung."""
        return TrialRun(self.trial, self.seed, self.folder.with_name(f"{self.folder.name}_rung_{rung + 1}"))

    def has_saved(self, tokens: float) -> bool:
        """True if the newest checkpoint of the run has read at least `tokens`, and all metrics up to it are written."""
        last = self.last_metrics()
        return last.get("progress/tokens", 0.0) >= tokens and last["step"] == self.newest_step

    @property
    def output(self) -> Path:
        """File with what the run has printed."""
        return self.folder.with_suffix(".out")

    def lock(self) -> BinaryIO | None:
        """Lock the run until the file is closed; None if another worker has it, or if ranks that a dead worker started still train."""
        file = lock_file(self.folder.with_suffix(".lock"), warning=_LOCK_WARNING)
        if file is not None and self.folder.is_dir():
            of_ranks = lock_file(self.folder / checkpoint.LOCK_NAME, warning=_LOCK_WARNING)
            if of_ranks is None:
                file.close()
                return None
            of_ranks.close()
        return file

    @property
    def newest_step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        newest = checkpoint.published(self.folder / "checkpoints")[:1]
        return checkpoint.step_of(newest[0]) if newest else 0

    def last_metrics(self) -> dict[str, float]:
        """Return the last value of each curve; infinite where it was not finite."""
        last: dict[str, float] = {}
        for line in _lines(self.folder / "metrics.jsonl"):
            last |= {name: float("inf") if value is None else value for name, value in line.items()}
        return last

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return a curve as pairs of tokens and value, without values that are not finite."""
        tokens, points = 0.0, []
        for line in _lines(self.folder / "metrics.jsonl", (name, "progress/tokens")):
            tokens = line.get("progress/tokens", tokens)
            if line.get(name) is not None:
                points.append((tokens, line[name]))
        return points


@dataclasses.dataclass(frozen=True)
class Trial:
    """A point of the space and its runs."""

    number: int
    folder: Path
    seeds: tuple[int, ...]

    @property
    def values(self) -> Values | None:
        """The values of the trial; None if the worker that created its folder has not written them."""
        path = self.folder / "trial.json"
        return json.loads(path.read_text(encoding="utf-8"))["values"] if path.exists() else None

    def write(self, values: Values) -> None:
        """Write the values."""
        write_file(self.folder / "trial.json", json.dumps({"number": self.number, "values": values}, indent=1))

    @property
    def runs(self) -> list[TrialRun]:
        """The runs of the trial, one a seed."""
        return [TrialRun(self, seed) for seed in self.seeds]


class Trials:
    """All trials of a search."""

    def __init__(self, folder: Path, first_seed: int, repeat: int):
        self.folder = folder / "trials"
        self._seeds = tuple(range(first_seed, first_seed + repeat))

    def __iter__(self) -> Iterator[Trial]:
        numbers = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()) if self.folder.is_dir() else []
        return (self[number] for number in numbers)

    def __getitem__(self, number: int) -> Trial:
        return Trial(number, self.folder / f"{number:04d}", self._seeds)

    def create(self, number: int) -> Trial | None:
        """Create the folder of a trial; None if another worker has created it."""
        trial = self[number]
        with contextlib.suppress(FileExistsError):
            trial.folder.mkdir(parents=True)
            return trial
        return None


def check_record(folder: Path, decides: dict) -> None:
    """Write search.json at the first start. Raises UserError with what differs if the folder has another search or other files.

    `decides` has by name, as JSON, whatever decides the trials.
    """
    path = folder / "search.json"
    if not path.exists():
        if folder.is_dir() and not all(entry.name.startswith(path.name) for entry in folder.iterdir()):
            raise UserError(f"output {folder} is not the folder of a search: it has files but no search.json. Give another --output.")
        if not folder.is_dir() and (complaint := output_complaint(folder)):
            raise UserError(complaint)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(decides, indent=1), path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}"))
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Give another --output.") from error
    changed = [
        f"  {name}: {before.get(name)} in the search so far, {decides.get(name)} now"
        for name in sorted({*before, *decides})
        if before.get(name) != decides.get(name)
    ]
    if changed:
        raise UserError("\n".join([f"{folder} has another search:", *changed, "Give another --output, or the settings of that search."]))


def _lines(path: Path, names: Sequence[str] = ()) -> Iterator[dict]:
    """Yield the entries of metrics.jsonl that have one of `names` (default: all), without a line that a killed run left half written."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        if not names or any(name in line for name in names):
            with contextlib.suppress(ValueError):
                yield json.loads(line)
