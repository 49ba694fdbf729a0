"""Corpora: sources of documents in a fixed order, cut into work units that can be processed independently of each other."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow

from data.command_line import UserError
from data.preparation.columnar import Table
from data.preparation.compressed import READ_ERRORS, is_compressed
from data.preparation.dataset_folders import how_to_read_saved
from data.preparation.fields import Fields, Problem, is_known, read_fields
from data.preparation.file_content import OtherContent, check_file
from data.preparation.input_files import SourceFile, find_files
from data.preparation.records import PartReader
from data.preparation.standard_library import embedded_documents
from data.shards import Shard

_MAX_SAMPLED_FILES = 1000
_COMPRESSION_RATIO = 4  # assumed ratio of a compressed file, used to balance the units


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes, rows or documents from start to end (see data/preparation/records.py)."""

    file: int
    """Index of the file in the corpus."""
    start: int = 0
    end: int | None = None
    """None: the end of the file."""


@dataclass(frozen=True)
class Unit:
    """A work unit: the input that one process handles at a time. The units do not depend on the number of processes."""

    index: int
    part: int
    """Index of the part of an open-ended unit; else 0."""
    spans: tuple[Span, ...]
    size: int
    """Approximate size on disk, in bytes; for an open-ended unit, the size of all its parts."""
    is_open_ended: bool = False
    """True if more parts may follow: the end of the file is known only when it is read."""

    @property
    def name(self) -> str:
        """Name of the unit's files."""
        return f"{self.index:07d}-{self.part:06d}"

    def next_part(self) -> "Unit":
        """Return the unit of the next part of an open-ended file."""
        (span,) = self.spans
        assert span.end is not None
        width = span.end - span.start
        return dataclasses.replace(self, part=self.part + 1, spans=(Span(span.file, span.end, span.end + width),))


