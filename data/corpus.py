"""Documents in, from every source, in a fixed order."""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

from data.command_line import UserError, nearest

_JSON_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt", ".md", ".py")
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")

# Left out of the standard library's text. Folders: tests and their data, maps of character sets, other people's packages, compiled files.
_NOT_TEXT_FOLDERS = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
# Files: tables (entities, stringprep, _casefix), and what differs from machine to machine (build settings, a site's own start-up).
_NOT_TEXT_FILES = (
    "html/entities.py",
    "stringprep.py",
    "re/_casefix.py",
    "_sysconfigdata*",
    "config-*/*",
    "sitecustomize.py",
    "usercustomize.py",
)
_TOPICS = "pydoc_data/topics.py"  # the language reference as one literal; its texts are read instead


@dataclass(frozen=True)
class Document:
    """One text. `source` says where it is, the same on every machine: its path inside the input, and the line where a file has many."""

    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Parts to be read one after the other, each as often as wanted; equal identities are equal texts."""

    parts: Sequence[Callable[[], Iterator[Document]]]
    identity: str

    def documents(self) -> Iterator[Document]:
        for part in self.parts:
            yield from part()


def is_held_out(source: str, fraction: float) -> bool:
    """Whether a document is kept for validation: by a hash of its source, so that it stays there when others come or go."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()) % 10**6 < fraction * 10**6


def embedded_corpus() -> Corpus:
    """The text that every machine with Python has: source and documentation of the standard library, some ten megabytes."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = list(_standard_library(root))
    if not documents:
        raise UserError(f"{root} holds no source text of Python's standard library. Give a corpus with --input.")
    identity = hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest()
    return Corpus([partial(iter, documents)], identity)


def file_corpus(inputs: Sequence[str], text_field: str) -> Corpus:
    """The documents of files, folders and globs. Their identity is that of names, sizes and times, as it is for make."""
    files = find_files(inputs)
    seen = [(source, path.stat().st_size, path.stat().st_mtime_ns) for path, source in files.items()]
    return Corpus([partial(read_file, path, source, text_field) for path, source in files.items()], _hash(seen))


def dataset_corpus(name: str, split: str, text_field: str) -> Corpus:
    """A Hugging Face dataset NAME or NAME:CONFIG, or a folder that one can be loaded from, streamed."""
    return Corpus([partial(_read_dataset, name, split, text_field)], _hash([name, split]))


def find_files(inputs: Sequence[str]) -> dict[Path, str]:
    """The files that inputs name, sorted within each input, with their paths inside it."""
    files: dict[Path, str] = {}
    for given in inputs:
        if not given:
            raise UserError('--input "" names no file; was a variable empty?')
        path = Path(given)
        if path.is_dir():
            root, found = path, [file for file in path.rglob("*") if _is_readable(file)]
        elif path.exists():
            root, found = path.parent, [path]
        else:
            root, found = _glob_root(given), [Path(file) for file in glob.glob(given, recursive=True) if Path(file).is_file()]
        if not found:
            raise UserError(
                f"--input {given}: "
                + (
                    f"no {', '.join(_TEXT + _JSON_LINES)} file in this folder, plain or {', '.join(_COMPRESSED)}."
                    if path.is_dir()
                    else "no such file."
                )
            )
        files |= {file: file.relative_to(root).as_posix() for file in sorted(found)}
    return files


def read_file(path: Path, source: str, text_field: str) -> Iterator[Document]:
    """The documents of one file: JSON Lines have one a line, any other file is one. UserError names the file and line that is bad."""
    suffixes = [suffix for suffix in path.suffixes[-2:] if suffix not in _COMPRESSED]
    try:
        with _open_decompressed(path) as file:
            if suffixes and suffixes[-1] in _JSON_LINES:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        yield Document(_read_line(line, f"{path}, line {number}", text_field), f"{source}:{number}")
            else:
                yield Document(_decode(file.read(), str(path)), source)
    except (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} cannot be read to its end: {error}") from error


def drop_duplicates_and_empty(documents: Iterator[Document], dropped: dict[str, int]) -> Iterator[Document]:
    """The documents without those that hold nothing but white space and those whose very text came before, counted in `dropped`.

    What came before is remembered as a hash: about 100 bytes of memory a document.
    """
    seen: set[bytes] = set()
    for document in documents:
        if not document.text.strip():
            dropped["empty"] += 1
            continue
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(digest)
        yield document


def _standard_library(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix not in (".py", ".txt", ".rst") or _NOT_TEXT_FOLDERS & set(inside.parts) or any(map(inside.match, _NOT_TEXT_FILES)):
            continue
        if inside.as_posix() == _TOPICS:
            from pydoc_data.topics import topics  # half a megabyte that only this source reads

            for name, text in sorted(topics.items()):
                yield Document(text, f"{_TOPICS}:{name}")
        elif path.is_file():
            try:
                yield Document(path.read_bytes().decode(), inside.as_posix())
            except UnicodeDecodeError:
                continue  # in another encoding, on purpose


def _read_dataset(name: str, split: str, text_field: str) -> Iterator[Document]:
    import datasets  # takes a second to import, and only this source needs it

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Document(_field(row, f"--dataset {name}, {split}, row {number}", text_field), f"{Path(path).name}:{split}:{number}")
    except UserError:
        raise
    except Exception as error:  # no network, no such name, no such split, a broken file: the libraries below raise as they like
        raise UserError(f"--dataset {name}, split {split}, cannot be read: {' '.join(str(error).split())}") from error


def _is_readable(path: Path) -> bool:
    name = path.name
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name.endswith(_TEXT + _JSON_LINES) and path.is_file()


def _glob_root(pattern: str) -> Path:
    """The folder that a pattern starts from: as much of it as names no choice."""
    parts = Path(pattern).parts
    magic = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:magic])


def _open_decompressed(path: Path) -> BinaryIO:
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _ZstandardFile.open}.get(path.suffix, open)
    return opener(path, "rb")


class _ZstandardFile(io.RawIOBase):
    """All frames of a .zst; one that is cut off raises EOFError, where zstandard's own reader ends without a word."""

    @classmethod
    def open(cls, path: Path, mode: str) -> BinaryIO:
        return io.BufferedReader(cls(open(path, mode)), buffer_size=1 << 20)

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(1 << 17)
            if not self._compressed:
                if self._frame:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_line(line: bytes, place: str, text_field: str) -> str:
    try:
        record = json.loads(_decode(line.rstrip(b"\r\n"), place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg}, column {error.colno}.") from error
    if not isinstance(record, dict):
        raise UserError(f'{place} holds a {type(record).__name__}; a line is an object with the field "{text_field}".')
    return _field(record, place, text_field)


def _field(record: dict, place: str, text_field: str) -> str:
    if text_field not in record:
        raise UserError(f'{place} has no field "{text_field}".{nearest(text_field, list(record))} Set with --text_field.')
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f'{place}: "{text_field}" is {str(text)[:40]}, a {type(text).__name__}; it must be a string.')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(f'{place}: "{text_field}" is not text that UTF-8 can hold: {error}.') from error
    return text


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: {error}.") from error


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
