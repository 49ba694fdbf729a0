"""The prepared data of a run, made on the spot where the default corpus is wanted and missing."""

import dataclasses
import time
from pathlib import Path

from data.command_line import UserError
from data.prepare import PrepareSettings, prepare
from data.shards import PreparedData, TokenStream
from data.tokenizer import Tokenizer, load_tokenizer
from launch.training.config import DataSettings, RunSettings
from launch.training.processes import Process


@dataclasses.dataclass(frozen=True)
class RunData:
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    tokenizer_path: Path
    fingerprint: str


def open_data(settings: RunSettings, process: Process) -> RunData:
    """Open the prepared folder. Raises UserError where it is missing or damaged or does not fit the model."""
    path = Path(settings.data.path)
    if not path.exists() and settings.data.path == DataSettings().path:
        _prepare_embedded_corpus(settings, process)
    prepared = PreparedData(path)
    tokenizer_path = prepared.tokenizer_path
    tokenizer = load_tokenizer(tokenizer_path)
    if prepared.vocab_size > settings.model.vocab_size:
        raise UserError(
            f"model.vocab_size {settings.model.vocab_size} is too small for {path}: its tokens go up to {prepared.vocab_size - 1}.\n"
            f"Nearest: {prepared.vocab_size}, or {-(-prepared.vocab_size // 128) * 128} for round matrices."
        )
    return RunData(prepared.splits["train"], prepared.splits["validation"], tokenizer, tokenizer_path, prepared.fingerprint)


def _prepare_embedded_corpus(settings: RunSettings, process: Process) -> None:
    """Rank 0 prepares; the others wait for the folder, which appears when it is whole. No process group exists yet that could time out."""
    path = Path(settings.data.path)
    if process.is_first:
        print(f"{path}/ is not there: preparing the embedded corpus, the source text of Python's standard library.", flush=True)
        prepare(PrepareSettings(output=str(path), vocab_size=settings.data.vocab_size))
    while not path.exists():  # a failing rank 0 ends the job, and this loop with it
        time.sleep(0.2)
