"""Where documents come from, in a fixed order, cut into units of work that can be done apart from one another."""

import dataclasses
import glob
import hashlib
import itertools
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.command_line import UserError
from data.files import publish_file, sha256_of
from data.preparation.columnar import Table
from data.preparation.compressed import COMPRESSED, is_compressed
from data.preparation.fields import FORMATS, Fields, Problem, is_known, read_fields
from data.preparation.records import PartReader
from data.shards import Shard

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


STANDARD_INPUT = "-"
_FILES_LEARNT_FROM = 1000
_COMPRESSION = 4  # bytes that one of a compressed file is taken for where work is shared out


@dataclass(frozen=True)
class Document:
    """One text. `source` says where it is, the same on every machine: its path inside the input, and its place where a file has many."""

    text: str
    source: str


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """Its path inside the input, the same on every machine."""
    given: str
    """The input that names it."""
    size: int
    stamp: str
    """Of what is in it: the time when it was written or, of standard input, a hash."""

    @property
    def is_compressed(self) -> bool:
        return is_compressed(self.path)


@dataclass(frozen=True)
class Span:
    """A part of a file, in what data/preparation/records.py cuts its kind by."""

    file: int
    """Number in the corpus."""
    start: int = 0
    end: int | None = None
    """None: to the end of the file."""


@dataclass(frozen=True)
class Unit:
    """What one process does at a time; the same for every number of processes."""

    number: int
    part: int
    """Of a file whose end is not known before it is read."""
    spans: tuple[Span, ...]
    size: int
    """Bytes on the disk, about; of an open-ended one, of all its parts."""
    is_open_ended: bool = False
    """There may be parts behind this one: reading shows whether the file goes on."""

    @property
    def name(self) -> str:
        return f"{self.number:07d}-{self.part:06d}"

    def next_part(self) -> "Unit":
        (span,) = self.spans
        width = span.end - span.start
        return dataclasses.replace(self, part=self.part + 1, spans=(Span(span.file, span.end, span.end + width),))


