"""The prepared data of a run, made on the spot where the default corpus is wanted and missing."""

import dataclasses
import time
from pathlib import Path

from data.command_line import UserError
from data.prepare import PrepareSettings, prepare
from data.shards import PreparedData, TokenStream
from data.tokenizer import Tokenizer, load_tokenizer
from launch.training.config import DataSettings, RunSettings

_HASHED_AT_START = 4 << 30  # bytes that are hashed in two or three seconds; above, sizes and indexes are checked, and ids while reading


@dataclasses.dataclass(frozen=True)
class RunData:
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    tokenizer_path: Path
    fingerprint: str


def open_data(settings: RunSettings) -> RunData:
    """Open the prepared folder. Raises UserError where it is missing or damaged or does not fit the model."""
    path = Path(settings.data.path)
    prepared = PreparedData(path)
    if prepared.stored_bytes < _HASHED_AT_START:
        prepared.verify()
    tokenizer_path = prepared.tokenizer_path
    tokenizer = load_tokenizer(tokenizer_path)
    if prepared.vocab_size > settings.model.vocab_size:
        raise UserError(
            f"model.vocab_size {settings.model.vocab_size} is too small for {path}: its tokens go up to {prepared.vocab_size - 1}.\n"
            f"Nearest: {prepared.vocab_size}, or {-(-prepared.vocab_size // 128) * 128} for round matrices."
        )
    return RunData(prepared.splits["train"], prepared.splits["validation"], tokenizer, tokenizer_path, prepared.fingerprint)


def will_be_prepared(settings: RunSettings) -> bool:
    """The default folder is wanted, and missing."""
    return settings.data.path == DataSettings().path and not Path(settings.data.path).exists()


def prepare_embedded_corpus(settings: RunSettings) -> None:
    """Make the default folder: by one rank."""
    if settings.data.vocab_size > settings.model.vocab_size:
        raise UserError(f"data.vocab_size {settings.data.vocab_size} is above model.vocab_size {settings.model.vocab_size}.")
    path = settings.data.path
    print(f"{path}/ is not there: preparing the embedded corpus, the source text of Python's standard library.", flush=True)
    prepare(PrepareSettings(output=path, vocab_size=settings.data.vocab_size))


def wait_for(path: Path, seconds: float = 60) -> None:
    """Until a folder that another machine has just made is seen here too: a network disk may take its time. Not raised if it never is."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
