"""The part of one node in a preparation: agree with the other nodes on a plan, then tokenize this node's work units.

OUTPUT.partial contains plan.json (what is prepared, and how it is cut into units), units/ (finished units), join/ (what is known of
finished shards) and whole/ (what will become OUTPUT).
"""

import itertools
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from data.command_line import UserError
from data.files import lock_file, write_file
from data.preparation import merging
from data.preparation.corpus import Corpus, FileCorpus, Row, Unit
from data.preparation.duplicates import DIGEST, digest_of
from data.preparation.settings import MIN_VOCAB_SIZE, PrepareSettings
from data.preparation.work_units import UnitWorker, WorkerSettings, read_entry, remove_unfinished
from data.preparation.workers import Progress, Workers
from data.shards import token_dtype
from data.tokenization.learning import TextTooShort, train_sentencepiece
from data.tokenization.loading import copy_tokenizer, fastest, load_tokenizer
from data.tokenization.tokenizer import Tokenizer

PLAN = "plan.json"
_SAMPLE_CHARACTERS = 100_000  # characters of the corpus on which a fast tokenizer is compared with the reference
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 4 << 20, 64 << 20
_UNITS_PER_CORPUS = 256  # number of units of a corpus, if their size then lies between the two bounds
_NAMED_CHANGES = 5


