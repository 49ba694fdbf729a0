"""Settings of data/show.py, given on the command line or read from a run. This module imports nothing heavy."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from data.command_line import UserError, describe, flatten, read_settings
from data.recorded_paths import require_path
from data.sampling.batch_plan import BatchSizes, Segment, read_segments
from data.sampling.settings import Architecture, SamplingSettings

_NOT_FROM_RUN = ("run", "step", "rank", "characters")
"""Settings that run.json does not contain."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Settings of the model that decide which samples are read."""

    sequence_length: Annotated[int, Gt(0)] = 256
    """Number of tokens in a sample."""
    document_mask: bool = False
    """Documents in one sample do not attend to each other."""
    architecture: Architecture = "decoder"
    """Architecture, which determines the default of data.objective."""
    token_types: Annotated[int, Ge(0)] = 0
    """Number of token types of an encoder; 0: none."""


@dataclasses.dataclass(frozen=True)
class ShowSettings:
    """Settings of data/show.py. Those that decide which samples are read have the names and defaults of a recipe."""

    run: str | None = None
    """Run folder. Its run.json gives all settings that are not given here, except step, rank and characters."""
    step: Annotated[int, Gt(0), Lt(2**31)] = 1
    """Optimizer step, counted from 1, as on the console and in TensorBoard."""
    rank: Annotated[int, Ge(0)] = 0
    """Data-parallel rank, from 0."""
    world_size: Annotated[int, Gt(0)] = 1
    """Number of data-parallel ranks."""
    characters: Annotated[int, Ge(0)] = 200
    """Maximum number of characters to show of each document, half from its beginning and half from its end; 0: no limit."""
    data: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    batch: BatchSizes = dataclasses.field(default_factory=BatchSizes)
    seed: int = 1
    """Seed of the run, which determines the order of samples."""

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is not allowed."""
        if self.rank >= self.world_size:
            return [f"{describe(self, 'rank')} must be below {describe(self, 'world_size')}."]
        if self.batch.is_seesaw and not self.run:
            return [f"{describe(self, 'batch.ramp')} needs run: its sizes follow from the schedule of a run."]
        try:
            if not self.batch.ramp:  # of a ramp, the step that is shown decides
                self.batch.accumulation_steps(self.world_size, "world_size")
        except UserError as error:
            return [str(error)]
        return []


def read_show_settings(arguments: Sequence[str]) -> ShowSettings:
    """Read the settings from a command line; arguments before the first option are prepared folders."""
    starts_with_folders = arguments and not arguments[0].startswith("--")
    return read_settings(
        ShowSettings,
        ["--data.path", *arguments] if starts_with_folders else arguments,
        "Show what a rank read at a step, document by document.",
        aliases={"--data": "--data.path"},
        defaults=_settings_of_run,
        defaults_from=["run"],
    )


def _settings_of_run(given: dict) -> dict:
    """Return the settings in the run.json of the run that is given, flat by dotted name; empty if none is given."""
    if given.get("run") in (None, "null"):
        return {}
    record = read_run_record(given["run"])
    try:
        recipe, deepspeed = flatten(record["recipe"]), record["deepspeed"]
        if "data.packing" not in recipe:
            raise UserError(
                f"--run {given['run']} was written by a version whose samples began one token later; this version cannot show them."
            )
        if "paths" in record:
            recipe["data.path"] = [require_path(one, Path(given["run"]), "--data") for one in record["paths"]["data.path"]]
        samples_per_rank = recipe["batch.micro_batch_size"] * deepspeed["gradient_accumulation_steps"]
        if recipe.get("batch.ramp"):  # whose sizes differ from that in DeepSpeed's JSON
            samples = deepspeed["train_batch_size"] // recipe["sequence_parallel_size"]  # DeepSpeed counts each part of a sequence
        else:
            samples = recipe["batch.global_batch_size"]
        recipe["world_size"] = samples // samples_per_rank
        defaults = {name: value for name, value in flatten(dataclasses.asdict(ShowSettings())).items() if name not in _NOT_FROM_RUN}
        # Older versions did not write the settings of objectives; their runs used what are the defaults now.
        return {
            name: recipe.get(name, default) if name.startswith(("data.", "model.", "batch.")) else recipe[name]
            for name, default in defaults.items()
        }
    except UserError:
        raise
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise _invalid_record(given["run"], error) from error


def segments_of_run(settings: ShowSettings) -> tuple[Segment, ...]:
    """Return how many samples each step of the run read; empty if no run is given, or another batch size than the run's."""
    record = read_run_record(settings.run) if settings.run else {}
    try:
        segments = read_segments(record.get("batch_plan", []))
        own = {name: record.get("recipe", {}).get("batch", {}).get(name) for name in ("global_batch_size", "ramp")}
    except (TypeError, AttributeError) as error:
        raise _invalid_record(str(settings.run), error) from error
    return segments if own == {name: getattr(settings.batch, name) for name in own} else ()


def changes_of_run(run: str) -> list[str]:
    """Return the changes, each with its time, that a run was resumed with and that decide which samples an earlier step read.

    A change of the batch size is not among them if run.json holds the batch plan.
    """
    names = flatten(dataclasses.asdict(ShowSettings()))
    try:
        record = read_run_record(run)
        if "batch_plan" in record:
            del names["batch.global_batch_size"], names["batch.ramp"]
        changes = [(line, change["time"]) for change in record.get("changes", []) for line in change["lines"]]
        return [f"{line} ({time})" for line, time in changes if line.startswith("the ") or line.split(":")[0] in names]
    except (KeyError, TypeError, AttributeError) as error:
        raise _invalid_record(run, error) from error


def read_run_record(run: str) -> dict:
    """Return the content of a run's run.json. Raise UserError if it cannot be read."""
    path = Path(run) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--run {run}: {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise _invalid_record(run, error) from error


def _invalid_record(run: str, error: Exception) -> UserError:
    path = Path(run) / "run.json"
    return UserError(f"--run {run}: {path} does not have the content that this version writes ({type(error).__name__}: {error}).")
