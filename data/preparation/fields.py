"""Where the text of a record stands, and what is wrong with a record that has none."""

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
    """Where a record's text stands."""

    text: str
    pair: str | None = None
    """A second text of the same record."""
    columns: tuple[str, ...] = ()
    """Names of the columns of .csv and .tsv files; without them the first line has the names."""
    separator: str | None = None
    """What parts the documents of a plain text: "blank" lines, every "line", or a marker; None where a file is one document."""
    format: str | None = None
    """How every file is read; None: each by its name."""

    @property
    def names(self) -> list[str]:
        return [self.text] if self.pair is None else [self.text, self.pair]

    def format_of(self, path: Path) -> str:
        """How a file is read: as plain text where its name says nothing that is known."""
        return self.format or FORMATS.get(_suffix(path), "txt")

    def is_cut_by_bytes(self, path: Path) -> bool:
        """Whether parts of this file are stretches of bytes."""
        return self.position_unit(path) == "byte"

    def position_unit(self, path: Path) -> str:
        """What the place of a record in this file counts: "byte", "row", "document", or "file" where the file is one record."""
        return _POSITION_UNITS.get(self.format_of(path), "file" if self.separator is None else "byte")


@dataclass(frozen=True)
class Problem:
    """A record, or the rest of a file, that is no text."""

    reason: str
    """One of a few, to be counted by."""
    sentence: str
    """What is wrong with this one."""
    raw: bytes = b""
    """The record as it stands in the file."""
    is_of_file: bool = False
    """Nothing behind it in the file can be read."""


@dataclass(frozen=True)
class TokenRecord:
    """A document that is tokens already.  [tokens]"""

    tokens: np.ndarray


Record = tuple[str, ...] | TokenRecord | Problem
"""A text, or a pair of texts."""


def is_known(path: Path) -> bool:
    """Whether a file's name says how it is read."""
    return _suffix(path) in FORMATS


def read_json(line: bytes, fields: Fields) -> Record:
    """The text of a JSON line, or what is wrong with it."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            record = json.loads(line.decode().rstrip("\r\n"))  # takes NaN, which is no JSON but is written; and says what is wrong
        except UnicodeDecodeError as error:
            return Problem("invalid UTF-8", f"it is not UTF-8: {error}", line)
        except json.JSONDecodeError as error:
            return Problem("broken JSON", f"it is not JSON: {error.msg}, column {error.colno}", line)
        except (RecursionError, ValueError) as error:  # nested too deep, a number of thousands of digits
            return Problem("broken JSON", f"it is not JSON that Python reads: {error}", line)
    if not isinstance(record, dict):
        return Problem("wrong type", f'it holds a {type(record).__name__}; a record is an object with the field "{fields.text}"', line)
    return read_fields(record, fields, line)


def read_fields(record: dict, fields: Fields, raw: bytes) -> Record:
    """The text of a record with named fields, or what is wrong with it."""
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
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            return Problem("invalid UTF-8", f'"{name}" is not text that UTF-8 can hold: {error}', raw)
        if not text.strip():
            return Problem("empty document", f'"{name}" is empty', raw)
        texts.append(text)
    return tuple(texts)


def read_row(split: Callable[[Any], Sequence[str]], record: Any, columns: Sequence[str], raw: bytes, fields: Fields) -> Record:
    """The text of a line of fields."""
    try:
        row = split(record)
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", f"it is not UTF-8: {error}", raw)
    if len(row) != len(columns):
        return Problem("wrong number of fields", f"it has {len(row)} fields; the columns are {', '.join(columns)}", raw)
    return read_fields(dict(zip(columns, row, strict=True)), fields, raw)


def decode_text(data: bytes) -> Record:
    try:
        return (data.decode(),)
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", f"it is not UTF-8: {error}", data)


def damaged(error: Exception, is_of_file: bool = False) -> Problem:
    return Problem("cut off or damaged", f"it cannot be read to its end: {' '.join(str(error).split())}", is_of_file=is_of_file)


def _suffix(path: Path) -> str:
    """The last part of a name that says no compression."""
    return next((suffix for suffix in map(str.lower, reversed(path.suffixes)) if suffix not in COMPRESSED), "")