@dataclass(frozen=True)
class FileCorpus:
    """Documents in files, which each process reads itself."""

    files: list[SourceFile]
    fields: Fields
    skipped_files: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Names of files that are not read, by reason."""

    @property
    def names(self) -> list[str]:
        """Name of each source, that is, of each file."""
        return [file.name for file in self.files]

    @property
    def position_units(self) -> list[str]:
        """Unit in which positions in each file are counted: "byte", "row", "document" or "file"."""
        return [self.fields.position_unit(file.path) for file in self.files]

    @property
    def input_names(self) -> list[str]:
        """Input that each source belongs to."""
        return [file.input_name for file in self.files]

    def identity(self) -> list[list]:
        """Return names, sizes and times, which show whether the text is still the same (as in make)."""
        return [[file.name, file.size, file.stamp] for file in self.files]

    def with_current_stamps(self) -> "FileCorpus":
        """Return the same files with the sizes and times that they have now."""
        return dataclasses.replace(self, files=[file.with_current_stamp() for file in self.files])

    def units(self, unit_bytes: int) -> Iterator[Unit]:
        """Yield the work units: several small files in one unit, a large file in several parts."""
        indices = itertools.count()
        small_files: list[Span] = []
        small_bytes = small_bytes_on_disk = 0

        def _unit_of_small_files() -> Iterator[Unit]:
            nonlocal small_files, small_bytes, small_bytes_on_disk
            if small_files:
                yield Unit(next(indices), 0, tuple(small_files), small_bytes_on_disk)
            small_files, small_bytes, small_bytes_on_disk = [], 0, 0

        for number, file in enumerate(self.files):
            size = file.size * (_COMPRESSION_RATIO if file.is_compressed else 1)
            if size < unit_bytes:
                if small_bytes + size > unit_bytes:
                    yield from _unit_of_small_files()
                small_files.append(Span(number))
                small_bytes, small_bytes_on_disk = small_bytes + size, small_bytes_on_disk + file.size
                continue
            yield from _unit_of_small_files()
            if self.fields.is_cut_by_bytes(file.path) and file.is_compressed:
                yield Unit(next(indices), 0, (Span(number, 0, unit_bytes),), file.size, is_open_ended=True)
            else:
                parts = self._parts(file, unit_bytes)
                for start, end in parts:
                    yield Unit(next(indices), 0, (Span(number, start, end),), file.size // len(parts))
        yield from _unit_of_small_files()

    def _parts(self, file: SourceFile, unit_bytes: int) -> list[tuple[int, int | None]]:
        """Cut a large file into (start, end) parts of about unit_bytes."""
        ends: list[int | None]
        if self.fields.is_cut_by_bytes(file.path):
            ends = [*range(unit_bytes, file.size, unit_bytes), None]
        elif self.fields.format_of(file.path) == "tokens":
            num_documents = Shard(file.path.with_suffix("")).num_documents
            document_bytes = max(1, file.size // num_documents)
            ends = [*range(max(1, unit_bytes // document_bytes), num_documents, max(1, unit_bytes // document_bytes)), None]
        elif self.fields.format_of(file.path) in ("parquet", "arrow") and not file.is_compressed:
            ends = [*_table_ends(file.path, self.fields, unit_bytes), None]
        else:
            ends = [None]
        return list(zip([0, *(end for end in ends if end is not None)], ends, strict=True))

    def check_contents(self) -> None:
        """Raise UserError if the content of a file is not of its format; of many files, only some are looked at."""
        for file in self.files[:: -(-len(self.files) // _MAX_SAMPLED_FILES)]:
            if (format := self.fields.format_of(file.path)) != "tokens":
                try:
                    check_file(file.path, format)
                except OtherContent as error:
                    raise UserError(f"{file.path}: {error}.") from error
                except READ_ERRORS:  # reported with its place when the file is read
                    pass

    def first_problem(self) -> str | None:
        """Return the first record at the beginning of a file that is not valid text, with its problem, or None."""
        for file in self.files[:_MAX_SAMPLED_FILES]:
            for _, record in PartReader(self.fields).read(file.path):
                if isinstance(record, Problem):
                    return f"{file.path}: {record.message}"
                break
        return None

    def sample_text(self, num_characters: int, is_wanted: Callable[[tuple[str, ...]], bool]) -> Iterator[str]:
        """Yield num_characters of text from documents that are wanted, from the beginning of files across the whole corpus.

        Each file has an equal share; what a short file leaves of its share goes to the later ones.
        """
        step = -(-len(self.files) // _MAX_SAMPLED_FILES)
        files = self.files[::step]
        reader = PartReader(self.fields)
        for number, file in enumerate(files):
            share = num_characters // (len(files) - number)
            for _, record in reader.read(file.path):
                if isinstance(record, tuple) and is_wanted(record):
                    for text in record:
                        yield text[:share]
                        num_characters -= len(text[:share])
                        share -= len(text[:share])
                if not share:
                    break
            reader.close()


Row = tuple[int, int, tuple[str, ...] | Problem]
"""(index of the source, position in it, texts)."""


@dataclass(frozen=True)
class StreamCorpus:
    """Rows that can only be read one after another; one process reads them and sends them to the workers in blocks."""

    input_name: str
    """Name of the whole corpus."""
    names: list[str]
    """Name of each source."""
    position_unit: str
    """Unit in which positions are counted."""
    rows: Callable[[], Iterator[Row]]
    """Function that returns an iterator over all rows; it can be called again."""
    stamp: list
    """Equal stamps mean equal rows."""
    unit_bytes: int
    """Characters of text in a unit that suit the size of this corpus."""

    @property
    def position_units(self) -> list[str]:
        """Unit in which positions in each source are counted."""
        return [self.position_unit] * len(self.names)

    @property
    def input_names(self) -> list[str]:
        """Input that each source belongs to."""
        return [self.input_name] * len(self.names)

    def identity(self) -> list[list]:
        """Return what shows whether the text is still the same."""
        return [[self.input_name, *self.stamp]]

    def blocks(self, unit_bytes: int) -> Iterator[tuple[Unit, list[Row]]]:
        """Yield each unit with its rows."""
        indices = itertools.count()
        block: list[Row] = []
        num_characters = 0
        for row in self.rows():
            block.append(row)
            num_characters += sum(map(len, row[2])) if isinstance(row[2], tuple) else 0
            if num_characters >= unit_bytes:
                yield Unit(next(indices), 0, (), num_characters), block
                block, num_characters = [], 0
        if block:
            yield Unit(next(indices), 0, (), num_characters), block

    def first_problem(self) -> str | None:
        """Return the problem of the first row, or None if it has none."""
        first = next(iter(self.rows()), None)
        return f"{self.input_name}: {first[2].message}" if first and isinstance(first[2], Problem) else None

    def sample_text(self, num_characters: int, is_wanted: Callable[[tuple[str, ...]], bool]) -> Iterator[str]:
        """Yield the first num_characters of text from documents that are wanted."""
        for _, _, texts in self.rows():
            if isinstance(texts, tuple) and is_wanted(texts):
                for text in texts:
                    yield text[:num_characters]
                    num_characters -= len(text[:num_characters])
            if not num_characters:
                return


Corpus = FileCorpus | StreamCorpus


def embedded_corpus() -> StreamCorpus:
    """Return the corpus that every machine with Python has: the standard library's source code and documentation."""
    documents = embedded_documents()
    stamp = hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest()
    rows: list[Row] = [(number, 0, (document.text,)) for number, document in enumerate(documents)]
    return StreamCorpus(
        "Python's standard library", [document.source for document in documents], "file", lambda: iter(rows), [stamp], 1 << 20
    )


