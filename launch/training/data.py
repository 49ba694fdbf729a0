"""The prepared data of a run, made on the spot where the default corpus is wanted and missing."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

from data.command_line import UserError
from data.order import Blend
from data.prepare import PrepareSettings, prepare
from data.sampling import Sampling, open_folders, open_sampling
from data.shards import TokenStream
from launch.training.config import DataSettings, RunSettings

_HASHED_AT_START = 4 << 30  # bytes that are hashed in two or three seconds; above, sizes and indexes are checked, and ids while reading


@dataclasses.dataclass(frozen=True)
class RunData:
    sampling: Sampling
    """What is trained on."""
    tokenizer_path: Path
    fingerprint: str
    """One hash for all tokens of all sources, in their order."""

    @property
    def held_out(self) -> dict[str, TokenStream]:
        """The validation split of each source that has one, by the source's name."""
        splits = {name: folder.splits["validation"] for name, folder in self.sampling.folders.items()}
        return {name: stream for name, stream in splits.items() if len(stream)}


def open_data(settings: RunSettings) -> RunData:
    """Open the prepared folders. Raises UserError where one is missing or damaged or does not fit the others, the model or the run."""
    folders = open_folders(settings.data.path)
    if sum(folder.stored_bytes for folder in folders.values()) < _HASHED_AT_START:
        for folder in folders.values():
            folder.verify()
    first = next(iter(folders.values()))
    if first.vocab_size > settings.model.vocab_size:
        raise UserError(
            f"model.vocab_size {settings.model.vocab_size} is too small for {first.folder}: its tokens go up to {first.vocab_size - 1}.\n"
            f"Nearest: {first.vocab_size}, or {-(-first.vocab_size // 128) * 128} for round matrices."
        )
    sampling = open_sampling(folders, settings.data, settings.model.sequence_length, settings.model.document_mask, settings.seed)
    _refuse_too_many_epochs(settings, sampling)
    fingerprints = [folder.fingerprint for folder in folders.values()]
    together = fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()
    return RunData(sampling, first.tokenizer_path, together)


def _refuse_too_many_epochs(settings: RunSettings, sampling: Sampling) -> None:
    """Raise UserError where the run reads a source more often than data.max_epochs, with what would fit."""
    limit = settings.data.max_epochs
    positions = settings.steps * settings.batch.global_batch_size
    epochs = sampling.blend.epochs(positions).tolist()
    most = max(range(len(epochs)), key=epochs.__getitem__)
    if limit is None or epochs[most] <= limit:
        return
    fitting = _longest(sampling.blend, limit, settings.batch.global_batch_size, settings.steps)
    hundredths = -(
        -100 * int(sampling.blend.counts(positions)[most]) // int(sampling.blend.sizes[most])
    )  # up: 1.00 would be no more than 1
    raise UserError(
        f"{sampling.names[most]} would be read {hundredths / 100:.2f} times in {settings.steps:,} steps; data.max_epochs is {limit:g}.\n"
        + (f"Nearest: train_steps {fitting:,} would fit." if fitting else "Not even one step would fit.")
    )


def _longest(blend: Blend, limit: float, global_batch_size: int, steps: int) -> int:
    """The most steps after which no source has been read more than `limit` times. A bisection: epochs only grow."""
    fits, too_many = 0, steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if blend.epochs(middle * global_batch_size).max() <= limit else (fits, middle)
    return fits


def will_be_prepared(settings: RunSettings) -> bool:
    """The default folder is wanted, and missing."""
    return settings.data.path == DataSettings().path and not Path(settings.data.path[0]).exists()


def prepare_embedded_corpus(settings: RunSettings) -> None:
    """Make the default folder: by one rank."""
    if settings.data.vocab_size > settings.model.vocab_size:
        raise UserError(f"data.vocab_size {settings.data.vocab_size} is above model.vocab_size {settings.model.vocab_size}.")
    (path,) = settings.data.path
    print(f"{path}/ is not there: preparing the embedded corpus, the source text of Python's standard library.", flush=True)
    prepare(PrepareSettings(output=path, vocab_size=settings.data.vocab_size))


def wait_for(path: Path, seconds: float = 60) -> None:
    """Until a folder that another machine has just made is seen here too: a network disk may take its time. Not raised if it never is."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
