"""One unit of work: read, judge, tokenize, and write what came of it, so that it is done wholly or not at all."""

import base64
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.files import publish_file, write_file
from data.preparation.compressed import open_decompressed
from data.preparation.duplicates import DIGEST, digest_of, sorted_digests
from data.preparation.fields import Problem, Record, TokenRecord
from data.preparation.filters import FilterSettings, reason_to_drop
from data.preparation.records import PartReader
from data.preparation.sources import FileCorpus, Row, Unit
from data.tokenization.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1_000_000  # that are tokenized at a time
_BATCH_DOCUMENTS = 4096
EXAMPLES = 5  # of what is dropped, for each reason
_EXAMPLE_CHARACTERS = 600
_CHECKED_CHARACTERS = 2000  # of each unit, that a fast tokenizer is compared on

OnError = Literal["fail", "skip", "quarantine"]


@dataclass(frozen=True)
class Task:
    """What every process that works on a corpus knows."""

    corpus: FileCorpus | None
    """None where the rows are sent with each unit."""
    given: str
    """What a person calls those rows."""
    num_texts: int
    """Of a record: 1, or 2 where it is a pair."""
    folder: Path
    """Where the units go."""
    rank: int
    """Of the node, which names its unfinished files: those that another one's killed processes left are in nobody's way."""
    tokenizer: Path
    fast: bool
    """Tokenize with gigatoken, which was found to give the same ids."""
    threads: int
    """Of each process, where its tokenizer has them."""
    dtype: str
    on_error: OnError
    filters: FilterSettings
    sign: bool
    """Write MinHash signatures."""


def document_dtype(num_texts: int) -> np.dtype:
    """What is written of each document of a unit."""
    return np.dtype(
        [
            ("lengths", "<i4", (num_texts,)),
            ("bytes", "<u8"),
            ("source", "<u4"),
            ("position", "<u8"),
            ("digest", DIGEST),
        ]
    )


@dataclass
class _Counts:
    """What happened in a unit."""

    documents: int = 0
    """That were read, whatever became of them."""
    kept: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of kept text, in UTF-8."""
    dropped: Counter = field(default_factory=Counter)
    """By reason."""
    errors: Counter = field(default_factory=Counter)
    """Of the dropped, those that were no text."""
    dropped_of_source: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Document:
    texts: tuple[str, ...]
    tokens: NDArray | None
    """Where the source has tokens already."""
    source: int
    position: int
    digest: bytes


class UnitWorker:
    """Does units of a task, one after another; holds what one process needs for that."""

    def __init__(self, task: Task, tokenizer: Tokenizer, tell: Callable[[int, int], object]) -> None:
        """`tell` hears how many more bytes of text were written and documents read."""
        self.task, self._tokenizer, self._tell = task, tokenizer, tell
        self._parts = PartReader(task.corpus.fields) if task.corpus else None
        self._dtype = np.dtype(task.dtype)

    def do(self, unit: Unit, rows: list[Row] | None = None) -> dict:
        """The unit's entry, as it was written, last of its files. Raises UserError for a bad record where that is to fail."""
        counts = _Counts()
        prefix = self.task.folder / unit.name
        with _Files(prefix, self.task) as files:
            digests = []
            told_bytes = told_documents = 0
            for batch in _batches(self._documents(unit, rows, counts, files)):
                digests += [document.digest for document in batch]
                self._write(batch, counts, files)
                self._tell(counts.bytes - told_bytes, counts.documents - told_documents)
                told_bytes, told_documents = counts.bytes, counts.documents
            files.put("digests", sorted_digests(np.frombuffer(b"".join(digests), DIGEST)).tobytes())
        entry = {
            "last": not unit.is_open_ended or self._parts.at_end,
            "bytes_on_disk": self._parts.bytes_on_disk() if unit.is_open_ended else unit.size,
            **{name: getattr(counts, name) for name in _Counts.__dataclass_fields__},
        }
        write_file(Path(f"{prefix}.json"), json.dumps(entry), Path(f"{prefix}.json{_unfinished(self.task)}"))
        return entry

    def _documents(self, unit: Unit, rows: list[Row] | None, counts: _Counts, files: "_Files") -> Iterator[_Document]:
        """The documents of a unit that are text and pass the filters; the others are counted."""
        for source, position, record in rows if rows is not None else self._records(unit):
            counts.documents += 1
            if isinstance(record, Problem):
                self._complain(source, position, record, counts, files)
                continue
            tokens = None
            if isinstance(record, TokenRecord):
                tokens = record.tokens
                if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._tokenizer.vocab_size:
                    sentence = f"it holds a token outside the {self._tokenizer.vocab_size} ids of the tokenizer"
                    self._complain(source, position, Problem("token outside the vocabulary", sentence), counts, files)
                    continue
                record = (self._tokenizer.decode(tokens),)
            if not record[0].strip():
                self._drop("empty file", source, position, record[0], counts)
            elif reason := reason_to_drop(record[0], self.task.filters):
                self._drop(reason, source, position, record[0], counts)
            else:
                yield _Document(record, tokens, source, position, digest_of("\0".join(record)))

    def _records(self, unit: Unit) -> Iterator[tuple[int, int, Record]]:
        for span in unit.spans:
            for position, record in self._parts.read(self.task.corpus.files[span.file].path, span.start, span.end):
                yield span.file, position, record

    def _write(self, batch: list[_Document], counts: _Counts, files: "_Files") -> None:
        texts = [text for document in batch for text in document.texts]
        if batch[0].tokens is None:
            tokens, lengths = self._tokenizer.encode_documents(texts, self._dtype)
            if not counts.kept and self.task.fast:
                self._compare(texts[0][:_CHECKED_CHARACTERS])
        else:
            tokens, lengths = self._joined([document.tokens for document in batch])
        written = np.zeros(len(batch), document_dtype(self.task.num_texts))
        written["lengths"] = lengths.reshape(len(batch), self.task.num_texts)
        written["bytes"] = np.array([len(text.encode()) for text in texts], np.uint64).reshape(len(batch), self.task.num_texts).sum(axis=1)
        written["source"] = [document.source for document in batch]
        written["position"] = [document.position for document in batch]
        written["digest"] = np.frombuffer(b"".join(document.digest for document in batch), DIGEST)
        files.put("tokens", tokens.tobytes())
        files.put("documents", written.tobytes())
        if self.task.sign:
            from data.preparation.duplicates import signatures

            files.put("signatures", signatures([document.texts[0] for document in batch]).tobytes())
        counts.kept += len(batch)
        counts.tokens += len(tokens)
        counts.bytes += int(written["bytes"].sum())

    def _joined(self, documents: list[NDArray]) -> tuple[NDArray, NDArray[np.int32]]:
        """Documents that are tokens already, each with its end."""
        end = np.array([self._tokenizer.end_of_text], self._dtype)
        ended = [
            document if len(document) and document[-1] == end[0] else np.concatenate([document.astype(self._dtype), end])
            for document in documents
        ]
        return np.concatenate(ended).astype(self._dtype), np.array([len(document) for document in ended], np.int32)

    def _compare(self, text: str) -> None:
        """A fast tokenizer that was found equal at the start is looked at again in every unit."""
        fast, reference = self._tokenizer, self._tokenizer.reference
        if fast.encode(text) != reference.encode(text):
            raise UserError(
                f"{fast.engine} gives other ids than {reference.engine} for {text[:60]!r}. "
                "Give another --output and --gigatoken false; please report it."
            )

    def _drop(self, reason: str, source: int, position: int, text: str, counts: _Counts) -> None:
        counts.dropped[reason] += 1
        counts.dropped_of_source[source] += 1
        examples = counts.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"source": source, "position": position, "text": text[:_EXAMPLE_CHARACTERS]})

    def _complain(self, source: int, position: int, problem: Problem, counts: _Counts, files: "_Files") -> None:
        if self.task.on_error == "fail":
            end = "" if problem.sentence.endswith((".", "?")) else "."
            raise UserError(f"{self._place(source, position, problem)}: {problem.sentence}{end} {_advice(problem)}")
        counts.errors[problem.reason] += 1
        self._drop(problem.reason, source, position, problem.raw[:_EXAMPLE_CHARACTERS].decode(errors="backslashreplace"), counts)
        if self.task.on_error == "quarantine":
            line = {"source": source, "position": position, "reason": problem.reason, "sentence": problem.sentence}
            try:
                line["record"] = problem.raw.decode()
            except UnicodeDecodeError:
                line["record_base64"] = base64.b64encode(problem.raw).decode()
            files.put("quarantine", json.dumps(line).encode() + b"\n")

    def _place(self, source: int, position: int, problem: Problem) -> str:
        """Where a person finds the record."""
        if self.task.corpus is None:
            return f"{self.task.given}, row {position}"
        file = self.task.corpus.files[source]
        if problem.is_of_file:
            return str(file.path)
        if self.task.corpus.fields.is_cut_by_bytes(file.path):
            with open_decompressed(file.path) as stream:
                return f"{file.path}, line {1 + _newlines(stream, position)}"
        unit = self.task.corpus.position_units[source]
        return str(file.path) if unit == "file" else f"{file.path}, {unit} {position + 1}"