def file_corpus(inputs: Sequence[str], fields: Fields, excluded_folders: Sequence[Path] = ()) -> FileCorpus:
    """Return the corpus of files, folders and glob patterns, without what lies in `excluded_folders`."""
    files, skipped = find_files(inputs, fields.format is not None, excluded_folders)
    return FileCorpus(files, fields, skipped)


def dataset_corpus(name: str, split: str, fields: Fields) -> StreamCorpus:
    """Return the corpus of a Hugging Face dataset, NAME, NAME:CONFIG or a local folder. It is streamed."""
    if Path(name).is_file():
        raise UserError(f"--dataset {name} is a file. Use --input {name}, or --dataset with a name or a folder.")
    if advice := how_to_read_saved(Path(name)):
        raise UserError(f"--dataset {name} {advice}")
    source = f"{Path(name.partition(':')[0]).name}:{split}"
    files = sorted(path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else []
    if compressed := [path for path in files if is_compressed(path) and is_known(path)]:
        raise UserError(
            f"--dataset {name} contains compressed files, such as {compressed[0]}. The datasets library can take padding or damage in them "
            "for their end. Give them with --input, which reads them to their last byte."
        )
    stamp = [[path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return StreamCorpus(f"{name}, {split}", [source], "row", partial(_read_dataset, name, split, fields), stamp, 16 << 20)


def _read_dataset(name: str, split: str, fields: Fields) -> Iterator[Row]:
    import datasets  # takes a second to import, and only this kind of input needs it

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield 0, number, read_fields(row, fields, repr(row).encode(errors="backslashreplace"))
    except Exception as error:  # no network, no such name, no such split, a broken file: the libraries raise many kinds of exception
        raise UserError(f"--dataset {name}, split {split}, cannot be read: {' '.join(str(error).split())}") from error


def _table_ends(path: Path, fields: Fields, unit_bytes: int) -> list[int]:
    """Return the indices of the blocks of rows before which a large table is cut.

    A table that cannot be read is not cut; the error is reported when its unit is processed.
    """
    try:
        with Table(path, fields) as table:
            sizes = table.block_bytes()
    except (pyarrow.ArrowException, OSError):
        return []
    ends, num_bytes = [], 0
    for block, size in enumerate(sizes):
        if num_bytes >= unit_bytes:
            ends.append(block)
            num_bytes = 0
        num_bytes += size
    return ends