@dataclass(frozen=True)
class FileCorpus:
    """Files that processes read by themselves."""

    files: list[SourceFile]
    fields: Fields
    not_read: tuple[str, ...] = ()
    """Files of the folders whose names say no format."""

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]

    @property
    def position_units(self) -> list[str]:
        return [self.fields.position_unit(file.path) for file in self.files]

    @property
    def givens(self) -> list[str]:
        """The input that each source belongs to."""
        return [file.given for file in self.files]

    def identity(self) -> list[list]:
        """What is compared to tell whether the text is the same: names, sizes and times, as make does."""
        return [[file.name, file.size, file.stamp] for file in self.files]

    def as_it_is_now(self) -> "FileCorpus":
        """The same files with the sizes and times that they have now."""
        return dataclasses.replace(self, files=[_seen(file) for file in self.files])

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Small files together, large ones in parts."""
        numbers = itertools.count()
        together: list[Span] = []
        gathered = gathered_on_disk = 0

        def small_ones() -> Iterator[Unit]:
            nonlocal together, gathered, gathered_on_disk
            if together:
                yield Unit(next(numbers), 0, tuple(together), gathered_on_disk)
            together, gathered, gathered_on_disk = [], 0, 0

        for number, file in enumerate(self.files):
            size = file.size * (_COMPRESSION if file.is_compressed else 1)
            if size < unit_bytes:
                if gathered + size > unit_bytes:
                    yield from small_ones()
                together.append(Span(number))
                gathered, gathered_on_disk = gathered + size, gathered_on_disk + file.size
                continue
            yield from small_ones()
            if self.fields.is_cut_by_bytes(file.path) and file.is_compressed:
                yield Unit(next(numbers), 0, (Span(number, 0, unit_bytes),), file.size, is_open_ended=True)
            else:
                cuts = self._cuts(file, unit_bytes)
                for start, end in cuts:
                    yield Unit(next(numbers), 0, (Span(number, start, end),), file.size // len(cuts))
        yield from small_ones()

    def _cuts(self, file: SourceFile, unit_bytes: int) -> list[tuple[int, int | None]]:
        if self.fields.is_cut_by_bytes(file.path):
            ends = [*range(unit_bytes, file.size, unit_bytes), None]
        elif self.fields.format_of(file.path) == "tokens":
            documents = Shard(file.path.with_suffix("")).num_documents
            stored = max(1, file.size // documents)
            ends = [*range(max(1, unit_bytes // stored), documents, max(1, unit_bytes // stored)), None]
        elif self.fields.format_of(file.path) in ("parquet", "arrow") and not file.is_compressed:
            ends = [*_table_ends(file.path, self.fields, unit_bytes), None]
        else:
            ends = [None]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def first_problem(self) -> str | None:
        """Where the first record stands that is no text, and why, if there is one at the beginning of a file."""
        for file in self.files[:_FILES_LEARNT_FROM]:
            for _, record in PartReader(self.fields).read(file.path):
                if isinstance(record, Problem):
                    return f"{file.path}: {record.sentence}"
                break
        return None

    def beginning(self, characters: int, is_wanted: Callable[[tuple[str, ...]], bool]) -> Iterator[str]:
        """So many characters of text, of the documents that are wanted: the beginning of files spread over the whole corpus, what a
        short one leaves going to the later ones.
        """
        step = -(-len(self.files) // _FILES_LEARNT_FROM)
        chosen = self.files[::step]
        reader = PartReader(self.fields)
        for number, file in enumerate(chosen):
            share = characters // (len(chosen) - number)
            for _, record in reader.read(file.path):
                if isinstance(record, tuple) and is_wanted(record):
                    for text in record:
                        yield text[:share]
                        characters -= len(text[:share])
                        share -= len(text[:share])
                if not share:
                    break
            reader.close()


Row = tuple[int, int, tuple[str, ...] | Problem]
"""Number of its source, place in it, texts."""


@dataclass(frozen=True)
class StreamCorpus:
    """Rows that come one after another; one process reads them and deals them out in blocks."""

    given: str
    """What a person calls all of it."""
    names: list[str]
    position_unit: str
    rows: Callable[[], Iterator[Row]]
    """All of them, as often as wanted."""
    stamp: list
    """Equal stamps are equal rows."""
    unit_bytes: int
    """Of text, that fit the size of it all."""

    @property
    def position_units(self) -> list[str]:
        return [self.position_unit] * len(self.names)

    @property
    def givens(self) -> list[str]:
        return [self.given] * len(self.names)

    def identity(self) -> list[list]:
        return [[self.given, *self.stamp]]

    def blocks(self, unit_bytes: int) -> Iterator[tuple[Unit, list[Row]]]:
        """A unit and its rows."""
        numbers = itertools.count()
        block: list[Row] = []
        gathered = 0
        for row in self.rows():
            block.append(row)
            gathered += sum(map(len, row[2])) if isinstance(row[2], tuple) else 0
            if gathered >= unit_bytes:
                yield Unit(next(numbers), 0, (), gathered), block
                block, gathered = [], 0
        if block:
            yield Unit(next(numbers), 0, (), gathered), block

    def first_problem(self) -> str | None:
        """What is wrong with the first row, if anything is."""
        first = next(iter(self.rows()), None)
        return f"{self.given}: {first[2].sentence}" if first and isinstance(first[2], Problem) else None

    def beginning(self, characters: int, is_wanted: Callable[[tuple[str, ...]], bool]) -> Iterator[str]:
        """So many characters of text, of the documents that are wanted."""
        for _, _, texts in self.rows():
            if isinstance(texts, tuple) and is_wanted(texts):
                for text in texts:
                    yield text[:characters]
                    characters -= len(text[:characters])
            if not characters:
                return


Corpus = FileCorpus | StreamCorpus


def embedded_corpus() -> StreamCorpus:
    """The text that every machine with Python has: source and documentation of the standard library, some ten megabytes."""
    documents = embedded_documents()
    stamp = hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest()
    rows = [(number, 0, (document.text,)) for number, document in enumerate(documents)]
    return StreamCorpus(
        "Python's standard library", [document.source for document in documents], "file", lambda: iter(rows), [stamp], 1 << 20
    )


def embedded_documents() -> list[Document]:
    """The documents of the embedded corpus."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [document for document in _standard_library(root) if document.text.strip()]
    if not documents:
        raise UserError(f"{root} holds no source text of Python's standard library. Give a corpus with --input.")
    return documents


def file_corpus(inputs: Sequence[str], fields: Fields, without: Sequence[Path] = ()) -> FileCorpus:
    """The documents of files, folders and globs, but for what lies in the folders `without`."""
    files, not_read = find_files(inputs, fields.format is not None, without)
    return FileCorpus(files, fields, tuple(not_read))


