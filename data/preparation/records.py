"""The records in a part of a file, each with its position.

A part is a range of the file: bytes of the decompressed file for lines, row groups or record batches for tables, documents for token
files. A record belongs to the part in which it begins, so the parts of a file can be read independently, in any order.
"""

import codecs
import csv
import dataclasses
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from data.command_line import UserError
from data.preparation.columnar import Table
from data.preparation.compressed import COMPRESSIONS, READ_ERRORS, is_compressed
from data.preparation.fields import (
    Fields,
    Problem,
    Record,
    TokenRecord,
    check_columns,
    check_header,
    check_line_ends,
    damaged,
    decode_text,
    missing_field,
    read_json,
    read_row,
)
from data.preparation.file_content import OtherContent, check_file, open_checked
from data.shards import Shard

_SIGNS_OF_DAMAGE = ("broken JSON", "broken CSV", "invalid UTF-8", "wrong number of fields")
"""Problems of records that a changed byte of a compressed file can cause. Its checksum is compared only at the end of each stream."""
_MAX_CSV_RECORD_BYTES = 64 << 20  # in a longer record, the opening quote is assumed to have no closing quote


class PartReader:
    """Reads parts of files. A file that can only be read from its beginning stays open, so that its next part continues from there."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.at_end = False
        """True if the part that was read last reached the end of its file."""
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._stream: BinaryIO | None = None
        self._header: list[str] | None = None
        self._peekable: _Peekable | None = None

    def read(self, path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """Yield (position, record) of each record that begins in the part. If the file is damaged, the last record is a Problem."""
        self.at_end = False
        position = start
        try:
            for position, record in self._read(path, start, end):
                yield position, record if isinstance(record, tuple) else _with_check_of_archive(record, path)
        except READ_ERRORS as error:
            self.close()
            self.at_end = True
            yield position, damaged(error, ends_file=True)
        except MemoryError as error:
            self.close()
            raise UserError(
                f"{path} cannot be read: there is not enough memory. A compressed file needs its window in each process "
                "(zstd --long=31: 2 GiB): use fewer --workers, or compress the file with a smaller window."
            ) from error
        except OtherContent as error:
            self.close()
            self.at_end = True
            if start == 0:  # reported once: by the first part of the file
                yield 0, Problem("other format", str(error), ends_file=True)

    def bytes_on_disk(self) -> int:
        """Return how many bytes of the open file have been read; those of a compressed file are counted compressed."""
        return self._file.tell() if self._file else 0

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._stream is not None:
            self._stream.close()
        if self._file is not None:
            self._file.close()
        self._path = self._file = self._stream = self._header = self._peekable = None

    def _read(self, path: Path, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        format, fields = self.fields.format_of(path), self.fields
        if format in ("parquet", "arrow"):
            yield from self._read_table(path, start, end)
        elif format == "tokens":
            yield from self._read_tokens(path, start, end)
        elif format == "txt" and fields.separator is None:
            yield 0, decode_text(self._open(path).read().removeprefix(codecs.BOM_UTF8))
            self.close()
            self.at_end = True
        elif format == "txt":
            records = self._non_empty_lines if fields.separator == "line" else self._separated_documents
            for position, data in self._records_of_part(path, start, end, records):
                yield position, decode_text(data)
        elif format == "jsonl":
            for position, line in self._records_of_part(path, start, end, self._non_empty_lines):
                yield position, read_json(line, fields)
        elif format == "tsv":
            header = self._tsv_header(path)
            columns = fields.columns or header
            problem = check_line_ends(header) or (check_header(columns, fields) if columns else None)
            if problem:
                self.at_end = True
                yield from [(0, problem)] if start == 0 else []
                return
            for position, line in self._records_of_part(path, start, end, self._non_empty_lines):
                if position > 0 or fields.columns:
                    yield position, read_row(_split_at_tabs, line, columns, line, fields)
        else:
            for position, (line, row, columns) in self._records_of_part(path, start, end, self._csv_rows):
                yield position, row if isinstance(row, Problem) else read_row(list, row, columns, line, fields)

    def _open(self, path: Path) -> BinaryIO:
        if path == self._path and self._stream is not None:
            return self._stream
        self.close()
        self._file = open(path, "rb")  # noqa: SIM115  closed by close
        self._stream = open_checked(self._file, path, self.fields.format_of(path))
        self._path = path
        return self._stream

    def _tsv_header(self, path: Path) -> list[str]:
        """Return the fields of the first line of a .tsv file, which are the column names; none for an empty file."""
        if path != self._path or self._header is None:
            stream = self._open(path)
            stream.seek(0)
            line = stream.readline().removeprefix(codecs.BOM_UTF8)
            self._header = line.decode(errors="replace").rstrip("\r\n").split("\t") if line else []
        return self._header

    def _records_of_part(self, path: Path, start: int, end: int | None, records: "_ReadRecords") -> Iterator[tuple[int, Any]]:
        """Yield (position, record) of a part: by seeking, if the file can seek and a record's beginning can be found from anywhere."""
        if not is_compressed(path) and self.fields.format_of(path) != "csv":
            for _, position, record in records(self._open(path), start, end):
                yield position, record
            return
        if path != self._path or self._peekable is None or self._peekable.has_passed(start):
            if self._peekable is not None:
                self.close()
            self._peekable = _Peekable(records(self._open(path), 0, None))
        peekable = self._peekable
        while (owner := peekable.next_owner) is not None and (end is None or owner < end):
            _, position, record = peekable.take()
            if owner >= start:
                yield position, record
        self.at_end = peekable.next_owner is None
        if peekable.error and peekable.last_taken >= start:  # reported once: by the part of the last record before the error
            raise peekable.error

    def _lines(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
        """Yield (position, line) of lines that begin at start <= position < end."""
        position = max(0, start - 1)
        stream.seek(position)
        if start > 0:
            position += len(stream.readline())  # the rest of the line that begins before the part
        while end is None or position < end:
            line = stream.readline()
            if not line:
                self.at_end = True
                return
            yield position, line if position else line.removeprefix(codecs.BOM_UTF8)
            position += len(line)

    def _non_empty_lines(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, int, bytes]]:
        for position, line in self._lines(stream, start, end):
            if not line.isspace():
                yield position, position, line

    def _separated_documents(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, int, bytes]]:
        """Yield (position of the separator before it, position, document).

        The first document of a file has no separator before it and belongs to position 0.
        """
        separator = self.fields.separator
        marker = None if separator is None or separator == "blank" else separator.encode()
        owner, document_start = 0, 0
        collected: list[bytes] | None = [] if start == 0 else None
        for position, line in self._lines(stream, start, None):
            if not (line.isspace() if marker is None else line.rstrip(b"\r\n") == marker):
                if collected is not None:
                    collected.append(line)
                elif end is not None and position >= end:
                    return  # the whole part lies inside a document that begins before it
                continue
            if collected and not all(map(bytes.isspace, collected)):
                yield owner, document_start, b"".join(collected)
            if end is not None and position >= end:
                return
            owner, document_start, collected = position, position + len(line), []
        if collected and not all(map(bytes.isspace, collected)):
            yield owner, document_start, b"".join(collected)

    def _csv_rows(self, stream: BinaryIO, start: int, end: int | None) -> Iterator[tuple[int, int, tuple]]:
        """Yield (position, position, (line, row, columns)) of CSV records (RFC 4180).

        A line break inside quotes is text, so only a reader that starts at the beginning knows where records begin.
        """
        columns = list(self.fields.columns)
        for position, line, row in _csv_records(self._lines(stream, start, end)):
            if not columns and isinstance(row, Problem):  # without a header the rest of the file cannot be read
                yield position, position, (line, dataclasses.replace(row, ends_file=True), columns)
                return
            if not columns:
                columns = row
                if problem := check_header(columns, self.fields):
                    yield position, position, (line, problem, columns)
                    return
            elif not line.isspace():
                yield position, position, (line, row, columns)

    def _read_table(self, path: Path, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        """Yield rows of the row groups or record batches [start, end). A problem of the whole file is reported by its first part."""
        self.at_end = True
        check_file(path, self.fields.format_of(path))
        try:
            table = Table(path, self.fields)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            if start == 0:
                yield 0, damaged(error, ends_file=True)
            return
        with table:
            problem = check_columns(table.columns, self.fields)
            if missing := [name for name in self.fields.names if name not in table.columns]:
                problem = missing_field(missing[0], table.columns, self.fields, ends_file=True)
            if problem is None:
                yield from table.rows(start, end)
            elif start == 0:
                yield 0, problem

    def _read_tokens(self, path: Path, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        shard = Shard(path.with_suffix(""))
        tokens = shard.documents(start, shard.num_documents if end is None else end)
        yield from ((number, TokenRecord(document)) for number, document in enumerate(tokens, start))
        self.at_end = True


def _with_check_of_archive(record: Record, path: Path) -> Record:
    """Return a record; if it is a problem that damage of a compressed file can cause, with the command that finds damage."""
    if not (isinstance(record, Problem) and record.reason in _SIGNS_OF_DAMAGE and is_compressed(path)):
        return record
    tool = COMPRESSIONS[path.suffix.lower()].command.split()[0]
    check = f"The file may be damaged: check it with {tool} -t {shlex.quote(str(path))}."
    return dataclasses.replace(record, message=f"{record.message.rstrip('.')}. {check}")


_ReadRecords = Callable[[BinaryIO, int, int | None], Iterator[tuple[int, int, Any]]]
"""A function (stream, start, end) -> (owner, position, record). A record belongs to the part that contains its owner, a position."""


class _Peekable:
    """An iterator over (owner, position, record) that shows the owner of the next record."""

    def __init__(self, records: Iterator[tuple[int, int, Any]]) -> None:
        self._records = records
        self.last_taken, self._has_taken = 0, False
        self.error: Exception | None = None
        """The error that ended the records before the end of the file."""
        self._next: tuple[int, int, Any] | None = None
        self._advance()

    @property
    def next_owner(self) -> int | None:
        """Owner of the next record, or None at the end."""
        return None if self._next is None else self._next[0]

    def has_passed(self, start: int) -> bool:
        """Return True if a record whose owner is at or after `start` was taken."""
        return self._has_taken and self.last_taken >= start

    def take(self) -> tuple[int, int, Any]:
        """Return the next record and go past it."""
        taken = self._next
        assert taken is not None
        self.last_taken, self._has_taken = taken[0], True
        self._advance()
        return taken

    def _advance(self) -> None:
        try:
            self._next = next(self._records, None)
        except READ_ERRORS as error:
            self._next, self.error = None, error


def _csv_records(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, Any]]:
    """Yield (position, the record as it is in the file, its fields or a Problem).

    A line that makes a record invalid costs only that line: the lines that were read as part of the record are read again.
    """
    again: list[tuple[int, bytes]] = []  # lines to read again, the next one last

    def _texts(used: list[tuple[int, bytes]]) -> Iterator[str]:
        size = 0
        while (line := again.pop() if again else next(lines, None)) is not None:
            used.append(line)
            size += len(line[1])
            if size > _MAX_CSV_RECORD_BYTES:
                raise csv.Error(f"a quote that opens here is not closed within {_MAX_CSV_RECORD_BYTES >> 20} MiB")
            yield line[1].decode()

    while True:
        used: list[tuple[int, bytes]] = []
        try:
            row: list[str] | Problem | None = next(csv.reader(_texts(used), strict=True), None)
        except UnicodeDecodeError as error:
            row = Problem("invalid UTF-8", f"it is not UTF-8: {error}", used[0][1])
        except csv.Error as error:
            row = Problem("broken CSV", f"it is not CSV: {error}", used[0][1])
        if not used:
            return
        if isinstance(row, Problem):
            again += reversed(used[1:])
            del used[1:]
        yield used[0][0], b"".join(line for _, line in used), row or []


csv.field_size_limit(_MAX_CSV_RECORD_BYTES)


def _split_at_tabs(line: bytes) -> list[str]:
    """Split a line at its tabs; nothing is quoted (IANA's text/tab-separated-values)."""
    return line.decode().rstrip("\r\n").split("\t")