class _Files:
    """The files of a unit, by what they hold; they get their names when all are whole, and are gone where that fails."""

    def __init__(self, prefix: Path, task: Task) -> None:
        self._prefix, self._task = prefix, task
        self._open: dict[str, BinaryIO] = {}
        for kind in ["tokens", "documents", "digests", *(["signatures"] if task.sign else [])]:
            self.put(kind, b"")

    def put(self, kind: str, data: bytes) -> None:
        if kind not in self._open:
            self._open[kind] = open(f"{self._prefix}.{kind}{_unfinished(self._task)}", "wb")  # noqa: SIM115  closed by __exit__
        self._open[kind].write(data)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for name, file in self._open.items():
            if kind is None:
                publish_file(file, f"{self._prefix}.{name}", sync_folder=False)
            else:
                file.close()
                os.unlink(file.name)


def remove_unfinished(folder: Path, rank: int) -> None:
    """What killed processes of this rank left behind."""
    for path in folder.glob(f"*.rank{rank}-*"):
        path.unlink(missing_ok=True)


def _unfinished(task: Task) -> str:
    """Of a process alone: one that outlives its killed parent for a moment writes into no file of the next start."""
    return f".rank{task.rank}-{os.getpid()}"


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Documents by the megabyte; those that are tokens already apart from those that are text."""
    batch: list[_Document] = []
    characters = 0
    for document in documents:
        if batch and (batch[0].tokens is None) != (document.tokens is None):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += sum(map(len, document.texts))
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def read_entry(folder: Path, name: str) -> dict | None:
    """What was written of a unit, or None where it is not done."""
    try:
        return json.loads((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None


def _newlines(stream: BinaryIO, count: int) -> int:
    """In the first `count` bytes."""
    found = 0
    while count > 0 and (piece := stream.read(min(count, 1 << 20))):
        found += piece.count(b"\n")
        count -= len(piece)
    return found


def _advice(problem: Problem) -> str:
    if problem.reason in ("missing field", "wrong type"):
        return "The field is set with --text_field; --on_error skip or quarantine goes on without such records."
    if problem.reason == "broken JSON":
        return "A record is one line, in .json files too; --on_error skip or quarantine goes on without it."
    return "--on_error skip or quarantine goes on without it."
