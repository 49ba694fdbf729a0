"""The body of data/prepare.py: one preparation from the settings to the finished folder."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from data.command_line import UserError
from data.files import lock_file, parent_complaint
from data.preparation import joining
from data.preparation.corpus import (
    Corpus,
    FileCorpus,
    dataset_corpus,
    embedded_corpus,
    file_corpus,
)
from data.preparation.fields import Fields
from data.preparation.input_files import NO_KNOWN_SUFFIX, path_as_text, store_standard_input
from data.preparation.node import PLAN, Node, describe_changes
from data.preparation.settings import STANDARD_INPUT, PrepareSettings, partial_folder, rank_and_world_size
from data.preparation.workers import WorkerLost
from data.shards import MANIFEST, MANIFEST_FORMAT, PreparedData, Shard, read_manifest
from data.tokenization.huggingface_files import export_problem
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer

_NOT_RECORDED = ("output", "workers", "rank", "world_size", "unit_megabytes", "max_errors", "tokenizer", "end_of_text")
"""Settings that do not change the result, and the tokenizer, which is recorded as a hash."""


def run(settings: PrepareSettings) -> int:
    """Prepare the folder and return the exit status: 0 done, 1 a worker died, 130 or 143 stopped by SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)
    partial = partial_folder(Path(settings.output))
    try:
        prepare(settings)
    except (KeyboardInterrupt, WorkerLost) as error:
        print(f"{str(error) or 'Stopped.'}{_how_to_resume(partial) or ' Nothing was done yet.'}", file=sys.stderr)
        return 1 if isinstance(error, WorkerLost) else 128 + (signal.SIGTERM if str(error) else signal.SIGINT)
    return 0


def prepare(settings: PrepareSettings, log: Callable[[str], object] = print) -> PreparedData | None:
    """Write the folder `settings.output` and return it, or return it if it exists with the same content.

    Return None if other nodes still have work to do. The folder appears complete or not at all. Raise UserError if the settings or the
    input are invalid, or if the folder exists with other content.
    """
    settings.validate()
    rank, world_size = rank_and_world_size(settings)
    given_tokenizer = _given_tokenizer(settings)
    output = Path(settings.output)
    partial = partial_folder(output)
    if os.path.lexists(output):
        _refuse_other_content(output, _record_of(settings, _open_corpus(settings, None), given_tokenizer))
        if (partial / PLAN).exists() and not (partial / "whole").exists():  # the process died after its result became the output
            shutil.rmtree(partial, ignore_errors=True)
        log(f"{output} already contains the result of these settings: nothing to do.")
        return PreparedData(output)
    if complaint := parent_complaint(output):
        raise UserError(complaint)
    corpus = None if STANDARD_INPUT in settings.input else _open_corpus(settings, None)  # report a wrong input before a folder is made
    if isinstance(corpus, FileCorpus):
        _log_skipped_files(corpus.skipped_files, log)
        if settings.on_error == "fail":
            corpus.check_contents()
        if given_tokenizer:
            _refuse_other_end_of_text(corpus, given_tokenizer)
    if given_tokenizer and rank == 0:
        _log_export_problem(given_tokenizer, log)
    try:
        with ExitStack() as locks:
            _lock_partial_folder(partial, rank, locks)
            if os.path.lexists(output):  # another rank has finished it meanwhile, and _lock_partial_folder made the partial folder again
                shutil.rmtree(partial, ignore_errors=True)
                return prepare(settings, log)
            try:
                corpus = corpus or _open_corpus(settings, partial)
                record = _record_of(settings, corpus, given_tokenizer)
                node = Node(settings, corpus, given_tokenizer, partial, rank, world_size, log)
                node.open_plan(record)
            except BaseException:
                if not (partial / PLAN).exists() and len(list(partial.glob("rank-*.lock"))) == 1:  # no node has done anything here yet
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            with node.workers() as workers:
                node.tokenize(workers)
                if not joining.join(node, workers, record, output):
                    return None
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:  # for example a full disk, or a folder without write permission
        if isinstance(error, FileNotFoundError) and (output / MANIFEST).exists():
            log(f"{output} was finished by another rank.")
            return PreparedData(output)
        raise UserError(f"{output} cannot be written: {error.strerror or error}.{_how_to_resume(partial)}") from error
    return PreparedData(output)


def _interrupt(*signal_and_frame: object) -> NoReturn:
    raise KeyboardInterrupt("Stopped by SIGTERM.")


def _how_to_resume(partial: Path) -> str:
    """Return a sentence that names the finished work, or nothing if there is none."""
    return f" Finished work is kept in {partial}; give the same command again to resume." if partial.exists() else ""


def _open_corpus(settings: PrepareSettings, partial: Path | None) -> Corpus:
    """Open the text to read. Standard input is stored in `partial`; if that is None, it is only hashed."""
    fields = Fields(settings.text_field, settings.pair_field, settings.columns, settings.separator, settings.input_format)
    if settings.dataset:
        return dataset_corpus(settings.dataset, settings.dataset_split, fields)
    if STANDARD_INPUT in settings.input:
        corpus = FileCorpus([store_standard_input(partial)], fields)
    elif settings.input:
        output = Path(settings.output)
        corpus = file_corpus(settings.input, fields, excluded_folders=(output, partial_folder(output)))
    else:
        return embedded_corpus()
    if not any(file.size for file in corpus.files):
        raise UserError("The input is empty: every file has 0 bytes.")
    _check_formats(settings, {fields.format_of(file.path): file.path for file in corpus.files})
    return corpus


