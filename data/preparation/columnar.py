"""Parquet and Arrow files as blocks of rows."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from data.preparation.compressed import is_compressed, open_decompressed
from data.preparation.fields import Fields, Problem, Record, damaged, read_fields

_ROWS_AT_ONCE = 256


class Table:
    """A Parquet file or an Arrow file (file or stream format), as blocks of rows: row groups or record batches."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self._fields = fields
        self._file = _uncompressed(path)
        self._parquet = fields.format_of(path) == "parquet"
        self._num_blocks: int | None
        if self._parquet:
            self._table = pyarrow.parquet.ParquetFile(self._file)
            self.schema, self._num_blocks = self._table.schema_arrow, self._table.metadata.num_row_groups
            return
        mapped = self._file if is_compressed(path) else pyarrow.memory_map(str(path))
        try:
            self._table = pyarrow.ipc.open_file(mapped)
            self._num_blocks = self._table.num_record_batches
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            self._table = pyarrow.ipc.open_stream(mapped)
            self._num_blocks = None  # unknown for a stream until it is read
        self.schema = self._table.schema

    def block_bytes(self) -> list[int]:
        """Return the bytes that each block needs in memory."""
        if self._parquet:
            metadata = self._table.metadata
            return [metadata.row_group(block).total_byte_size for block in range(metadata.num_row_groups)]
        return [batch.nbytes for batch in self._batches()]

    def rows(self, start: int, end: int | None) -> Iterator[tuple[int, Record]]:
        """Yield (number, record) of each row of the blocks [start, end); a damaged block is one Problem."""
        row = 0
        for block in range(self._table.metadata.num_row_groups if end is None else end) if self._parquet else ():
            number = row
            row += self._table.metadata.row_group(block).num_rows
            if block < start:
                continue
            try:
                batches = self._table.iter_batches(_ROWS_AT_ONCE, row_groups=[block], columns=self._fields.names, use_threads=False)
                for batch in batches:
                    yield from _table_rows(number, batch, self._fields)
                    number += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                yield number, damaged(error)
        try:
            for block, batch in enumerate(() if self._parquet else self._batches()):
                if block >= start and (end is None or block < end):
                    for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
                        yield from _table_rows(row + first, batch.slice(first, _ROWS_AT_ONCE), self._fields)
                row += batch.num_rows
        except pyarrow.ArrowException as error:
            if end is None:  # the rest of a stream cannot be found; the part that ends with the file reports it
                yield row, damaged(error, ends_file=True)

    def _batches(self) -> Iterable:
        """Return the record batches; they are mapped, not read."""
        return self._table if self._num_blocks is None else map(self._table.get_batch, range(self._num_blocks))

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


def _table_rows(first: int, batch: Any, fields: Fields) -> Iterator[tuple[int, Record]]:
    columns = []
    for name in fields.names:
        column = batch.column(name)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())  # decoded one by one below: a bad value is one bad row
        columns.append(column.to_pylist())
    for number, values in enumerate(zip(*columns, strict=True)):
        try:
            record = {name: value.decode() if isinstance(value, bytes) else value for name, value in zip(fields.names, values, strict=True)}
        except UnicodeDecodeError as error:
            yield first + number, Problem("invalid UTF-8", f"it is not UTF-8: {error}", repr(values).encode())
            continue
        yield first + number, read_fields(record, fields, repr(values).encode(errors="backslashreplace"))
