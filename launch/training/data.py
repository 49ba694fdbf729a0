"""Prepared data of a run; the embedded corpus is prepared here if it is wanted and missing."""

import dataclasses
import time
from pathlib import Path

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.sampling.batch_plan import BatchPlan
from data.sampling.order import Blend
from data.sampling.samples import Samples
from data.sampling.sources import Sampling, fingerprint_of, open_folders, open_held_out, open_sampling
from data.tokenization.huggingface_files import export_problem
from launch.checkpoints import run_record
from launch.evaluation.tasks.table import TASKS
from launch.training.settings import DataSettings, RunSettings

_MAX_CHECKED_IDS = 65_536  # largest vocabulary whose export is tried at the start: 32,000 ids take half a second
_MAX_HASHED_BYTES = 4 << 30
"""Tokens of at most this size are hashed at every start, in two or three seconds. Of more, sizes and indexes are checked at the first
start, and the files that were written since then are hashed when the run resumes."""


@dataclasses.dataclass(frozen=True)
class RunData:
    """Data of a run, opened and checked."""

    sampling: Sampling
    """Training split of the sources and their blend."""
    held_out: dict[str, Samples]
    """Samples of the validation split of each source that has one, by the source's name."""
    tokenizer_path: Path
    fingerprint: str
    """Hash of all tokens of all sources, in their order."""

    @property
    def export_problem(self) -> str | None:
        """Why a model that is trained with this tokenizer cannot be exported; None if it can, or if that would take long to find out."""
        tokenizer = self.sampling.tokenizer
        return export_problem(tokenizer) if tokenizer.vocab_size <= _MAX_CHECKED_IDS else None

    @property
    def stamps(self) -> list[dict[str, list[int]]]:
        """Size and time of every file, for run.json: what has other stamps at the next start is hashed then."""
        return [folder.stamps for folder in self.sampling.folders.values()]


def open_data(settings: RunSettings) -> RunData:
    """Open the prepared folders of a run.

    Raises UserError if one is missing or damaged, or does not fit the other folders or the model.
    """
    folders = open_folders(settings.data.path)
    if sum(folder.stored_bytes for folder in folders.values()) < _MAX_HASHED_BYTES:
        for folder in folders.values():
            folder.verify()
    else:
        for folder, stamps in zip(folders.values(), run_record.data_stamps(Path(settings.output)), strict=False):
            folder.verify(stamps)
    first = next(iter(folders.values()))
    if first.vocab_size > settings.model.vocab_size:
        raise UserError(
            f"model.vocab_size {settings.model.vocab_size} is too small for {first.folder}: its tokens go up to {first.vocab_size - 1}.\n"
            f"Nearest: {first.vocab_size}, or {-(-first.vocab_size // 128) * 128} for round matrices."
        )
    model = settings.model
    sampling = open_sampling(
        folders, settings.data, model.sequence_length, model.document_mask, settings.seed, model.architecture, model.token_types
    )
    if complaints := TASKS[sampling.objective.name].model_complaints(model, settings.data):
        raise UserError("\n".join(complaints))
    held_out = open_held_out(folders, settings.data, model.sequence_length, model.document_mask, model.architecture, model.token_types)
    return RunData(sampling, held_out, first.tokenizer_path, fingerprint_of(folders.values()))


def refuse_too_many_epochs(limit: float | None, sampling: Sampling, plan: BatchPlan) -> None:
    """Raise UserError if a run reads a source for more than `limit`, data.max_epochs, and name the longest run that fits."""
    positions = plan.position(plan.steps)
    epochs = sampling.blend.epochs(positions).tolist()
    most = max(range(len(epochs)), key=epochs.__getitem__)
    if limit is None or epochs[most] <= limit:
        return
    fitting = _longest(sampling.blend, limit, plan)
    reads, size = int(sampling.blend.counts(positions)[most]), int(sampling.blend.sizes[most])
    nearest = f"train_steps {fitting:,}" if plan.train_tokens is None else f"train_tokens {plan.tokens_before(fitting)}"
    hundredths = -(-100 * reads // size)  # rounded up, because 1.00 would not be more than a limit of 1
    raise UserError(
        f"{sampling.names[most]} would be read for {hundredths / 100:.2f} epochs in {plan.steps:,} steps; data.max_epochs is {limit:g}.\n"
        + (f"Nearest: {nearest}." if fitting else "Not even one step fits; raise data.max_epochs or prepare more text.")
    )


def _longest(blend: Blend, limit: float, plan: BatchPlan) -> int:
    """Return the most steps after which no source has been read for more than `limit` epochs, by bisection."""
    fits, too_many = 0, plan.steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if blend.epochs(plan.position(middle)).max() <= limit else (fits, middle)
    return fits


def will_be_prepared(settings: RunSettings) -> bool:
    """True if the run wants the default folder and it does not exist."""
    return settings.data.path == DataSettings().path and not Path(settings.data.path[0]).exists()


def prepare_embedded_corpus(settings: RunSettings) -> None:
    """Prepare the default folder; only one rank may call this. Raises UserError if its vocabulary is larger than the model's."""
    if settings.data.vocab_size > settings.model.vocab_size:
        raise UserError(f"data.vocab_size {settings.data.vocab_size} is above model.vocab_size {settings.model.vocab_size}.")
    (path,) = settings.data.path
    print(f"{path}/ does not exist: preparing the embedded corpus, the source text of Python's standard library.", flush=True)
    prepare(PrepareSettings(output=path, vocab_size=settings.data.vocab_size))


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a folder that another machine has just made is visible here too, on a network disk; at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
