"""Files that may be compressed, read as decompressed bytes from any position.

A compressed file is a sequence of streams: gzip calls them members (RFC 1952), Zstandard frames (RFC 8878). Python's gzip, bz2, lzma and
zstandard readers take bytes after a stream that they cannot parse for the end of the file. The reader here decodes the streams itself, so
that each file is read to its last byte, or is an error.
"""

import bz2
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

_READ_AT_ONCE = 1 << 14  # bytes of a compressed file: few, because repetitive text decompresses to a thousand times as much
_DECOMPRESSED_AT_ONCE = 1 << 20
_MAX_ZSTANDARD_WINDOW = 1 << 31  # the largest that zstd writes (--long=31)


class DamagedFile(Exception):
    """A compressed file is cut off, damaged, or followed by other bytes."""


READ_ERRORS = (OSError, DamagedFile)
"""Exceptions that the readers raise if a file cannot be read to its end."""


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file for its decompressed bytes. A compressed file seeks forward by reading, and backward by starting again."""
    return decompressed(open(path, "rb"), path)


def decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    """Return the decompressed bytes of an open file. The caller closes the file; its position shows how much was read."""
    if not is_compressed(path):
        return file
    return io.BufferedReader(_DecompressedFile(file, path.suffix.lower()), buffer_size=_DECOMPRESSED_AT_ONCE)


def is_compressed(path: Path) -> bool:
    """Return True if the file's suffix is one of a compression."""
    return path.suffix.lower() in COMPRESSED


class _StreamDecoder:
    """Base class of decoders of one stream, with the interface of bz2.BZ2Decompressor and lzma.LZMADecompressor."""

    _decoder: Any

    @property
    def eof(self) -> bool:
        """True at the end of the stream."""
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        """Data after the end of the stream."""
        return self._decoder.unused_data


class _GzipMember(_StreamDecoder):
    """A decoder of one gzip member."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header, checksum and size, which it compares

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return at most max_length decompressed bytes of this data and of the data that was not used before."""
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        """True if all data was used."""
        return not self._decoder.unconsumed_tail


class _ZstandardFrame(_StreamDecoder):
    """A decoder of one Zstandard frame."""

    needs_input = True

    def __init__(self) -> None:
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTANDARD_WINDOW).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return all decompressed bytes of this data: the library has no limit on their number."""
        try:
            return self._decoder.decompress(data)
        except zstandard.ZstdError as error:
            if "not enough memory" in str(error):
                raise MemoryError from error
            raise


class Compression(NamedTuple):
    """A format of compressed files."""

    name: str
    stream: str
    """Name of a stream in the format's specification."""
    decoder: Any
    """Class that decodes one stream."""
    padding: int
    """Zero bytes may follow a stream in multiples of this number; 0: none.

    The xz specification allows padding (section 2.2). gzip and bzip2 ignore zero bytes after the last stream.
    """
    first_bytes: bytes
    """Pattern of the first bytes of a file."""
    command: str
    """Command that decompresses a file to its output."""


COMPRESSIONS = {
    ".gz": Compression("gzip", "gzip member", _GzipMember, 1, rb"\x1f\x8b", "gzip -dc"),
    ".zst": Compression("Zstandard", "Zstandard frame", _ZstandardFrame, 0, rb"(?:\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)", "zstd -dc"),
    ".xz": Compression("xz", "xz stream", lzma.LZMADecompressor, 4, rb"\xfd7zXZ\0", "xz -dc"),
    ".bz2": Compression("bzip2", "bzip2 stream", bz2.BZ2Decompressor, 1, rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)", "bzip2 -dc"),
}
"""Compressions by the suffix of a file's name."""
COMPRESSED = tuple(COMPRESSIONS)


class _DecompressedFile(io.RawIOBase):
    """All streams of a compressed file as one file. Raise DamagedFile unless its last byte ends a stream or padding."""

    def __init__(self, file: BinaryIO, suffix: str) -> None:
        self._file = file
        compression = COMPRESSIONS[suffix]
        self._stream_name, self._new_decoder, self._padding = compression.stream, compression.decoder, compression.padding
        self._restart()

    def _restart(self) -> None:
        self._file.seek(0)
        self._decoder = self._new_decoder()
        self._at_end = False
        self._stream_start = 0  # position in the compressed bytes
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
            if self._decoder.eof and not self._at_end:
                self._open_next_stream()
            if self._at_end:
                return 0
            self._plain, self._num_read = self._decompress(), 0
        count = min(len(buffer), len(self._plain) - self._num_read)
        buffer[:count] = memoryview(self._plain)[self._num_read : self._num_read + count]
        self._num_read += count
        self._position += count
        return count

    def _open_next_stream(self) -> None:
        """Go past padding to the next stream, or to the end of the file."""
        num_zeros, rest = 0, self._decoder.unused_data
        while not self._compressed and (rest := rest or self._file.read(_READ_AT_ONCE)):
            self._compressed = rest.lstrip(b"\0") if self._padding else rest
            num_zeros += len(rest) - len(self._compressed)
            rest = b""
        self._stream_start = self._file.tell() - len(self._compressed)
        if num_zeros and num_zeros % self._padding:
            place = f"the {num_zeros:,} zero bytes before byte {self._stream_start:,}"
            raise DamagedFile(f"{place} are not padding of {self._stream_name}s, which is a multiple of {self._padding} bytes")
        self._at_end = not self._compressed
        self._decoder = self._new_decoder()

    def _decompress(self) -> bytes:
        """Return the next decompressed bytes of the stream, which may be none."""
        data = b""
        if self._decoder.needs_input:
            data, self._compressed = self._compressed or self._file.read(_READ_AT_ONCE), b""
        try:
            plain = self._decoder.decompress(data, _DECOMPRESSED_AT_ONCE)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
            raise self._damaged(str(error)) from error
        if not (plain or data or self._decoder.eof) and self._decoder.needs_input:
            raise self._damaged("the file ends inside it")
        return plain

    def _damaged(self, reason: str) -> DamagedFile:
        place = f"the {self._stream_name} that begins at byte {self._stream_start:,}"
        return DamagedFile(f"{place} is invalid before byte {self._file.tell():,}: {reason}")