def _check_formats(settings: PrepareSettings, formats: dict[str, Path]) -> None:
    """Raise UserError if a setting does not fit the formats of the input. `formats` has one file of each format."""
    for name in ("txt", "tokens"):
        if settings.pair_field is not None and name in formats:
            raise UserError(f"--pair_field {settings.pair_field} applies only to records with fields; {formats[name]} has none.")
    if settings.columns and not formats.keys() & {"csv", "tsv"}:
        raise UserError("--columns applies only to .csv and .tsv files, and --input contains none.")
    if settings.separator is not None and "txt" not in formats:
        raise UserError("--separator applies only to plain text files, and --input contains none.")
    if "tokens" in formats and not settings.tokenizer:
        raise UserError(f"{formats['tokens']} contains tokens. Give the --tokenizer that it was written with.")


def _log_skipped_files(skipped: dict[str, list[str]], log: Callable[[str], object]) -> None:
    for reason, names in skipped.items():
        examples = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        advice = " --input_format reads files of any name." if reason == NO_KNOWN_SUFFIX else ""
        log(f"Files not read because the name {reason}: {len(names):,} ({examples}).{advice}")


def _log_export_problem(tokenizer: Tokenizer, log: Callable[[str], object]) -> None:
    """Log now what the export of a model would refuse after its training. It is legal: a model need not be exported."""
    if problem := export_problem(tokenizer):
        log(f"Warning: {problem} A model that is trained with it cannot be exported, quantized or pruned. Everything else works.")


def _refuse_other_end_of_text(corpus: FileCorpus, tokenizer: Tokenizer) -> None:
    """Raise UserError if every document of a token file ends with one token, which is not the tokenizer's end of text."""
    for file in corpus.files:
        if corpus.fields.format_of(file.path) == "tokens":
            shard = Shard(file.path.with_suffix(""))
            ends = {int(shard.tokens[shard.document_start(number + 1) - 1]) for number in range(min(shard.num_documents, 100))}
            if shard.num_documents > 10 and len(ends) == 1 and ends != {tokenizer.end_of_text}:
                raise UserError(
                    f"The documents of {file.path} end with token {ends.pop()}, but the end of text of {tokenizer.path} is token "
                    f"{tokenizer.end_of_text}. Give the tokenizer that the file was written with, or set --end_of_text."
                )


def _given_tokenizer(settings: PrepareSettings) -> Tokenizer | None:
    """Load the given tokenizer; None if one is to be trained. Pairs never begin with begin of text."""
    add_bos = settings.add_bos if settings.pair_field is None else False
    return load_tokenizer(settings.tokenizer, settings.end_of_text, add_bos=add_bos) if settings.tokenizer else None


def _record_of(settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer | None) -> dict:
    """Return what determines the tokens; two prepared folders with the same record have the same content."""
    recorded = dataclasses.asdict(settings) | {name: list(getattr(settings, name)) for name in ("columns", "special_tokens")}
    recorded["input"] = [path_as_text(Path(name)) for name in settings.input]
    for name in _NOT_RECORDED:
        del recorded[name]
    recorded["add_bos"] = tokenizer is not None and tokenizer.adds_bos
    given_tokenizer = None
    if tokenizer:
        digest = hashlib.sha256(tokenizer.file_bytes()).hexdigest()
        given_tokenizer = {"sha256": digest, "end_of_text": tokenizer.end_of_text, "settings": tokenizer.settings}
        given_tokenizer |= {"begin_of_text": tokenizer.begin_of_text} if tokenizer.adds_bos else {}
    text = hashlib.sha256(json.dumps(corpus.identity()).encode()).hexdigest()
    return {"format": MANIFEST_FORMAT, "settings": recorded, "text": text, "given_tokenizer": given_tokenizer}


def _refuse_other_content(output: Path, record: dict) -> None:
    """Raise UserError if an existing folder is not the one that the settings ask for."""
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} exists and is not a prepared data folder; it is not overwritten. Give another --output.")
    if changes := describe_changes(read_manifest(output), record):
        raise UserError(f"{output} exists and was prepared from other text or with other settings: {changes}. Give another --output.")


def _lock_partial_folder(partial: Path, rank: int, locks: ExitStack) -> None:
    """Make the folder of unfinished work if it is missing, and lock it for this rank until `locks` is closed."""
    if partial.exists() and any(partial.iterdir()) and not any(partial.glob("rank-*.lock")):
        raise UserError(f"{partial} is needed for unfinished work, but it exists and contains something else. Give another --output.")
    partial.mkdir(parents=True, exist_ok=True)
    if (lock := lock_file(partial / f"rank-{rank}.lock")) is None:
        raise UserError(f"Another process is preparing {partial} as rank {rank}. Wait until it ends, or give another --output.")
    locks.enter_context(lock)
