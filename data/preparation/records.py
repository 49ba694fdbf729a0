"""What a part of a file holds: records, each with its place, and what is wrong with those that are no text.

A part is a stretch of a file: bytes of the decompressed stream for lines, row groups or record batches for tables, documents for
token files. A record belongs to the part in which it begins, so parts can be read apart from one another, in any order.
"""

import codecs
import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.command_line import nearest
from data.preparation.columnar import Table
from data.preparation.compressed import CANNOT_BE_READ, decompressed, is_compressed, open_decompressed
from data.preparation.fields import Fields, Problem, Record, TokenRecord, damaged, decode_text, read_json, read_row
from data.shards import Shard

_LONGEST_CSV_RECORD = 64 << 20  # bytes; behind so many an opening quote is taken for one that nobody closed


class PartReader:
    """Reads parts of files. A file that only reading from its beginning leads through stays open, and its next part goes on from there."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.at_end = False
        """Whether the part that was read last reached the end of its file."""
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._stream: BinaryIO | None = None
        self._sequence: _Sequence | None = None

    def read(self, path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """(place, record) of each record that begins in the part; a file that cannot be read on ends with a Problem in one of its parts."""
        self.at_end = False
        place = start
        try:
            for place, record in self._read(path, start, end):
                yield place, record
        except CANNOT_BE_READ as error:
            self.close()
            self.at_end = True
            yield place, damaged(error, is_of_file=True)

    def bytes_on_disk(self) -> int:
        """How much of the open file has been read."""
        return self._file.tell() if self._file else 0

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._file.close()
        self._path = self._file = self._stream = self._sequence = None

    def _read(self, path: Path, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        kind, fields = self.fields.format_of(path), self.fields
        if kind in ("parquet", "arrow"):
            yield from self._table(path, start, end)
        elif kind == "tokens":
            yield from self._tokens(path, start, end)
        elif kind == "txt" and fields.separator is None:
            yield 0, decode_text(self._open(path).read().removeprefix(codecs.BOM_UTF8))
            self.close()
            self.at_end = True
        elif kind == "txt":
            records = self._plain_lines if fields.separator == "line" else self._documents
            for place, data in self._stretch(path, start, end, records):
                yield place, decode_text(data)
        elif kind == "jsonl":
            for place, line in self._stretch(path, start, end, self._plain_lines):
                yield place, read_json(line, fields)
        elif kind == "tsv":
            columns = fields.columns or _first_line(path)
            for place, line in self._stretch(path, start, end, self._plain_lines):
                if place > 0 or fields.columns:
                    yield place, read_row(_tabs, line, columns, line, fields)
        else:
            for place, (line, row, columns) in self._stretch(path, start, end, self._csv_rows):
                yield place, row if isinstance(row, Problem) else read_row(list, row, columns, line, fields)

    def _open(self, path: Path) -> BinaryIO:
        if path != self._path:
            self.close()
            self._file = open(path, "rb")  # noqa: SIM115  closed by close
            self._path, self._stream = path, decompressed(self._file, path)
        return self._stream

    def _stretch(self, path: Path, start: int, end: int | None, records: "_Records") -> Iterator[tuple[int, Any]]:
        """(place, record) of a part, got by seeking where the file can seek and its lines can be told apart anywhere."""
        if not is_compressed(path) and self.fields.format_of(path) != "csv":
            for _, place, record in records(self._open(path), start, end):
                yield place, record
            return
        if path != self._path or self._sequence is None or self._sequence.has_passed(start):
            self.close()
            self._sequence = _Sequence(records(self._open(path), 0, None))
        sequence = self._sequence
        while (owner := sequence.next_owner) is not None and (end is None or owner < end):
            _, place, record = sequence.take()
            if owner >= start:
                yield place, record
        self.at_end = sequence.next_owner is None
        if sequence.error and sequence.last_taken >= start:  # said once: by the part of the last record before it
            raise sequence.error

    def _lines(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
        """(place, line) of lines that begin at start <= place < end."""
        place = max(0, start - 1)
        stream.seek(place)
        if start > 0:
            place += len(stream.readline())  # of the line that begins before
        while end is None or place < end:
            line = stream.readline()
            if not line:
                self.at_end = True
                return
            yield place, line if place else line.removeprefix(codecs.BOM_UTF8)
            place += len(line)

    def _plain_lines(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, int, bytes]]:
        for place, line in self._lines(stream, start, end):
            if not line.isspace():
                yield place, place, line

    def _documents(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, int, bytes]]:
        """(place of the separator before it, place, document); the first document of a file has no separator and belongs to place 0."""
        marker = None if self.fields.separator == "blank" else self.fields.separator.encode()
        owner, begun = 0, 0
        collected: list[bytes] | None = [] if start == 0 else None
        for place, line in self._lines(stream, start, None):
            if not (line.isspace() if marker is None else line.rstrip(b"\r\n") == marker):
                if collected is not None:
                    collected.append(line)
                elif end is not None and place >= end:
                    return  # the whole part lies inside a document that begins before it
                continue
            if collected and not all(map(bytes.isspace, collected)):
                yield owner, begun, b"".join(collected)
            if end is not None and place >= end:
                return
            owner, begun, collected = place, place + len(line), []
        if collected and not all(map(bytes.isspace, collected)):
            yield owner, begun, b"".join(collected)

    def _csv_rows(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, int, tuple]]:
        """RFC 4180. A line's end inside quotes is text, so that only reading from the beginning tells where records begin."""
        columns = list(self.fields.columns)
        for place, line, row in _csv_records(self._lines(stream, start, end)):
            if not columns and isinstance(row, Problem):  # without its header nothing of the file can be told
                yield place, place, (line, dataclasses.replace(row, is_of_file=True), columns)
                return
            if not columns:
                columns = row
            elif not line.isspace():
                yield place, place, (line, row, columns)

    def _table(self, path: Path, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        """Rows of row groups or record batches [start, end). What is wrong with the whole file the first part says."""
        import pyarrow

        self.at_end = True
        try:
            table = Table(path, self.fields)
        except pyarrow.ArrowException as error:
            if start == 0:
                yield 0, damaged(error, is_of_file=True)
            return
        with table:
            for name in self.fields.names if start == 0 else ():
                if (count := table.schema.names.count(name)) != 1:
                    sentence = f'it has {count or "no"} column{"s" * (count > 1)} "{name}"'
                    yield 0, Problem("missing field", sentence + nearest(name, table.schema.names) * (not count), is_of_file=True)
            if all(table.schema.names.count(name) == 1 for name in self.fields.names):
                yield from table.rows(start, end)

    def _tokens(self, path: Path, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        shard = Shard(path.with_suffix(""))
        for number in range(start, shard.num_documents if end is None else end):
            yield number, TokenRecord(shard.tokens[shard.document_start(number) : shard.document_start(number + 1)])
        self.at_end = True


_Records = Callable[[BinaryIO, int, int | None], Iterator[tuple[int, int, Any]]]
"""(stream, start, end) -> (owner, place, record): a record belongs to the part that its owner, a place, lies in."""


class _Sequence:
    """An iterator that shows whose the next record is."""

    def __init__(self, records: Iterator[tuple[int, int, Any]]) -> None:
        self._records = records
        self.last_taken, self._has_taken = 0, False
        self.error: Exception | None = None
        """What ended it before the end of the file."""
        self._advance()

    @property
    def next_owner(self) -> int | None:
        return None if self._next is None else self._next[0]

    def has_passed(self, start: int) -> bool:
        """Whether a record that belongs to `start` or behind it was taken."""
        return self._has_taken and self.last_taken >= start

    def take(self) -> tuple[int, int, Any]:
        taken = self._next
        self.last_taken, self._has_taken = taken[0], True
        self._advance()
        return taken

    def _advance(self) -> None:
        try:
            self._next = next(self._records, None)
        except CANNOT_BE_READ as error:
            self._next, self.error = None, error


def _csv_records(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, list[str] | Problem]]:
    """(place, the record as it stands, its fields). A line that breaks a record costs that line alone: those that it took with it
    are read again.
    """
    again: list[tuple[int, bytes]] = []  # the next one last

    def texts(used: list[tuple[int, bytes]]) -> Iterator[str]:
        size = 0
        while (line := again.pop() if again else next(lines, None)) is not None:
            used.append(line)
            size += len(line[1])
            if size > _LONGEST_CSV_RECORD:
                raise csv.Error(f"a quote that opens here is not closed within {_LONGEST_CSV_RECORD >> 20} MiB")
            yield line[1].decode()

    while True:
        used: list[tuple[int, bytes]] = []
        try:
            found: list[str] | Problem | None = next(csv.reader(texts(used), strict=True), None)
        except UnicodeDecodeError as error:
            found = Problem("invalid UTF-8", f"it is not UTF-8: {error}", used[0][1])
        except csv.Error as error:
            found = Problem("broken CSV", f"it is not CSV: {error}", used[0][1])
        if not used:
            return
        if isinstance(found, Problem):
            again += reversed(used[1:])
            del used[1:]
        yield used[0][0], b"".join(line for _, line in used), found or []


csv.field_size_limit(_LONGEST_CSV_RECORD)


def _tabs(line: bytes) -> list[str]:
    """Fields between tabs, nothing quoted: IANA's text/tab-separated-values."""
    return line.decode().rstrip("\r\n").split("\t")


def _first_line(path: Path) -> list[str]:
    with open_decompressed(path) as file:
        return file.readline().removeprefix(codecs.BOM_UTF8).decode(errors="replace").rstrip("\r\n").split("\t")
