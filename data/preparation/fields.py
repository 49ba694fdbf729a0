"""Where the text of a record is, and what is wrong with a record that has no valid text."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
_BYTE_ORDER_MARK = "\ufeff"
_NAMED_FIELDS, _NAMED_CHARACTERS = 10, 40  # in a message about a missing field
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

    def option_of(self, name: str) -> str:
        """Return the option that names a field."""
        return "--pair_field" if name == self.pair else "--text_field"

    def format_of(self, path: Path) -> str:
        """Return the format that a file is read in. Without a given format, the suffix must be known (see `is_known`)."""
        return self.format or FORMATS[_suffix(path)]

    @cached_property
    def json_keys(self) -> list[re.Pattern[bytes]]:
        """Patterns of the names of the fields to read, in which JSON may write any character as \\uXXXX."""
        return [re.compile(b'"' + b"".join(map(_json_spellings, name)) + b'"') for name in self.names]

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
    option: str = ""
    """Option that names the field that is missing or of a wrong type."""


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
        message = f'it is a {type(record).__name__}; a record must be an object with the field "{fields.text}".'
        return Problem("wrong type", message + _jq_advice(record, ".[]"), line)
    might_repeat = False
    for key in fields.json_keys:  # faster than any(), on the path of every record
        might_repeat = might_repeat or len(key.findall(line)) > 1
    found = (might_repeat and _repeated_field(line, fields)) or read_fields(record, fields, line)
    if isinstance(found, Problem) and found.reason == "missing field":
        return dataclasses.replace(found, message=found.message + _jq_advice(record.get("data"), ".data[]"))
    return found


def _jq_advice(value: Any, jq: str) -> str:
    """Return how to convert a file whose records are in a list, or nothing if `value` is no list of records."""
    is_list_of_records = isinstance(value, list) and value and isinstance(value[0], dict)
    if not is_list_of_records:
        return ""
    jq = filter_for_list(jq, "paragraphs" in value[0])
    return f" If it has the records of the whole file, convert it (jq -c '{jq}' FILE > NEW_FILE.jsonl)."


def filter_for_list(jq: str, has_paragraphs: bool) -> str:
    """Return jq's filter for the records in a list of entries, `jq`. In SQuAD an entry has paragraphs with "context" and "qas"."""
    return f"{jq}.paragraphs[]" if has_paragraphs else jq


def _json_spellings(character: str) -> bytes:
    """Return a pattern of one character in a JSON string: itself, or escaped."""
    units = character.encode("utf-16-be", "surrogatepass").hex()
    escaped = "".join(rf"\\u(?i:{units[start : start + 4]})" for start in range(0, len(units), 4))
    plain = json.dumps(character, ensure_ascii=False)[1:-1].encode(errors="surrogatepass")
    return b"(?:" + re.escape(plain) + b"|" + escaped.encode() + b")"


def _repeated_field(line: bytes, fields: Fields) -> Problem | None:
    """Return the problem of a JSON object that has a field to read more than once. Parsers take one of its values without a message."""
    try:
        names = [name for name, _ in json.loads(line, object_pairs_hook=list, parse_int=float)]
    except RecursionError as error:
        return Problem("broken JSON", f"it is not JSON that Python can read: {error}", line)
    repeated = [name for name in fields.names if names.count(name) > 1]
    return Problem("repeated field", f'it has the field "{repeated[0]}" {names.count(repeated[0])} times', line) if repeated else None


def check_columns(columns: Sequence[str], fields: Fields) -> Problem | None:
    """Return the problem of a table that has a column to read more than once, or None."""
    for name in fields.names:
        numbers = [str(number) for number, column in enumerate(columns, start=1) if column == name]
        if len(numbers) > 1:
            return Problem("repeated field", f'columns {" and ".join(numbers)} have the same name, "{name}"', ends_file=True)
    return None


def missing_field(name: str, names: Sequence[str], fields: Fields, raw: bytes = b"", ends_file: bool = False) -> Problem:
    """Return the problem of a record or a table that has other fields, `names`, than the one to read."""
    others = nearest(name, names) or f" Its fields: {', '.join(key[:_NAMED_CHARACTERS] for key in names[:_NAMED_FIELDS])}."
    return Problem("missing field", f'it has no field "{name}".{others}', raw, ends_file, fields.option_of(name))


def read_fields(record: dict, fields: Fields, raw: bytes) -> TextRecord:
    """Return the text of a record with named fields, or what is wrong with it."""
    texts = []
    for name in fields.names:
        if name not in record:
            names = [str(key).encode(errors="backslashreplace").decode() for key in record]
            return missing_field(name, names, fields, raw)
        text = record[name]
        if name == fields.pair and isinstance(text, int) and not isinstance(text, bool):  # a label
            text = str(text)
        if not isinstance(text, str):
            message = f'"{name}" is {str(text)[:40]}, a {type(text).__name__}; it must be a string'
            return Problem("wrong type", message, raw, option=fields.option_of(name))
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
    found = read_fields(dict(zip(columns, row, strict=True)), fields, raw)
    if (
        isinstance(found, tuple)
        and found[0].removeprefix(_BYTE_ORDER_MARK) in columns
        and (header := _repeated_header(row, columns, raw, fields))
    ):
        return header
    if isinstance(found, Problem) and found.reason == "missing field":
        if len(columns) == 1:
            message = f'it has one column, "{columns[0]}". Fields are separated by commas in csv and by tabs in tsv (see --input_format).'
        else:
            message = f"{found.message} If the first line of the file is a record, name the columns with --columns." * (not fields.columns)
        return dataclasses.replace(found, message=message or found.message)
    return found


def _repeated_header(row: Sequence[str], columns: Sequence[str], raw: bytes, fields: Fields) -> Problem | None:
    """Return the problem of a row that is a header, as in files with headers that were joined, or None."""
    names = [row[0].removeprefix(_BYTE_ORDER_MARK), *row[1:]]
    if len(row) == 1 and names == list(row):  # the only field of a record can be any text
        return None
    if names == list(columns):
        advice = "If it is a header, leave out --columns." if fields.columns else "It is a header, not a record."
        return Problem("repeated header", f"it repeats the names of the columns. {advice}", raw)
    if sorted(names) == sorted(columns):
        message = (
            "it names the columns in another order, as in files with headers that were joined. Give each of them as a file of its own."
        )
        return Problem("repeated header", message, raw)
    return None


def check_line_ends(first_line: Sequence[str]) -> Problem | None:
    """Return the problem of a .tsv file whose lines end in CR alone, so that all of them would be its first line, or None."""
    if any("\r" in field for field in first_line):
        message = "its lines end in CR without LF. Convert it (tr '\\r' '\\n' < FILE > NEW_FILE)"
        return Problem("broken TSV", message, ends_file=True)
    return None


def check_header(columns: Sequence[str], fields: Fields) -> Problem | None:
    """Return the problem of a first line that does not name each column to read exactly once, or None."""
    if not any(columns):
        return Problem(
            "missing field", "its first line names no column. Remove that line, or name the columns with --columns.", ends_file=True
        )
    found = check_columns(columns, fields) or read_row(list, columns, columns, b"", fields)
    if isinstance(found, Problem) and found.reason in ("repeated field", "missing field"):
        return dataclasses.replace(found, ends_file=True)
    return None


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
