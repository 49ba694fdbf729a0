"""The door to data: corpus -> tokens -> memory-mapped shards.

    python data/prepare.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output prepared/

With nothing else, the text is Python's own standard library, and the tokenizer is learnt from it. A command that was ended, however
hard, goes on when it is given again; on several nodes each gives it with its own --rank (SLURM says it by itself).
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from data.command_line import UserError, read_settings, run_script
from data.files import lock_file
from data.preparation.duplicates import bands_for
from data.preparation.fields import Fields
from data.preparation.filters import FilterSettings, check
from data.preparation.preparation import PLAN, Preparation, changes
from data.preparation.sources import (
    STANDARD_INPUT,
    Corpus,
    FileCorpus,
    dataset_corpus,
    embedded_corpus,
    file_corpus,
    keep_standard_input,
    spelt,
)
from data.preparation.work_units import OnError
from data.preparation.workers import WorkerLost
from data.shards import MANIFEST, MANIFEST_FORMAT, PreparedData, Shard, read_manifest
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer

_LARGEST_VOCABULARY = 2**31 - 1
_NOT_RECORDED = ("output", "workers", "rank", "world_size", "unit_megabytes", "max_errors", "tokenizer", "end_of_text")
"""Settings that change no byte of the result, and the tokenizer, of which a hash is recorded."""


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and how."""

    input: tuple[str, ...] = ()
    """Files, folders (read whole) and globs: .txt .md .py and other plain text, .jsonl .ndjson, .csv .tsv, .parquet, .arrow, each plain or
    .gz .zst .xz .bz2; .idx or .bin: a token file that Megatron-LM or gpt-neox wrote with the same tokenizer; - is standard input, which
    is kept in the output's folder until it is done. With neither input nor dataset: the source and documentation of Python's standard
    library."""
    input_format: Literal["txt", "jsonl", "csv", "tsv", "parquet", "arrow"] | None = None
    """How every file is read, whatever its name says; standard input needs it."""
    dataset: str | None = None
    """A Hugging Face dataset instead: NAME, NAME:CONFIG or a folder that one can be loaded from. It is streamed."""
    dataset_split: str = "train"
    """Which split of the dataset to read."""
    text_field: str = "text"
    """The field (column) of a record that holds the text."""
    pair_field: str | None = None
    """A second field of each record, its translation or label (text or a whole number): each document is then two sequences."""
    columns: tuple[str, ...] = ()
    """Names of the columns of .csv and .tsv files whose first line does not have them."""
    separator: str | None = None
    """What parts the documents of a plain text file: "blank" (empty lines), "line" (each line is one), or a marker that stands on lines
    of its own (default: a document a file)."""
    output: str = "prepared"
    """The folder to make. What is there already is never overwritten. Unfinished work is kept in OUTPUT.partial."""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, a .tiktoken, or a folder with one of them. Without it one is learnt from
    the text."""
    end_of_text: str | None = None
    """The token of a given tokenizer that ends each document, where its files do not say."""
    gigatoken: bool = True
    """Tokenize with gigatoken, several times faster, where it gives the same ids; that is looked at at the start and in every unit."""
    vocab_size: int = 4096
    """Ids of the tokenizer to learn, the 256 bytes among them."""
    tokenizer_kind: Literal["bpe", "unigram"] = "bpe"
    """How the tokenizer is learnt: bpe packs tighter and learns faster, unigram tokenizes faster."""
    pieces_within_words: bool = False
    """Pieces of the tokenizer to learn do not go on behind a space or from a letter to another sign: for translation, and where whole
    words are to be masked. Off: text of the same length has fewer tokens."""
    tokenizer_characters: int = 20_000_000
    """Characters of text to learn the tokenizer from, taken from the beginning of files all over the corpus."""
    special_tokens: tuple[str, ...] = ()
    """Further tokens of the tokenizer to learn, that no text becomes: such as those of fill-in-the-middle."""
    held_out: float = 0.02
    """Share of the documents kept for validation, from 0 to below 1, chosen by a hash of each one's text."""
    exact_duplicates: Literal["drop", "keep"] = "drop"
    """Of documents with the very same text the first stays, or all do."""
    near_duplicates: Literal["keep", "held_out", "drop"] = "keep"
    """held_out: no held-out document nearly equals a training one; drop: of those that nearly equal one another, one stays."""
    near_duplicate_similarity: float = 0.8
    """Share of common shingles of five words (Jaccard, by MinHash) from which documents nearly equal one another; above 0, at most 1."""
    filters: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    on_error: OnError = "fail"
    """A record that is no text: fail stops and names it; skip counts it; quarantine writes it to OUTPUT/quarantine.jsonl too. Work that
    is done when it fails is kept, and the same command with skip or quarantine goes on from there."""
    max_errors: int = 1000
    """So many such records are passed over; more stop the work."""
    shard_tokens: int = 2**28
    """Tokens after which a new shard is begun."""
    unit_megabytes: float | None = None
    """Input that a process takes at a time, and loses at most in a crash (default: by the size of the corpus, 4 to 64)."""
    workers: int = 0
    """Processes that work at a time; 0 is one a core. The output does not depend on it."""
    rank: int | None = None
    """Which of several nodes this is, from 0 (default: as srun says, else 0). The output does not depend on their number either."""
    world_size: int | None = None
    """How many nodes work on this corpus, each with its own rank and the same disk (default: as srun says, else 1)."""


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(PrepareSettings, arguments, __doc__)
    signal.signal(signal.SIGTERM, _interrupt)
    partial = _partial_of(Path(settings.output))
    try:
        prepare(settings)
    except (KeyboardInterrupt, WorkerLost) as error:
        kept = f"What is done is kept in {partial}; the same command goes on from there." if partial.exists() else "Nothing was done yet."
        print(f"{str(error) or 'Stopped.'} {kept}", file=sys.stderr)
        return 1 if isinstance(error, WorkerLost) else 128 + (signal.SIGTERM if str(error) else signal.SIGINT)
    return 0


