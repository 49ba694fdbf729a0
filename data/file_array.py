"""Arrays in files, read with pread.

A memory map is as fast for long reads, but if another process truncates the file, an access after its new end kills this process
(SIGBUS). With pread the same access is an error that names the file.
"""

import itertools
import os
import weakref
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

Array = TypeVar("Array", bound="FileArray")

_INDICES_AT_ONCE = 1024
_BYTES_PER_READ = 4096
"""A read of one value takes about as long as copying this many bytes from the page cache."""
_VALUES_PER_GUIDE = 512


class FileArray:
    """A one-dimensional array in a file that stays open; only what is asked for is read. Raises UserError if the file was truncated."""

    def __init__(self, path: str | os.PathLike, dtype: np.dtype | str, first_byte: int = 0, count: int | None = None) -> None:
        """`count` values that begin at `first_byte`; by default all up to the end of the file."""
        self.path, self.dtype = os.fspath(path), np.dtype(dtype)
        self._first_byte = first_byte
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            size = os.fstat(self._file).st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}.") from error
        self._count = (size - first_byte) // self.itemsize if count is None else count

    def __len__(self) -> int:
        return self._count

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self._count * self.itemsize

    def part(self, dtype: np.dtype | str, first_byte: int, count: int) -> "FileArray":
        """Return another array of the same open file."""
        return self._part(FileArray, dtype, first_byte, count)

    def ascending_part(self, dtype: np.dtype | str, first_byte: int, count: int) -> "AscendingFileArray":
        """Return another array of the same open file, whose values are in ascending order."""
        return self._part(AscendingFileArray, dtype, first_byte, count)

    def _part(self, kind: type[Array], dtype: np.dtype | str, first_byte: int, count: int) -> Array:
        part = object.__new__(kind)
        part.__dict__ = self.__dict__ | {"dtype": np.dtype(dtype), "_first_byte": first_byte, "_count": count, "_whole": self}
        return part

    def __getitem__(self, index: slice | int | np.integer | list[int] | NDArray) -> NDArray:
        """Return the values of a slice (without a step) or of an array of indices >= 0, or one value, read-only.

        Raises IndexError for an index outside the array, as numpy does.
        """
        if isinstance(index, slice):
            first, end, step = index.indices(self._count)
            assert step == 1
            return self._read(first, max(0, end - first))
        if isinstance(index, (np.ndarray, list)):
            return self._take(np.asarray(index))
        position = int(index) if index >= 0 else int(index) + self._count
        self._check_inside(position, position)
        return self._read(position, 1)[0]

    def tolist(self) -> list:
        """Return all values as Python numbers."""
        return self[:].tolist()

    def _check_inside(self, lowest: int, highest: int) -> None:
        """Raise IndexError if an index is outside the array: the file may contain another array there."""
        if lowest < 0 or highest >= self._count:
            raise IndexError(f"index {lowest if lowest < 0 else highest} is outside an array of {self._count} values in {self.path}")

    def _read(self, first: int, count: int) -> NDArray:
        wanted, offset = count * self.itemsize, self._first_byte + first * self.itemsize
        try:
            data = os.pread(self._file, wanted, offset)
            while len(data) < wanted and (more := os.pread(self._file, wanted - len(data), offset + len(data))):
                data += more  # Linux reads at most 2 GiB at once
            if len(data) < wanted:
                size = os.fstat(self._file).st_size
                raise UserError(f"{self.path} was truncated while it was read: it is {size:,} bytes long; {offset + wanted:,} are needed.")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from error
        return np.frombuffer(data, self.dtype)

    def _take(self, indices: NDArray) -> NDArray:
        """Return the values at these indices: with one read where they are close together, else one read for each run of neighbours."""
        flat = indices.reshape(-1)
        values = np.empty(len(flat), self.dtype)
        for start in range(0, len(flat), _INDICES_AT_ONCE):
            part = flat[start : start + _INDICES_AT_ONCE]
            first, end = int(part.min()), int(part.max()) + 1
            self._check_inside(first, end - 1)
            if (end - first) * self.itemsize <= len(part) * _BYTES_PER_READ:
                values[start : start + len(part)] = self._read(first, end - first)[part - first]
                continue
            edges = [0, *(np.flatnonzero(np.diff(part) != 1) + 1).tolist(), len(part)]
            for run, next_run in itertools.pairwise(edges):
                values[start + run : start + next_run] = self._read(int(part[run]), next_run - run)
        return values.reshape(indices.shape)


class AscendingFileArray(FileArray):
    """A FileArray in ascending order that can be searched. Every 512th value is in memory, and the part of the file that was read last."""

    _guides: NDArray | None = None
    _first = 0
    _block: NDArray = np.empty(0)
    _numbers: Sequence[int] = ()
    """The values of `_block`; reading one of them is ten times as fast as reading one of an array."""

    def value(self, index: int) -> int:
        """Return one value."""
        self._check_inside(index, index)
        if not self._first <= index < self._first + len(self._block):
            self._read(index, 1)
        return self._numbers[index - self._first]

    def bisect_left(self, value: int, end: int) -> int:
        """Return how many of the first `end` values are below `value`."""
        if self._guides is None:
            step = _VALUES_PER_GUIDE << 11
            self._guides = np.concatenate([self[start : start + step][::_VALUES_PER_GUIDE] for start in range(0, len(self), step)])
        first = max(0, int(self._guides.searchsorted(value)) - 1) * _VALUES_PER_GUIDE
        part = self._read(first, min(_VALUES_PER_GUIDE, len(self) - first))
        return min(end, first + int(part.searchsorted(value)))

    def _read(self, first: int, count: int) -> NDArray:
        if count > _VALUES_PER_GUIDE:
            return super()._read(first, count)
        if first < self._first or first + count > self._first + len(self._block):
            self._first = first // _VALUES_PER_GUIDE * _VALUES_PER_GUIDE
            self._block = super()._read(self._first, min(2 * _VALUES_PER_GUIDE, len(self) - self._first))
            self._numbers = self._block.data
        return self._block[first - self._first : first - self._first + count]
