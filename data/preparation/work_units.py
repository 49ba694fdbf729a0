"""One work unit: read it, filter it, tokenize it and write the result, so that it is finished completely or not at all.

A finished unit NAME consists of NAME.tokens, NAME.documents (one record a document, see document_dtype), NAME.digests, NAME.signatures if
near-duplicates are wanted, NAME.quarantine if there are invalid records, and NAME.json (its entry), which is written last.
"""

import base64
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.files import publish_file, write_file
from data.preparation.compressed import open_decompressed
from data.preparation.corpus import FileCorpus, Row, Unit
from data.preparation.duplicates import DIGEST, digest_of, signatures, sorted_digests
from data.preparation.fields import Problem, Record, TokenRecord
from data.preparation.filters import FilterSettings, reason_to_drop
from data.preparation.records import PartReader
from data.preparation.settings import OnError
from data.tokenization.gigatoken_tokenizer import GigatokenTokenizer
from data.tokenization.tokenizer import EncodingError, Tokenizer

_BATCH_CHARACTERS = 1_000_000  # characters that are tokenized in one call
_BATCH_DOCUMENTS = 4096
EXAMPLES = 5  # documents that are kept as examples for each reason to drop
_EXAMPLE_CHARACTERS = 600
_CHECKED_CHARACTERS = 2000  # characters of each unit on which a fast tokenizer is compared with the reference


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of every process that works on a corpus."""

    corpus: FileCorpus | None
    """None if the rows are sent with each unit."""
    input_name: str
    """Name of the corpus in error messages about such rows."""
    texts_per_document: int
    """1, or 2 if each record is a pair."""
    folder: Path
    """Folder that the units are written to."""
    rank: int
    """Index of the node. It is part of the names of unfinished files, so that the nodes do not touch each other's."""
    tokenizer: Path
    fast: bool
    """Tokenize with gigatoken, which gave the same ids at the start."""
    threads: int
    """Threads of the tokenizer in each process, if it has threads."""
    dtype: str
    """Type of the token ids."""
    on_error: OnError
    filters: FilterSettings
    write_signatures: bool
    """Write MinHash signatures, for near-duplicates."""


def document_dtype(texts_per_document: int) -> np.dtype:
    """Return the record that is written for each document of a unit."""
    return np.dtype(
        [
            ("lengths", "<i4", (texts_per_document,)),
            ("bytes", "<u8"),
            ("source", "<u4"),
            ("position", "<u8"),
            ("digest", DIGEST),
        ]
    )


@dataclass
class _Counts:
    """The numbers in a unit's entry."""

    documents: int = 0
    """Documents that were read, kept or not."""
    kept: int = 0
    tokens: int = 0
    bytes: int = 0
    """Bytes of the kept text in UTF-8."""
    dropped: Counter = field(default_factory=Counter)
    """Number of dropped documents by reason."""
    errors: Counter = field(default_factory=Counter)
    """Number of invalid records by reason; `dropped` includes them."""
    dropped_of_source: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Document:
    texts: tuple[str, ...]
    tokens: NDArray | None
    """Tokens, if the source contains tokens already."""
    source: int
    position: int
    digest: bytes