def prepare(settings: PrepareSettings, progress: Callable[[str], object] = print) -> PreparedData | None:
    """Make the folder `settings.output`, or find that it is there as these settings would make it; None where other nodes still work.

    The folder appears whole or not at all. A folder that holds anything else is refused with UserError, as is a bad input.
    """
    rank, world_size = _who(settings)
    _check(settings)
    given = load_tokenizer(settings.tokenizer, settings.end_of_text) if settings.tokenizer else None
    output = Path(settings.output)
    partial = _partial_of(output)
    if os.path.lexists(output):
        _refuse_other(output, _record(settings, _corpus(settings, None), given))
        if (partial / PLAN).exists() and not (partial / "whole").exists():  # it became the output, and then the process was ended
            shutil.rmtree(partial, ignore_errors=True)
        progress(f"{output} holds exactly this already: nothing to do.")
        return PreparedData(output)
    corpus = None if STANDARD_INPUT in settings.input else _corpus(settings, None)  # mistakes first
    if isinstance(corpus, FileCorpus):
        _say_what_is_not_read(corpus.not_read, progress)
        if given:
            _refuse_other_end(corpus, given)
    try:
        with ExitStack() as held:
            _take(partial, rank, held)
            if os.path.lexists(output):  # another rank finished it since, and this made the folder anew
                shutil.rmtree(partial, ignore_errors=True)
                return prepare(settings, progress)
            try:
                corpus = corpus or _corpus(settings, partial)
                recorded = _record(settings, corpus, given)
                preparation = Preparation(settings, corpus, given, partial, rank, world_size, progress)
                preparation.agree(recorded)
            except BaseException:
                if not (partial / PLAN).exists() and len(list(partial.glob("rank-*.lock"))) == 1:  # nobody has done anything here yet
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            with preparation.workers() as workers:
                preparation.tokenize(workers)
                if not preparation.join(workers, recorded, output):
                    return None
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:  # a full disk, a folder that may not be written
        if isinstance(error, FileNotFoundError) and (output / MANIFEST).exists():
            progress(f"{output} was finished by another rank.")
            return PreparedData(output)
        kept = f" What is done is kept in {partial}; the same command goes on from there." if partial.exists() else ""
        raise UserError(f"{output} cannot be written: {error.strerror or error}.{kept}") from error
    return PreparedData(output)