def dataset_corpus(name: str, split: str, fields: Fields) -> StreamCorpus:
    """A Hugging Face dataset NAME or NAME:CONFIG, or a folder that one can be loaded from, streamed."""
    source = f"{Path(name.partition(':')[0]).name}:{split}"
    files = sorted(path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else []
    stamp = [[path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return StreamCorpus(f"{name}, {split}", [source], "row", partial(_read_dataset, name, split, fields), stamp, 16 << 20)


def find_files(inputs: Sequence[str], any_name: bool = False, without: Sequence[Path] = ()) -> tuple[list[SourceFile], list[str]]:
    """The files that inputs name, each once, sorted within each input; of a folder those whose names are known, or all, and the
    names of the others.
    """
    files: dict[Path, SourceFile] = {}
    not_read: list[str] = []
    left_out = [folder.resolve() for folder in without]
    for given in inputs:
        if not given:
            raise UserError('--input "" names no file; was a variable empty?')
        path = Path(given)
        if path.is_dir():
            root, below = path, set(_files_below(path))
            found = [file for file in below if any_name or is_known(file)]
            not_read += [spelt(file) for file in sorted(below) if not (any_name or is_known(file) or file.with_suffix(".idx") in below)]
        elif path.exists():
            root, found = path.parent, [path]
        else:
            root, found = _glob_root(given), [Path(file) for file in glob.glob(given, recursive=True) if Path(file).is_file()]
        found = [file.with_suffix(".idx") if file.suffix == ".bin" and file.with_suffix(".idx").exists() else file for file in found]
        if not found:
            raise UserError(
                f"--input {given}: "
                + (f"no {', '.join(FORMATS)} file in this folder, plain or {', '.join(COMPRESSED)}." if path.is_dir() else "no such file.")
            )
        for file in sorted(found):
            resolved = file.resolve()
            if not any(folder in resolved.parents for folder in left_out):
                files.setdefault(resolved, _seen(SourceFile(file, spelt(file.relative_to(root)), spelt(Path(given)), 0, "")))
    names = Counter(file.name for file in files.values())
    found = [dataclasses.replace(file, name=spelt(file.path)) if names[file.name] > 1 else file for file in files.values()]
    return found, not_read


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"--input {folder}: {error.filename} cannot be read: {error.strerror}.") from error

    for place, _, names in os.walk(folder, onerror=refuse, followlinks=False):
        yield from (path for name in names if (path := Path(place, name)).is_file())


def _seen(file: SourceFile) -> SourceFile:
    """With its size and time as they are; of a token file those of both its files."""
    paths = [file.path, *([file.path.with_suffix(".bin")] if file.path.suffix == ".idx" else [])]
    try:
        seen = [path.stat() for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return dataclasses.replace(file, size=sum(one.st_size for one in seen), stamp=" ".join(str(one.st_mtime_ns) for one in seen))


def spelt(path: Path) -> str:
    """A path as text, also where its bytes are none."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def keep_standard_input(folder: Path | None) -> SourceFile:
    """Standard input as a file in a folder, so that it can be read in parts, and again after a crash; None: only see what it is.

    Where the file is there, what comes in now is compared with it: UserError where it differs.
    """
    digest, size = hashlib.sha256(), 0
    path = (folder or Path()) / "standard-input"
    beside = path.with_suffix(".incomplete")
    with open(beside if folder else os.devnull, "wb") as file:
        while piece := sys.stdin.buffer.read(1 << 20):
            digest.update(piece)
            size += file.write(piece)
    if folder and path.exists():
        beside.unlink()
        if sha256_of(path) != digest.hexdigest():
            raise UserError(f"Standard input is not what it was when {folder} was begun. Give the same again, or another --output.")
    elif folder:
        publish_file(beside, path)
    return SourceFile(path, "standard input", STANDARD_INPUT, size, digest.hexdigest())


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


def _read_dataset(name: str, split: str, fields: Fields) -> Iterator[Row]:
    import datasets  # takes a second to import, and only this source needs it

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield 0, number, read_fields(row, fields, repr(row).encode(errors="backslashreplace"))
    except Exception as error:  # no network, no such name, no such split, a broken file: the libraries below raise as they like
        raise UserError(f"--dataset {name}, split {split}, cannot be read: {' '.join(str(error).split())}") from error


def _table_ends(path: Path, fields: Fields, unit_bytes: int) -> list[int]:
    """The blocks of rows before which a large table is cut; none in one that cannot be read, which its unit will say."""
    import pyarrow

    try:
        with Table(path, fields) as table:
            sizes = table.block_bytes()
    except (pyarrow.ArrowException, OSError):
        return []
    ends, gathered = [], 0
    for block, size in enumerate(sizes):
        if gathered >= unit_bytes:
            ends.append(block)
            gathered = 0
        gathered += size
    return ends


def _glob_root(pattern: str) -> Path:
    """The folder that a pattern starts from: as much of it as names no choice."""
    parts = Path(pattern).parts
    magic = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:magic])