class UnitWorker:
    """Processes units, one after another. It holds what one process needs for that."""

    def __init__(self, settings: WorkerSettings, tokenizer: Tokenizer, add_done: Callable[[int, int], object]) -> None:
        """`add_done(num_bytes, num_documents)` is called with the bytes of text written and documents read since its last call."""
        self.settings, self._tokenizer, self._add_done = settings, tokenizer, add_done
        self._reader = PartReader(settings.corpus.fields) if settings.corpus else None
        self._dtype = np.dtype(settings.dtype)

    def process(self, unit: Unit, rows: list[Row] | None = None) -> dict:
        """Write the files of a unit and return its entry. Raise UserError for an invalid record if on_error is "fail"."""
        counts = _Counts()
        prefix = self.settings.folder / unit.name
        with _UnitFiles(prefix, self.settings) as files:
            digests = []
            bytes_before = documents_before = 0
            for batch in _batches(self._documents(unit, rows, counts, files)):
                for encoded in self._encoded(batch, counts, files):
                    digests += [document.digest for document in encoded[0]]
                    self._write(*encoded, counts, files)
                self._add_done(counts.bytes - bytes_before, counts.documents - documents_before)
                bytes_before, documents_before = counts.bytes, counts.documents
            files.write("digests", sorted_digests(np.frombuffer(b"".join(digests), DIGEST)).tobytes())
        is_last, bytes_on_disk = True, unit.size
        if unit.is_open_ended:
            assert self._reader is not None
            is_last, bytes_on_disk = self._reader.at_end, self._reader.bytes_on_disk()
        entry = {
            "last": is_last,
            "bytes_on_disk": bytes_on_disk,
            **{name: getattr(counts, name) for name in _Counts.__dataclass_fields__},
        }
        write_file(Path(f"{prefix}.json"), json.dumps(entry), Path(f"{prefix}.json{_unfinished_suffix(self.settings)}"))
        return entry

    def _documents(self, unit: Unit, rows: list[Row] | None, counts: _Counts, files: "_UnitFiles") -> Iterator[_Document]:
        """Yield the valid documents of a unit that pass the filters; count the others."""
        for source, position, record in rows if rows is not None else self._records(unit):
            counts.documents += 1
            if isinstance(record, Problem):
                self._handle_problem(source, position, record, counts, files)
                continue
            tokens = None
            if isinstance(record, TokenRecord):
                tokens = record.tokens
                if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._tokenizer.vocab_size:
                    message = f"it contains a token outside the {self._tokenizer.vocab_size} ids of the tokenizer"
                    self._handle_problem(source, position, Problem("token outside the vocabulary", message), counts, files)
                    continue
                record = (self._tokenizer.decode(tokens.tolist()),)
            if not record[0].strip():
                self._drop("empty file", source, position, record[0], counts)
            elif reason := reason_to_drop(record[0], self.settings.filters):
                self._drop(reason, source, position, record[0], counts)
            else:
                yield _Document(record, tokens, source, position, digest_of("\0".join(record)))

    def _records(self, unit: Unit) -> Iterator[tuple[int, int, Record]]:
        assert self._reader is not None and self.settings.corpus is not None
        for span in unit.spans:
            for position, record in self._reader.read(self.settings.corpus.files[span.file].path, span.start, span.end):
                yield span.file, position, record

    def _encoded(
        self, batch: list[_Document], counts: _Counts, files: "_UnitFiles"
    ) -> Iterator[tuple[list[_Document], NDArray, NDArray[np.int32]]]:
        """Yield the documents of a batch with their tokens and lengths: all at once, or one by one if one of them cannot be tokenized."""
        if batch[0].tokens is not None:
            yield batch, *self._concatenate([document.tokens for document in batch if document.tokens is not None])
            return
        texts = [text for document in batch for text in document.texts]
        try:
            encoded = self._tokenizer.encode_documents(texts, self._dtype)
            if not counts.kept and self.settings.fast:
                self._compare_with_reference(texts[0][:_CHECKED_CHARACTERS])
        except EncodingError as error:
            if len(batch) == 1:
                [document] = batch
                problem = Problem("cannot be tokenized", f"it cannot be tokenized with {error.reason}", "\0".join(texts).encode())
                self._handle_problem(document.source, document.position, problem, counts, files)
                return
            for document in batch:
                yield from self._encoded([document], counts, files)
            return
        yield batch, *encoded

    def _write(self, batch: list[_Document], tokens: NDArray, lengths: NDArray[np.int32], counts: _Counts, files: "_UnitFiles") -> None:
        texts_per_document = self.settings.texts_per_document
        texts = [text for document in batch for text in document.texts]
        records = np.zeros(len(batch), document_dtype(texts_per_document))
        records["lengths"] = lengths.reshape(len(batch), texts_per_document)
        records["bytes"] = np.array([len(text.encode()) for text in texts], np.uint64).reshape(len(batch), texts_per_document).sum(axis=1)
        records["source"] = [document.source for document in batch]
        records["position"] = [document.position for document in batch]
        records["digest"] = np.frombuffer(b"".join(document.digest for document in batch), DIGEST)
        files.write("tokens", tokens.tobytes())
        files.write("documents", records.tobytes())
        if self.settings.write_signatures:
            files.write("signatures", signatures([document.texts[0] for document in batch]).tobytes())
        counts.kept += len(batch)
        counts.tokens += len(tokens)
        counts.bytes += int(records["bytes"].sum())

    def _concatenate(self, documents: list[NDArray]) -> tuple[NDArray, NDArray[np.int32]]:
        """Return (tokens, lengths) of documents that are tokens already, each with an end-of-text token.

        If the tokenizer has a begin-of-text token, `add_bos` determines whether each document begins with it.
        """
        tokenizer, end = self._tokenizer, np.array([self._tokenizer.end_of_text], self._dtype)
        beginning = np.array(tokenizer.beginning, self._dtype)
        written = []
        for document in documents:
            if len(document) and document[0] == tokenizer.begin_of_text:
                document = document[1:]
            ended = document[-1:] == end
            written.append(np.concatenate([beginning, document.astype(self._dtype), end[ended.sum() :]]))
        return np.concatenate(written), np.array([len(document) for document in written], np.int32)

    def _compare_with_reference(self, text: str) -> None:
        """Raise UserError if the fast tokenizer, which gave the same ids at the start, gives others for this text."""
        assert isinstance(self._tokenizer, GigatokenTokenizer)
        fast, reference = self._tokenizer, self._tokenizer.reference
        if fast.encode(text) != reference.encode(text):
            raise UserError(
                f"{fast.engine} gives other ids than {reference.engine} for {text[:60]!r}. "
                "Give another --output and --gigatoken false; please report this error."
            )

    def _drop(self, reason: str, source: int, position: int, text: str, counts: _Counts) -> None:
        counts.dropped[reason] += 1
        counts.dropped_of_source[source] += 1
        examples = counts.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"source": source, "position": position, "text": text[:_EXAMPLE_CHARACTERS]})

    def _handle_problem(self, source: int, position: int, problem: Problem, counts: _Counts, files: "_UnitFiles") -> None:
        if self.settings.on_error == "fail":
            end = "" if problem.message.endswith((".", "?")) else "."
            raise UserError(f"{self._describe_place(source, position, problem)}: {problem.message}{end} {_advice(problem)}")
        counts.errors[problem.reason] += 1
        self._drop(problem.reason, source, position, problem.raw[:_EXAMPLE_CHARACTERS].decode(errors="backslashreplace"), counts)
        if self.settings.on_error == "quarantine":
            line = {"source": source, "position": position, "reason": problem.reason, "sentence": problem.message}
            try:
                line["record"] = problem.raw.decode()
            except UnicodeDecodeError:
                line["record_base64"] = base64.b64encode(problem.raw).decode()
            files.write("quarantine", json.dumps(line).encode() + b"\n")

    def _describe_place(self, source: int, position: int, problem: Problem) -> str:
        """Return the file and line (or row) of a record, for a person."""
        corpus = self.settings.corpus
        if corpus is None:
            return f"{self.settings.input_name}, row {position}"
        file = corpus.files[source]
        if problem.ends_file:
            return str(file.path)
        if corpus.fields.is_cut_by_bytes(file.path):
            with open_decompressed(file.path) as stream:
                return f"{file.path}, line {1 + _count_newlines(stream, position)}"
        unit = corpus.position_units[source]
        return str(file.path) if unit == "file" else f"{file.path}, {unit} {position + 1}"


