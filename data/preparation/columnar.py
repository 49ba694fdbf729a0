"""Parquet and Arrow files as blocks of rows."""

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from data.preparation.compressed import is_compressed, open_decompressed
from data.preparation.fields import Fields, Problem, Record, damaged, read_fields

_ROWS_AT_ONCE = 256
_PARQUET_MAGIC = b"PAR1"
"""First and last bytes of a Parquet file (Parquet format, "File format")."""
_ARROW_FILE_MAGIC = b"ARROW1"
_ARROW_FILE_START = 8
"""Bytes before the stream that an Arrow file contains (Arrow columnar format, "IPC file format")."""
_BYTES_OF_TEXT = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}
"""Types that texts are read as. They are decoded one by one, so that an invalid text is one invalid row."""


class Table:
    """A Parquet file or an Arrow file (file or stream format), as blocks of rows: row groups or record batches."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self._fields = fields
        self._file = _uncompressed(path)
        self._parquet = fields.format_of(path) == "parquet"
        if self._parquet:
            self._table = pyarrow.parquet.ParquetFile(self._file, page_checksum_verification=True)
            self.columns: list[str] = self._table.schema_arrow.names
            return
        self._source = self._file if is_compressed(path) else pyarrow.memory_map(str(path))
        is_file = self._source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        self._source.seek(0)
        self._table = pyarrow.ipc.open_file(self._source) if is_file else pyarrow.ipc.open_stream(self._source)
        self._num_blocks: int | None = self._table.num_record_batches if is_file else None  # unknown for a stream until it is read
        self.columns = self._table.schema.names

    def block_bytes(self) -> list[int]:
        """Return the bytes that each block needs in memory."""
        if self._parquet:
            metadata = self._table.metadata
            return [metadata.row_group(block).total_byte_size for block in range(metadata.num_row_groups)]
        return [batch.get_total_buffer_size() for batch in self._batches()]

    def rows(self, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        """Yield (number, record) of each row of the blocks [start, end); a damaged block is one Problem."""
        if start == 0:
            try:
                self._check_number_of_rows()
                self._refuse_joined_files()
            except pyarrow.ArrowInvalid as error:
                yield 0, damaged(error, ends_file=True)
        yield from self._parquet_rows(start, end) if self._parquet else self._arrow_rows(start, end)

    def _check_number_of_rows(self) -> None:
        """Raise ArrowInvalid if the footer does not list all rows of the file, for example because it is damaged."""
        if self._parquet:
            metadata = self._table.metadata
            listed, num_rows = sum(metadata.row_group(block).num_rows for block in range(metadata.num_row_groups)), metadata.num_rows
            if listed != num_rows:
                raise pyarrow.ArrowInvalid(f"its footer lists row groups of {listed:,} rows, but {num_rows:,} rows in all")
        elif self._num_blocks is not None and (found := self._count_batches()) > self._num_blocks:
            raise pyarrow.ArrowInvalid(f"its footer lists {self._num_blocks:,} record batches, but it has at least {found:,}")

    def _refuse_joined_files(self) -> None:
        """Raise ArrowInvalid if files were joined (`cat`): only the last footer would be read, and its positions are in the first file."""
        if self._parquet:
            magic, start = _PARQUET_MAGIC, self._end_of_last_row_group()
        elif self._num_blocks is not None:
            self._count_batches()
            magic, start = _ARROW_FILE_MAGIC, self._source.tell()
        else:
            return  # a stream must end with its marker (see _batches)
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(magic * 2, start) != -1:
                raise pyarrow.ArrowInvalid("it consists of several files that were joined. Give each of them as a file of its own")

    def _end_of_last_row_group(self) -> int:
        metadata, end = self._table.metadata, 0
        if metadata.num_row_groups:
            last = metadata.row_group(metadata.num_row_groups - 1)
            for column in map(last.column, range(last.num_columns)):
                starts = [column.data_page_offset, *([column.dictionary_page_offset] if column.has_dictionary_page else [])]
                end = max(end, min(starts) + column.total_compressed_size)
        return max(0, end)

    def _count_batches(self) -> int:
        """Return the number of record batches in the stream that an Arrow file contains, up to the first damaged one."""
        count = 0
        self._source.seek(_ARROW_FILE_START)
        try:
            for message in pyarrow.ipc.MessageReader.open_stream(self._source):
                count += message.type == "record batch"
        except pyarrow.ArrowException:
            pass  # an error of a listed batch is reported when its rows are read
        return count

    def _parquet_rows(self, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        row = 0
        for block in range(self._table.metadata.num_row_groups if end is None else end):
            number = row
            row += self._table.metadata.row_group(block).num_rows
            if block < start:
                continue
            try:
                batches = self._table.iter_batches(_ROWS_AT_ONCE, row_groups=[block], columns=self._fields.names, use_threads=False)
                for batch in batches:
                    yield from _table_rows(number, _checked_columns(batch, self._fields), self._fields)
                    number += batch.num_rows
                if number != row:
                    raise pyarrow.ArrowInvalid(f"{row - number:,} rows of row group {block} are missing")
            except (pyarrow.ArrowException, OSError) as error:
                yield number, damaged(error)

    def _arrow_rows(self, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        row = 0
        try:
            for block, batch in enumerate(self._batches()):
                if end is not None and block >= end:
                    return
                if block >= start:
                    yield from self._batch_rows(row, batch)
                row += max(0, batch.num_rows)
        except pyarrow.ArrowException as error:
            if end is None:  # the rest of the file cannot be found; the part that ends with the file reports it
                yield row, damaged(error, ends_file=True)

    def _batch_rows(self, row: int, batch: Any) -> Iterator[tuple[int, Record]]:
        try:
            columns = _checked_columns(batch, self._fields)
        except pyarrow.ArrowException as error:
            yield row, damaged(error)
            return
        for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
            yield from _table_rows(row + first, [column.slice(first, _ROWS_AT_ONCE) for column in columns], self._fields)

    def _batches(self) -> Iterator[Any]:
        """Yield the record batches; they are mapped, not read."""
        if self._num_blocks is not None:
            yield from map(self._table.get_batch, range(self._num_blocks))
            return
        position = self._source.tell()
        for batch in self._table:
            yield batch
            position = self._source.tell()
        if self._source.tell() == position:  # the format allows this, but pyarrow always writes the marker: a stream without is cut off
            raise pyarrow.ArrowInvalid("the stream ends without its end-of-stream marker")
        if self._source.read(1):
            raise pyarrow.ArrowInvalid("other bytes follow the end-of-stream marker")

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _uncompressed(path: Path) -> BinaryIO:
    """Open a file so that it can seek, as tables need: a compressed file is decompressed into a temporary file."""
    stream = open_decompressed(path)
    if not is_compressed(path):
        return stream
    whole = tempfile.TemporaryFile()  # noqa: SIM115  closed with the table
    with stream:
        while piece := stream.read(1 << 20):
            whole.write(piece)
    whole.seek(0)
    return whole


def _checked_columns(batch: Any, fields: Fields) -> list[Any]:
    """Return the columns of the fields, texts as bytes. Raise ArrowInvalid if a length, offset or index is damaged.

    pyarrow does not check them when it reads a file, and would read outside of its memory.
    """
    batch.validate()
    return [_checked(batch.column(name)) for name in fields.names]


def _checked(column: Any) -> Any:
    if pyarrow.types.is_dictionary(column.type):
        return pyarrow.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))  # raises for an index outside
    column = column.view(_BYTES_OF_TEXT.get(column.type, column.type))
    column.validate(full=True)
    return column


def _table_rows(first: int, columns: list[Any], fields: Fields) -> Iterator[tuple[int, Record]]:
    for number, values in enumerate(zip(*(column.to_pylist() for column in columns), strict=True)):
        try:
            record = {name: value.decode() if isinstance(value, bytes) else value for name, value in zip(fields.names, values, strict=True)}
        except UnicodeDecodeError as error:
            yield first + number, Problem("invalid UTF-8", f"it is not UTF-8: {error}", repr(values).encode())
            continue
        yield first + number, read_fields(record, fields, repr(values).encode(errors="backslashreplace"))
