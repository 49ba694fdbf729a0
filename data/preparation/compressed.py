"""Files that may be compressed, read as decompressed bytes from any position."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_READ_AT_ONCE = 1 << 14  # bytes of a .zst: few, because repetitive text decompresses to a thousand times as much
READ_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
"""Exceptions that the readers raise if a file is cut off or damaged."""


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file for its decompressed bytes. A compressed file seeks forward by reading, and backward by starting again."""
    return decompressed(open(path, "rb"), path)


def decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    """Return the decompressed bytes of an open file. The caller closes the file; its position shows how much was read."""
    openers: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _ZstandardFile.open_file}
    opener = openers.get(path.suffix.lower())
    return opener(file) if opener else file


def is_compressed(path: Path) -> bool:
    """Return True if the file's suffix is one of a compression."""
    return path.suffix.lower() in COMPRESSED


class _ZstandardFile(io.RawIOBase):
    """All frames of a .zst file. A file that is cut off raises EOFError; zstandard's own reader would end silently."""

    @classmethod
    def open_file(cls, file: BinaryIO) -> BinaryIO:
        """Return the decompressed bytes of an open .zst file, buffered."""
        return io.BufferedReader(cls(file), buffer_size=1 << 20)

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._restart()

    def _restart(self) -> None:
        self._file.seek(0)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = self._plain = b""
        self._num_read = 0  # bytes of _plain that were read
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the decompressed bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position by reading up to it, from the beginning of the file if it is behind. Return the position."""
        position = offset + (self._position if whence == io.SEEK_CUR else 0)
        assert whence != io.SEEK_END, "the end of a compressed file is unknown until it is reached"
        if position < self._position:
            self._restart()
        skipped = bytearray(1 << 20)
        while self._position < position and self.readinto(memoryview(skipped)[: position - self._position]):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with decompressed bytes and return their number; 0 at the end of the file."""
        while self._num_read == len(self._plain):
            self._compressed = self._compressed or self._file.read(_READ_AT_ONCE)
            if not self._compressed:
                if self._frame:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain, self._num_read = self._frame.decompress(self._compressed), 0
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain) - self._num_read)
        buffer[:count] = memoryview(self._plain)[self._num_read : self._num_read + count]
        self._num_read += count
        self._position += count
        return count