class _UnitFiles:
    """The files of a unit, by kind. They get their final names when all are complete, and are removed after an error."""

    def __init__(self, prefix: Path, settings: WorkerSettings) -> None:
        self._prefix, self._settings = prefix, settings
        self._open: dict[str, BinaryIO] = {}
        for kind in ["tokens", "documents", "digests", *(["signatures"] if settings.write_signatures else [])]:
            self.write(kind, b"")

    def write(self, kind: str, data: bytes) -> None:
        """Append to the file of a kind."""
        if kind not in self._open:
            self._open[kind] = open(f"{self._prefix}.{kind}{_unfinished_suffix(self._settings)}", "wb")  # noqa: SIM115  closed by __exit__
        self._open[kind].write(data)

    def __enter__(self) -> "_UnitFiles":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for name, file in self._open.items():
            if kind is None:
                publish_file(file, f"{self._prefix}.{name}", sync_folder=False)
            else:
                file.close()
                os.unlink(file.name)


def remove_unfinished(folder: Path, rank: int) -> None:
    """Remove the unfinished files that killed processes of this rank left in a folder."""
    for path in folder.glob(f"*.rank{rank}-*"):
        path.unlink(missing_ok=True)


def _unfinished_suffix(settings: WorkerSettings) -> str:
    """Return a suffix of this process alone: a worker that outlives its killed parent for a moment must not write into newer files."""
    return f".rank{settings.rank}-{os.getpid()}"


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Group documents into batches of about a megabyte; a batch is either all text or all tokens."""
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
    """Return the entry of a finished unit, or None if the unit is not finished."""
    try:
        return json.loads((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None


def _count_newlines(stream: BinaryIO, num_bytes: int) -> int:
    """Return the number of newlines in the next num_bytes bytes."""
    count = 0
    while num_bytes > 0 and (piece := stream.read(min(num_bytes, 1 << 20))):
        count += piece.count(b"\n")
        num_bytes -= len(piece)
    return count


def _advice(problem: Problem) -> str:
    if problem.option:
        return f"Set the field with {problem.option}, or leave out such records with --on_error skip or quarantine."
    if problem.reason == "repeated field":
        return "Rename one of them, or leave out such records with --on_error skip or quarantine."
    if problem.reason == "invalid UTF-8":
        return "Convert text of another encoding to UTF-8 (iconv), or leave out such records with --on_error skip or quarantine."
    if problem.ends_file:
        return "--on_error skip or quarantine leaves out the rest of such files."
    if problem.reason == "broken JSON":
        return "Each record must be one line, in .json files too. --on_error skip or quarantine leaves out such records."
    return "--on_error skip or quarantine leaves out such records."