def _interrupt(*signal_and_frame: object) -> NoReturn:
    raise KeyboardInterrupt("Stopped by SIGTERM.")


def _partial_of(output: Path) -> Path:
    if not output.name:
        raise UserError(f'--output "{output}" names no folder that can be made.')
    return output.with_name(f"{output.name}.partial")


def _who(settings: PrepareSettings) -> tuple[int, int]:
    """(rank, world size): as given, else as srun says."""
    rank, size = settings.rank, settings.world_size
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        rank = int(os.environ["SLURM_PROCID"]) if rank is None else rank
        size = int(os.environ["SLURM_STEP_NUM_TASKS"]) if size is None else size
    rank, size = rank or 0, 1 if size is None else size
    if size < 1:
        raise UserError(f"--world_size {size} must be at least 1.")
    if not 0 <= rank < size:
        raise UserError(f"--rank {rank} is outside 0 ... {size - 1}, the ranks of --world_size {size}.")
    return rank, size


def _check(settings: PrepareSettings) -> None:
    if settings.input and settings.dataset:
        raise UserError("--input and --dataset are both given; the text comes from one of them.")
    if settings.tokenizer and settings.vocab_size != PrepareSettings.vocab_size:
        raise UserError(f"--vocab_size {settings.vocab_size} is for a tokenizer to learn; --tokenizer {settings.tokenizer} has its own.")
    if settings.tokenizer and settings.pieces_within_words:
        raise UserError(f"--pieces_within_words is for a tokenizer to learn; --tokenizer {settings.tokenizer} has its own.")
    if settings.tokenizer and settings.special_tokens:
        raise UserError(f"--special_tokens is for a tokenizer to learn; --tokenizer {settings.tokenizer} has its own.")
    if settings.end_of_text and not settings.tokenizer:
        raise UserError("--end_of_text is for a given --tokenizer; a learnt one has its own.")
    if STANDARD_INPUT in settings.input and (len(settings.input) > 1 or settings.input_format is None):
        raise UserError("--input - is standard input, alone, and needs --input_format to say what it is.")
    if STANDARD_INPUT in settings.input and settings.input_format in ("parquet", "arrow"):
        raise UserError(f"--input_format {settings.input_format} cannot be read from standard input; txt, jsonl, csv and tsv can.")
    if STANDARD_INPUT in settings.input and _who(settings)[1] > 1:
        raise UserError("--input - is standard input, which only one node has; give files, or --world_size 1.")
    if settings.pair_field == settings.text_field:
        raise UserError(f'--pair_field "{settings.pair_field}" is the --text_field too; a pair has two.')
    if settings.separator is not None and (not settings.separator.strip() or set(settings.separator) & set("\r\n")):
        raise UserError(f'--separator {settings.separator!r} must be "blank", for empty lines, or one line that stands between documents.')
    if not 0 <= settings.held_out < 1:
        raise UserError(f"--held_out {settings.held_out} must be at least 0 and below 1.")
    bands_for(settings.near_duplicate_similarity)
    if settings.unit_megabytes is not None and not 0 < settings.unit_megabytes < float("inf"):
        raise UserError(f"--unit_megabytes {settings.unit_megabytes} must be above 0.")
    if settings.vocab_size > _LARGEST_VOCABULARY:
        raise UserError(f"--vocab_size {settings.vocab_size} must be at most {_LARGEST_VOCABULARY}.")
    least = {"vocab_size": 512, "tokenizer_characters": 1, "shard_tokens": 1, "workers": 0, "max_errors": 0}
    for name, smallest in least.items():
        if getattr(settings, name) < smallest:
            raise UserError(f"--{name} {getattr(settings, name)} must be at least {smallest}.")
    check(settings.filters)


