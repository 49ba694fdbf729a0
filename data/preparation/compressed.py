"""Files that may be compressed, read as the bytes they were, from any place on."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_READ_AT_ONCE = 1 << 14  # of a .zst: little, because repetitive text becomes a thousand times as much
CANNOT_BE_READ = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
"""What the readers raise where a file is cut off or damaged."""


def open_decompressed(path: Path) -> BinaryIO:
    """The bytes of a file. It can seek: forward by reading where it is compressed, backward by beginning again."""
    return decompressed(open(path, "rb"), path)


def decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    """The same of an open one, whose own place tells how much of it has been read; to be closed by whoever opened it."""
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _ZstandardFile.open}.get(path.suffix.lower())
    return opener(file) if opener else file


def is_compressed(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in COMPRESSED


class _ZstandardFile(io.RawIOBase):
    """All frames of a .zst; one that is cut off raises EOFError, where zstandard's own reader ends without a word."""

    @classmethod
    def open(cls, file: BinaryIO) -> BinaryIO:
        return io.BufferedReader(cls(file), buffer_size=1 << 20)

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._frame = None
        self._compressed = self._plain = b""
        self._given = 0  # of _plain
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + (self._place if whence == io.SEEK_CUR else 0)
        assert whence != io.SEEK_END, "the end is not known before it is reached"
        if place < self._place:
            self._begin()
        skipped = bytearray(1 << 20)
        while self._place < place and self.readinto(memoryview(skipped)[: place - self._place]):
            pass
        return self._place

    def readinto(self, buffer) -> int:
        while self._given == len(self._plain):
            self._compressed = self._compressed or self._file.read(_READ_AT_ONCE)
            if not self._compressed:
                if self._frame:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain, self._given = self._frame.decompress(self._compressed), 0
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain) - self._given)
        buffer[:count] = memoryview(self._plain)[self._given : self._given + count]
        self._given += count
        self._place += count
        return count
