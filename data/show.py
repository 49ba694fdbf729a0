"""What a rank read at a step, document by document: python data/show.py prepared/ --step 100 --rank 0, or --run runs/x --step 100"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import UserError, flatten, read_settings, run_script
from data.sampling.batch_plan import BatchPlan, BatchSettings
from data.sampling.settings import Architecture, SamplingSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data.sampling.samples import Piece, Sample
    from data.sampling.sources import Sampling

_ALWAYS_GIVEN = ("run", "step", "rank", "characters")
"""What no run.json says."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    sequence_length: int = 256
    """Tokens of a sample."""
    document_mask: bool = False
    """Documents of a sample do not see one another."""
    architecture: Architecture = "decoder"
    """What the objective follows from, where data.objective does not say."""
    token_types: int = 0
    """Texts of a sample that an encoder tells apart."""


@dataclasses.dataclass(frozen=True)
class ShowSettings:
    """What decides which samples come when has the names and defaults that it has in a recipe; --run takes it from a run."""

    run: str | None = None
    """Folder of a run: settings that are not given here are what its run.json says, all but step, rank and characters."""
    step: int = 1
    """Optimizer step, counted as the console and TensorBoard do: the first is 1."""
    rank: int = 0
    """Data-parallel rank."""
    world_size: int = 1
    """Data-parallel ranks."""
    characters: int = 200
    """Most of each document's text that is shown, half of its beginning and half of its end; 0: all of it."""
    data: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    batch: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    seed: int = 1
    """Of the run: it decides the order of samples."""


def main(arguments: Sequence[str]) -> None:
    for line in show(read_show_settings(arguments)):
        print(line)