class Node:
    """One node's work on a corpus. `open_plan` comes first, then `tokenize`; data/preparation/joining.py makes the result."""

    def __init__(
        self,
        settings: PrepareSettings,
        corpus: Corpus,
        given_tokenizer: Tokenizer | None,
        partial: Path,
        rank: int,
        world_size: int,
        log: Callable[[str], object],
    ) -> None:
        """Make the folders inside `partial`. `given_tokenizer` is None if a tokenizer is to be trained."""
        self.settings, self.corpus, self.given_tokenizer = settings, corpus, given_tokenizer
        self.partial, self.rank, self.world_size, self.log = partial, rank, world_size, log
        self.units_folder, self.join_folder, self.result_folder = partial / "units", partial / "join", partial / "whole"
        for folder in (self.units_folder, self.join_folder, self.result_folder):
            folder.mkdir(exist_ok=True)
        remove_unfinished(self.units_folder, rank)
        self.texts_per_document = 1 if settings.pair_field is None else 2

    def open_plan(self, record: dict) -> None:
        """Read the plan of an earlier start or of another node, or write it, and with it the tokenizer.

        Raise UserError, with the differences, if the plan was made for other text or other settings.
        """
        lock = lock_file(self.partial / "agree.lock", wait_seconds=math.inf)
        assert lock is not None
        with lock:
            path = self.partial / PLAN
            saved = json.loads(path.read_bytes()) if path.exists() else None
            plan = record | {"files": self.corpus.identity()}
            if saved is not None:
                if saved["settings"]["on_error"] == "fail":  # then no record was skipped so far, and any on_error may resume
                    saved["settings"]["on_error"] = self.settings.on_error
                if changes := describe_changes(saved, plan):
                    raise UserError(
                        f"{self.partial} was started with other text or settings: {changes}. "
                        f"Give the same text and settings to resume, give another --output, or delete {self.partial}."
                    )
                self.tokenizer = load_tokenizer(self.result_folder)
            else:
                self.tokenizer = self._make_tokenizer()
            sample = list(self.corpus.sample_text(_SAMPLE_CHARACTERS, lambda texts: True))
            self.fast_tokenizer, reason = fastest(self.tokenizer, sample) if self.settings.gigatoken else (self.tokenizer, "")
            if reason:
                self.log(reason)
            engine = self.fast_tokenizer.engine
            if saved is not None and saved["engine"] != engine:
                raise UserError(
                    f"{self.partial} was started with the tokenizer engine {saved['engine']}, but this process uses {engine}. "
                    f"Install {saved['engine']}, or give another --output."
                )
            self.unit_bytes = saved["unit_bytes"] if saved else self._choose_unit_bytes()
            write_json(plan | {"engine": engine, "unit_bytes": self.unit_bytes}, path)

    def _make_tokenizer(self) -> Tokenizer:
        if self.given_tokenizer is not None:
            copy_tokenizer(self.given_tokenizer, self.result_folder)
            return load_tokenizer(self.result_folder)
        settings = self.settings
        self.log(f"Training a tokenizer of {settings.vocab_size} ids ...")

        def _is_for_training(texts: tuple[str, ...]) -> bool:
            return not merging.is_held_out(np.frombuffer(digest_of("\0".join(texts)), DIGEST), settings.held_out)[0]

        texts = self.corpus.sample_text(settings.tokenizer_characters, _is_for_training)
        first = next(texts, None)
        if first is None and (problem := self.corpus.first_problem()):
            raise UserError(f"The input contains no text to train a tokenizer on. {problem}.")
        texts = itertools.chain([] if first is None else [first], texts)
        path = self.result_folder / "tokenizer.model"
        try:
            train_sentencepiece(
                texts, path, settings.vocab_size, settings.tokenizer_kind, settings.special_tokens, settings.pieces_within_words
            )
        except TextTooShort as error:
            if error.largest >= MIN_VOCAB_SIZE:
                raise
            raise UserError(
                f"The text is too short to train a tokenizer on: it is enough for {error.largest} ids, and vocab_size must be at least "
                f"{MIN_VOCAB_SIZE}. Give a --tokenizer, or more text."
            ) from error
        copy_tokenizer(load_tokenizer(path), self.result_folder)
        return load_tokenizer(self.result_folder)

    def _choose_unit_bytes(self) -> int:
        if self.settings.unit_megabytes is not None:
            return max(1, round(self.settings.unit_megabytes * 2**20))
        if not isinstance(self.corpus, FileCorpus):
            return self.corpus.unit_bytes
        size = sum(file.size for file in self.corpus.files)
        return min(_MAX_UNIT_BYTES, max(_MIN_UNIT_BYTES, size // _UNITS_PER_CORPUS))

    def workers(self) -> Workers:
        """Start the worker processes: as many as the settings ask for, but not more than there are units."""
        requested = self.settings.workers or usable_cores()
        count = requested
        if isinstance(self.corpus, FileCorpus):
            first_units = self._own_units()[:requested]
            count = requested if any(unit.is_open_ended for unit in first_units) else max(1, len(first_units))
        worker_settings = WorkerSettings(
            corpus=self.corpus if isinstance(self.corpus, FileCorpus) else None,
            input_name=self.corpus.input_names[0],
            texts_per_document=self.texts_per_document,
            folder=self.units_folder,
            rank=self.rank,
            tokenizer=self.tokenizer.path,
            fast=self.fast_tokenizer is not self.tokenizer,
            threads=max(1, requested // count),
            dtype=token_dtype(self.tokenizer.vocab_size).str,
            on_error=self.settings.on_error,
            filters=self.settings.filters,
            write_signatures=self.settings.near_duplicates != "keep",
        )
        return Workers(worker_settings, count, self.fast_tokenizer)

    @cached_property
    def all_units(self) -> list[Unit]:
        """Units of all nodes that read files; for a file that is cut while it is read, only its first part."""
        assert isinstance(self.corpus, FileCorpus)
        return list(self.corpus.units(self.unit_bytes))

    def _own_units(self) -> list[Unit]:
        return self.all_units[self.rank :: self.world_size]

    def tokenize(self, workers: Workers) -> None:
        """Process those units of this node that are not finished yet."""
        errors: Counter = Counter()
        ended: set[int] = set()  # indices of the units whose file was read to its end
        corpus = self.corpus
        num_bytes = sum(unit.size for unit in self._own_units()) if isinstance(corpus, FileCorpus) else None
        progress = Progress(workers, num_bytes, self.log)

        def _count(unit: Unit, entry: dict, is_new: bool = True) -> None:
            errors.update(entry["errors"])
            self.refuse_too_many(errors)
            if entry["last"]:
                ended.add(unit.index)
            progress.add(unit.index if unit.is_open_ended else unit.name, entry["bytes_on_disk"], is_new)

        def _is_finished(unit: Unit) -> bool:
            if (entry := read_entry(self.units_folder, unit.name)) is not None:
                _count(unit, entry, is_new=False)
            return entry is not None

        def _units_to_do() -> Iterator[tuple[Unit, list[Row] | None]]:
            if not isinstance(corpus, FileCorpus):
                num_blocks = 0
                for unit, rows in corpus.blocks(self.unit_bytes):
                    num_blocks += 1
                    if unit.index % self.world_size == self.rank and not _is_finished(unit):
                        yield unit, rows
                write_json({"blocks": num_blocks}, self.units_folder / "stream.json")
                return
            for unit in self._own_units():
                while unit.index not in ended:
                    if not _is_finished(unit):
                        yield unit, None
                    if not unit.is_open_ended:
                        break
                    unit = unit.next_part()

        try:
            for (unit, _), entry in workers.call(UnitWorker.process, _units_to_do(), progress.refresh):
                _count(unit, entry)
        finally:
            progress.close()

    def refuse_too_many(self, errors: Counter) -> None:
        """Raise UserError if there are more invalid records than --max_errors. `errors` has their numbers by reason."""
        if errors.total() > self.settings.max_errors:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in errors.most_common())
            raise UserError(
                f"{errors.total():,} records are not valid text ({reasons}); --max_errors allows {self.settings.max_errors}. "
                f"Finished work is kept in {self.partial}; give the same command with a larger --max_errors to resume."
            )


def describe_changes(saved: dict, current: dict) -> str:
    """Return the differences between two records of a preparation as text; empty if there are none."""
    if saved.get("format") != current["format"]:
        return f"it was written by another version of this project (format {saved.get('format')}; this version writes {current['format']})"
    settings = {"add_bos": False} | saved.get("settings", {})  # earlier versions had no add_bos
    changes = [
        f"--{name} was {settings.get(name)} and is now {value}"
        for name, value in current["settings"].items()
        if settings.get(name) != value
    ]
    if saved.get("given_tokenizer") != current["given_tokenizer"]:
        changes.append("--tokenizer or --end_of_text names another tokenizer or another end-of-text token")
    if saved.get("text") != current["text"]:
        old_files, new_files = saved.get("files"), current.get("files")
        unnamed = ["the input files changed (names, sizes or times)"]
        changes += describe_changed_files(old_files, new_files) if old_files and new_files else unnamed
    more = f" and {len(changes) - _NAMED_CHANGES} more" if len(changes) > _NAMED_CHANGES else ""
    return "; ".join(changes[:_NAMED_CHANGES]) + more


def describe_changed_files(saved: list[list], current: list[list]) -> list[str]:
    """Return the differences between two identities of a corpus, one text a file."""
    old, new = ({name: stamp for name, *stamp in files} for files in (saved, current))
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            changes.append(f"{name} was {'removed' if name in old else 'added'}")
        elif old[name][:1] != new[name][:1]:
            changes.append(f"{name} has another size")
        elif old[name] != new[name]:
            changes.append(f"{name} was modified")
    return changes or (["the order of the input files changed"] if saved != current else [])


def write_json(value: dict, path: Path, indent: int | None = None) -> None:
    """Create or replace a JSON file; several nodes may write the same one."""
    write_file(path, json.dumps(value, indent=indent, ensure_ascii=False), Path(f"{path}.{secrets.token_hex(4)}.partial"))


def usable_cores() -> int:
    """Return the number of cores that this process may use (a batch system may assign fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
