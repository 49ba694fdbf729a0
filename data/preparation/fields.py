"""Where the text of a record is, and what is wrong with a record that has no valid text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data.command_line import nearest
from data.preparation.compressed import COMPRESSED

FORMATS = {
    ".txt": "txt",
    ".md": "txt",
    ".py": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".idx": "tokens",
}
_POSITION_UNITS = {"jsonl": "byte", "csv": "byte", "tsv": "byte", "parquet": "row", "arrow": "row", "tokens": "document"}


@dataclass(frozen=True)
class Fields:
    """Where the text of each record is."""

    text: str
    pair: str | None = None
    """Field of the second text of the same record."""
    columns: tuple[str, ...] = ()
    """Column names of .csv and .tsv files; if empty, the first line contains them."""
    separator: str | None = None
    """Separator between the documents of a plain text: "blank" lines, every "line", or a marker; None: a file is one document."""
    format: str | None = None
    """Format of every file; None: the format that each file's name ends in."""

    @property
    def names(self) -> list[str]:
        """Names of the fields to read."""
        return [self.text] if self.pair is None else [self.text, self.pair]

    def format_of(self, path: Path) -> str:
        """Return the format that a file is read in. Without a given format, the suffix must be known (see `is_known`)."""
        return self.format or FORMATS[_suffix(path)]

    def is_cut_by_bytes(self, path: Path) -> bool:
        """Return True if parts of this file are ranges of bytes."""
        return self.position_unit(path) == "byte"

    def position_unit(self, path: Path) -> str:
        """Return the unit of a record's position in this file: "byte", "row", "document", or "file" if the file is one record."""
        return _POSITION_UNITS.get(self.format_of(path), "file" if self.separator is None else "byte")


@dataclass(frozen=True)
class Problem:
    """A record, or the rest of a file, that is not valid text."""

    reason: str
    """Kind of problem, to count by."""
    message: str
    """Description of what is wrong with this record."""
    raw: bytes = b""
    """The record as it is in the file."""
    ends_file: bool = False
    """True if the rest of the file cannot be read."""


@dataclass(frozen=True)
class TokenRecord:
    """A document that consists of tokens already.  [tokens]"""

    tokens: np.ndarray


TextRecord = tuple[str, ...] | Problem
"""A text or a pair of texts, or what is wrong with the record."""
Record = TextRecord | TokenRecord
"""Any record of a file."""


def is_known(path: Path) -> bool:
    """Return True if a file's suffix determines its format."""
    return _suffix(path) in FORMATS


def read_json(line: bytes, fields: Fields) -> TextRecord:
    """Return the text of a JSON line, or what is wrong with it."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            record = json.loads(line.decode().rstrip("\r\n"))  # accepts NaN, which is not JSON but is common, and gives better messages
        except UnicodeDecodeError as error:
            return Problem("invalid UTF-8", f"it is not UTF-8: {error}", line)
        except json.JSONDecodeError as error:
            return Problem("broken JSON", f"it is not JSON: {error.msg}, column {error.colno}", line)
        except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
            return Problem("broken JSON", f"it is not JSON that Python can read: {error}", line)
    if not isinstance(record, dict):
        return Problem("wrong type", f'it is a {type(record).__name__}; a record must be an object with the field "{fields.text}"', line)
    return read_fields(record, fields, line)


def read_fields(record: dict, fields: Fields, raw: bytes) -> TextRecord:
    """Return the text of a record with named fields, or what is wrong with it."""
    texts = []
    for name in fields.names:
        if name not in record:
            names = [str(key).encode(errors="backslashreplace").decode() for key in record]
            return Problem("missing field", f'it has no field "{name}".{nearest(name, names)}', raw)
        text = record[name]
        if name == fields.pair and isinstance(text, int) and not isinstance(text, bool):  # a label
            text = str(text)
        if not isinstance(text, str):
            return Problem("wrong type", f'"{name}" is {str(text)[:40]}, a {type(text).__name__}; it must be a string', raw)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
            return Problem("invalid UTF-8", f'"{name}" cannot be written as UTF-8: {error}', raw)
        if not text.strip():
            return Problem("empty document", f'"{name}" is empty', raw)
        texts.append(text)
    return tuple(texts)


def read_row(split: Callable[[Any], Sequence[str]], record: Any, columns: Sequence[str], raw: bytes, fields: Fields) -> TextRecord:
    """Return the text of a line of fields, or what is wrong with it. `split` cuts the record into its fields."""
    try:
        row = split(record)
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", f"it is not UTF-8: {error}", raw)
    if len(row) != len(columns):
        return Problem("wrong number of fields", f"it has {len(row)} fields; the columns are {', '.join(columns)}", raw)
    return read_fields(dict(zip(columns, row, strict=True)), fields, raw)


def decode_text(data: bytes) -> TextRecord:
    """Return UTF-8 data as a text, or what is wrong with it."""
    try:
        return (data.decode(),)
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", f"it is not UTF-8: {error}", data)


def damaged(error: Exception, ends_file: bool = False) -> Problem:
    """Return the problem of a file that a reader could not read to its end."""
    return Problem("cut off or damaged", f"it cannot be read to its end: {' '.join(str(error).split())}", ends_file=ends_file)


def _suffix(path: Path) -> str:
    """Return the last suffix of a name that is not one of a compression, in lower case."""
    return next((suffix for suffix in map(str.lower, reversed(path.suffixes)) if suffix not in COMPRESSED), "")