def read_show_settings(arguments: Sequence[str]) -> ShowSettings:
    """Settings from the command line, where the words before the first option are folders, over those of a run."""
    folders = next((number for number, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    words = (["--data.path"] if folders else []) + list(arguments)
    aliases = {"--data": "--data.path"}
    return read_settings(ShowSettings, words, "Show what a rank read at a step.", aliases=aliases, defaults=_of_run)


def show(settings: ShowSettings) -> Iterator[str]:
    """The lines that tell a rank's micro-batches of a step, row by row. Raises UserError where there is no such step or rank."""
    _refuse_impossible(settings)
    # Only needed once the settings are right: --help need not wait for torch.
    from data.sampling.batches import TrainingBatches
    from data.sampling.samples import Sample
    from data.sampling.sources import open_folders, open_sampling

    if settings.run and (changes := _changes_of_run(settings.run)):
        yield f"The run went on with changes: {'; '.join(changes)}; steps before that were read otherwise."
    model, batch = settings.model, settings.batch
    of_model = (model.sequence_length, model.document_mask, settings.seed, model.architecture, model.token_types)
    sampling = open_sampling(open_folders(settings.data.path), settings.data, *of_model)
    batch = dataclasses.replace(batch, micro_batch_size=batch.micro_batch_size or batch.accumulation_steps(settings.world_size))
    plan = BatchPlan(batch, model.sequence_length)
    batches = TrainingBatches(sampling.samples, sampling.blend, plan, settings.rank, settings.world_size)
    yield (
        f"step {settings.step}, rank {settings.rank} of {settings.world_size}: samples of {model.sequence_length}"
        f"{f' and {sampling.target_length}' if sampling.target_length else ''} tokens, {sampling.objective.brief}, seed {settings.seed}"
    )
    micro_batches = zip(batches.step_samples(settings.step - 1).tolist(), batches.step(settings.step - 1), strict=True)
    for number, (samples, micro_batch) in enumerate(micro_batches):
        for row, (source, epoch, sample) in enumerate(samples):
            yield f"micro-batch {number}, row {row}: {sampling.names[source]}, epoch {epoch}, sample {sample}"
            read = Sample(*(None if field is None else field[row].numpy() for field in micro_batch))
            yield from _row(sampling, source, sample, read, settings.characters)


def _row(sampling: "Sampling", source: int, number: int, sample: "Sample", characters: int) -> Iterator[str]:
    """The lines of a sample: its documents and their text as its objective orders them, its class and its padding."""
    for part in sampling.objective.shown_parts(sample, sampling.samples[source].documents(number)):
        if part.piece is not None:
            yield f"{_taken(sampling, source, part.piece)}{part.remark}"
        for name, tokens in part.texts:
            yield f"    {name}{': ' if name else ''}{_shortened(_spelt(sampling, tokens), characters)}"
    if sample.classes is not None:
        yield f"    class: {int(sample.classes)}"
    padding = sum(int((segments == 0).sum()) for segments in (sample.segments, sample.source_segments) if segments is not None)
    if padding:
        yield f"  {padding} positions of padding"


def _taken(sampling: "Sampling", source: int, piece: "Piece") -> str:
    """Where a document came from, and which of its tokens a sample has."""
    folder, stream = list(sampling.folders.values())[source], sampling.samples[source].stream
    length = stream.document_start(piece.document + 1) - stream.document_start(piece.document)
    taken = f"all {length} tokens" if piece.count == length else f"tokens {piece.first} to {piece.first + piece.count - 1} of {length}"
    return f"  {folder.place_of('train', piece.document)}: {taken}"


def _spelt(sampling: "Sampling", ids: "NDArray[np.int64]") -> str:
    """The text of the ids in one line of Python's spelling, special tokens by their names.  [n]"""
    tokenizer, named = sampling.tokenizer, sampling.tokenizer.special_names
    parts, ordinary = [], []
    for token in [*ids.tolist(), None]:
        if token is not None and token not in named:
            ordinary.append(token)
            continue
        if ordinary:
            parts.append(repr(tokenizer.decode(ordinary)))
            ordinary = []
        if token is not None:
            parts.append(named[token])
    return " ".join(parts)


def _shortened(text: str, characters: int) -> str:
    if not characters or len(text) <= characters:
        return text
    return f"{text[: characters - characters // 2]} ... {text[len(text) - characters // 2 :]}"


def _of_run(given: dict) -> dict:
    """The settings that a run's run.json holds, flat by dotted name."""
    if given.get("run") in (None, "null"):
        return {}
    about = _record_of(given["run"])
    try:
        recipe, merged = flatten(about["recipe"]), about["deepspeed"]
        if "data.packing" not in recipe:
            raise UserError(
                f"--run {given['run']} was written by a version whose samples began one token later: what it read is not shown by this one."
            )
        recipe["world_size"] = recipe["batch.global_batch_size"] // (
            recipe["batch.micro_batch_size"] * merged["gradient_accumulation_steps"]
        )
        known = {name: default for name, default in flatten(dataclasses.asdict(ShowSettings())).items() if name not in _ALWAYS_GIVEN}
        # An earlier version wrote nothing of objectives, and did what the defaults say.
        return {
            name: recipe.get(name, default) if name.startswith(("data.", "model.")) else recipe[name] for name, default in known.items()
        }
    except UserError:
        raise
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise _not_ours(given["run"], error) from error


def _changes_of_run(run: str) -> list[str]:
    """Those of the changes with which a run went on that decide what is read, with their times."""
    deciding = flatten(dataclasses.asdict(ShowSettings()))
    try:
        changes = [(line, change["time"]) for change in _record_of(run).get("changes", []) for line in change["lines"]]
        return [f"{line} ({when})" for line, when in changes if line.startswith("the ") or line.split(":")[0] in deciding]
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_ours(run, error) from error


def _record_of(run: str) -> dict:
    path = Path(run) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--run {run}: {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise _not_ours(run, error) from error


def _not_ours(run: str, error: Exception) -> UserError:
    return UserError(f"--run {run}: {Path(run) / 'run.json'} is not as this version writes it ({type(error).__name__}: {error}).")


def _refuse_impossible(settings: ShowSettings) -> None:
    least = {
        "world_size": (settings.world_size, 1),
        "step": (settings.step, 1),
        "rank": (settings.rank, 0),
        "characters": (settings.characters, 0),
        "model.sequence_length": (settings.model.sequence_length, 1),
        "batch.global_batch_size": (settings.batch.global_batch_size, 1),
        "batch.micro_batch_size": (1 if settings.batch.micro_batch_size is None else settings.batch.micro_batch_size, 1),
    }
    complaints = [f"{name} is {value}; it must be at least {bound}." for name, (value, bound) in least.items() if value < bound]
    if settings.rank >= settings.world_size:
        complaints.append(f"rank is {settings.rank}; with world_size {settings.world_size} it must be at most {settings.world_size - 1}.")
    if complaints:
        raise UserError("\n".join(complaints))
    settings.batch.accumulation_steps(settings.world_size, "world_size")


if __name__ == "__main__":
    run_script(main)
