"""Compressed files: every stream is read to the last byte of the file, or the file is reported as damaged."""

import bz2
import gzip
import lzma
import resource
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from data.command_line import UserError
from data.preparation.compressed import DamagedFile, open_decompressed
from data.preparation.fields import Fields, Problem
from data.preparation.records import PartReader

COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
TOOLS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
ONE, TWO = (b"".join(b'{"text": "%s %d"}\n' % (name, number) for number in range(3)) for name in (b"one", b"two"))


def flip(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


VALID = {
    "two streams": (lambda one, two, none: one + two, ".gz .zst .xz .bz2"),
    "streams without content": (lambda one, two, none: none + one + none + none + two + none, ".gz .zst .xz .bz2"),
    "four zeros after each": (lambda one, two, none: one + bytes(4) + two + bytes(4), ".gz .xz .bz2"),
    "many zeros after each": (lambda one, two, none: one + bytes(40_000) + two + bytes(80_000), ".gz .xz .bz2"),
    "five zeros between": (lambda one, two, none: one + bytes(5) + two, ".gz .bz2"),
    "five zeros at the end": (lambda one, two, none: one + two + bytes(5), ".gz .bz2"),
}
"""Files of two streams, and for which suffixes they are valid; for the others they are damaged."""
DAMAGED = {
    "zeros before the first stream": lambda one, two: bytes(4) + one + two,
    "other bytes between": lambda one, two: one + b"garbage" + two,
    "other bytes at the end": lambda one, two: one + two + b"garbage",
    "other bytes after zeros": lambda one, two: one + two + bytes(8) + b"garbage",
    "one other byte at the end": lambda one, two: one + two + b"\x1f",
    "first byte of the second stream": lambda one, two: one + flip(two, 0),
    "third byte of the second stream": lambda one, two: one + flip(two, 2),
    "middle of the second stream": lambda one, two: one + two[: len(two) // 2] + bytes(9) + two[len(two) // 2 + 9 :],
    "end of the second stream": lambda one, two: one + flip(two, -2),
    "checksum of the second stream": lambda one, two: one + flip(two, -8),
    "cut off after a byte of the second stream": lambda one, two: one + two[:1],
    "cut off in the middle": lambda one, two: one + two[: len(two) // 2],
    "cut off before the last byte": lambda one, two: one + two[:-1],
    "empty file": lambda one, two: b"",
}


def read(path: Path) -> bytes | None:
    """Return the decompressed bytes, or None if the file is damaged."""
    try:
        with open_decompressed(path) as file:
            return file.read()
    except DamagedFile:
        return None


def read_by_tool(path: Path) -> bytes | None:
    """Return what the format's own tool writes, or None if it fails or warns."""
    if not shutil.which(TOOLS[path.suffix]):
        pytest.skip(f"{TOOLS[path.suffix]} is not installed")
    with open(path, "rb") as file:
        done = subprocess.run([TOOLS[path.suffix], "-dc"], stdin=file, capture_output=True)
    return None if done.returncode or done.stderr else done.stdout


@pytest.fixture(params=COMPRESS)
def path(request, tmp_path):
    return tmp_path / f"a.jsonl{request.param}"


def streams(suffix: str) -> tuple[bytes, bytes, bytes]:
    """Three streams with checksums: ONE, TWO and nothing."""
    compress = zstandard.ZstdCompressor(write_checksum=True).compress if suffix == ".zst" else COMPRESS[suffix]
    return compress(ONE), compress(TWO), compress(b"")


@pytest.mark.parametrize("name", VALID)
def test_padding_and_further_streams_lose_no_document(path, name):
    make, suffixes = VALID[name]
    path.write_bytes(make(*streams(path.suffix)))
    assert read(path) == (ONE + TWO if path.suffix in suffixes else None)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_follows_a_stream_is_never_taken_for_the_end(path, name):
    path.write_bytes(DAMAGED[name](*streams(path.suffix)[:2]))
    assert read(path) is None
    *texts, problem = (record for _, record in PartReader(Fields("text")).read(path))
    assert isinstance(problem, Problem) and problem.ends_file and "begins at byte" in problem.message
    assert texts == [(f"{word} {number}",) for word in ("one", "two") for number in range(3)][: len(texts)]


@pytest.mark.parametrize("name", [*VALID, *DAMAGED])
def test_file_that_its_own_tool_reads_is_read(path, name):
    one, two, none = streams(path.suffix)
    path.write_bytes(VALID[name][0](one, two, none) if name in VALID else DAMAGED[name](one, two))
    assert (found := read_by_tool(path)) is None or read(path) == found


def test_message_names_the_byte_where_the_damaged_stream_begins(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    one, two, _ = streams(".xz")
    path.write_bytes(one + bytes(8) + two[:-5])
    (_, problem) = [*PartReader(Fields("text")).read(path)][-1]
    assert f"the xz stream that begins at byte {len(one) + 8} is invalid before byte {path.stat().st_size}" in problem.message
    assert "the file ends inside it" in problem.message


def test_skippable_zstandard_frames_are_skipped(tmp_path):
    one, two, _ = streams(".zst")
    skippable = struct.pack("<II", 0x184D2A53, 5) + b"index"  # RFC 8878, section 3.1.2
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + one + skippable + skippable + two + skippable)
    assert read(path) == ONE + TWO
    assert read_by_tool(path) == ONE + TWO
    path.write_bytes(one + two + skippable[:-1])
    assert read(path) is None
    path.write_bytes(one + two + skippable[:-6])
    assert read(path) is None


def wide_window(window_log: int) -> bytes:
    """A Zstandard frame of ONE whose header declares a window of 2**window_log bytes (RFC 8878, section 3.1.1.1.2)."""
    compressor = zstandard.ZstdCompressor().compressobj()
    frame = bytearray(compressor.compress(ONE) + compressor.flush())
    frame[5] = (window_log - 10) << 3
    return bytes(frame)


@pytest.mark.parametrize("window_log", [28, 31])
def test_zstandard_window_of_long_mode_is_read(tmp_path, window_log):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(wide_window(window_log) + wide_window(window_log))
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    assert read(path) == ONE + ONE


def test_file_that_needs_more_memory_than_there_is_stops_the_work(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(wide_window(31))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages_in_use * resource.getpagesize() + (1 << 30), hard))
    try:
        with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read: there is not enough memory"):
            list(PartReader(Fields("text")).read(path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])  # zstandard has no limit: few bytes of such a file are read at a time
def test_repetitive_text_is_decompressed_in_small_pieces(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(8 << 20)))
    with open_decompressed(path) as file:
        pieces = list(iter(lambda: len(file.read1(1 << 30)), 0))
    assert sum(pieces) == 8 << 20 and max(pieces) <= 1 << 20