def _corpus(settings: PrepareSettings, partial: Path | None) -> Corpus:
    """What is to be read; standard input is kept in `partial` or, where that is None, only looked at."""
    fields = Fields(settings.text_field, settings.pair_field, settings.columns, settings.separator, settings.input_format)
    if settings.dataset:
        return dataset_corpus(settings.dataset, settings.dataset_split, fields)
    if STANDARD_INPUT in settings.input:
        corpus = FileCorpus([keep_standard_input(partial)], fields)
    elif settings.input:
        output = Path(settings.output)
        corpus = file_corpus(settings.input, fields, without=(output, _partial_of(output)))
    else:
        return embedded_corpus()
    formats = {fields.format_of(file.path): file.path for file in corpus.files}
    for name in ("txt", "tokens"):
        if settings.pair_field is not None and name in formats:
            raise UserError(f"--pair_field {settings.pair_field}: {formats[name]} has no fields.")
    if settings.columns and not formats.keys() & {"csv", "tsv"}:
        raise UserError("--columns names those of .csv and .tsv files, and --input has none.")
    if settings.separator is not None and "txt" not in formats:
        raise UserError("--separator parts the documents of plain text, and --input has none.")
    if "tokens" in formats and not settings.tokenizer:
        raise UserError(f"{formats['tokens']} holds tokens; give the --tokenizer that they were made with.")
    return corpus


def _say_what_is_not_read(names: Sequence[str], progress: Callable[[str], object]) -> None:
    if names:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        progress(f"Not read are {len(names):,} files whose names say no format: {some}. --input_format reads every file in one way.")


def _refuse_other_end(corpus: FileCorpus, tokenizer: Tokenizer) -> None:
    """UserError where every document of a token file ends with one token, and that is not the tokenizer's end of text."""
    for file in corpus.files:
        if corpus.fields.format_of(file.path) == "tokens":
            shard = Shard(file.path.with_suffix(""))
            ends = {int(shard.tokens[shard.document_start(number + 1) - 1]) for number in range(min(shard.num_documents, 100))}
            if shard.num_documents > 10 and len(ends) == 1 and ends != {tokenizer.end_of_text}:
                raise UserError(
                    f"The documents of {file.path} end with token {ends.pop()}, and {tokenizer.path} ends them with "
                    f"{tokenizer.end_of_text}: it is another tokenizer, or --end_of_text is to say which token it is."
                )


def _record(settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer | None) -> dict:
    """What decides the tokens: a folder with the same record holds the same."""
    chosen = dataclasses.asdict(settings) | {name: list(getattr(settings, name)) for name in ("columns", "special_tokens")}
    chosen["input"] = [spelt(Path(given)) for given in settings.input]
    for name in _NOT_RECORDED:
        del chosen[name]
    given = None
    if tokenizer:
        digest = hashlib.sha256(tokenizer.file_bytes()).hexdigest()
        given = {"sha256": digest, "end_of_text": tokenizer.end_of_text, "settings": tokenizer.settings}
    text = hashlib.sha256(json.dumps(corpus.identity()).encode()).hexdigest()
    return {"format": MANIFEST_FORMAT, "settings": chosen, "text": text, "given_tokenizer": given}


def _refuse_other(output: Path, recorded: dict) -> None:
    """UserError where the folder that is there is not the one that was asked for."""
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} exists and is no prepared folder; nothing is overwritten. Give another --output.")
    if changed := changes(read_manifest(output), recorded):
        raise UserError(f"{output} exists and was prepared from other text or with other settings: {changed}. Give another --output.")


def _take(partial: Path, rank: int, held: ExitStack) -> None:
    """Hold the folder of unfinished work for this rank, until `held` is left."""
    if partial.exists() and any(partial.iterdir()) and not any(partial.glob("rank-*.lock")):
        raise UserError(f"{partial}, where unfinished work is kept, exists and is something else. Give another --output.")
    partial.mkdir(parents=True, exist_ok=True)
    if (lock := lock_file(partial / f"rank-{rank}.lock")) is None:
        raise UserError(f"Another process is preparing {partial} as rank {rank}. Wait for it, or give another --output.")
    held.enter_context(lock)


if __name__ == "__main__":
    run_script(main)
