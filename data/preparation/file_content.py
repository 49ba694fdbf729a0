"""The first bytes of a file, compared with the format that it is read in: another kind of file is refused, not read as text."""

import json
import re
import shlex
from pathlib import Path
from typing import BinaryIO

import orjson

from data.preparation.compressed import COMPRESSIONS, READ_ERRORS, decompressed, is_compressed
from data.preparation.fields import filter_for_list

_TABLES = {"parquet": rb"PAR[1E][\x00-\x1f]", "arrow": rb"ARROW1\0\0|\xff\xff\xff\xff.{3}\0[\x04-\x20]\0\0\0"}
_ARCHIVES = {"zip": rb"PK(?:\x03\x04|\x05\x06)", "7z": rb"7z\xbc\xaf\x27\x1c", "rar": rb"Rar!\x1a\x07", "tar": rb".{257}ustar"}
_ENCODINGS = {"UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-16": rb"\xff\xfe|\xfe\xff"}
_KINDS = [  # (pattern of the first bytes, what they are)
    *((one.first_bytes, f"{one.name} data. Decompress it, or let its name end in {suffix}") for suffix, one in COMPRESSIONS.items()),
    (rb"\x04\x22\x4d\x18", "LZ4 data. Decompress it first"),
    (rb"\xff\x06\0\0sNaPpY", "Snappy data. Decompress it first"),
    *((pattern, f"of format {name}. Set --input_format {name}, or let its name end in .{name}") for name, pattern in _TABLES.items()),
    *((pattern, f"a {name} archive. Unpack it and give its files") for name, pattern in _ARCHIVES.items()),
    (rb"Obj\x01", "an Avro file, which is not supported"),
    (rb"SQLite format 3\0", "an SQLite database, which is not supported"),
    (rb"%PDF-\d\.\d", "a PDF document, which is not supported. Extract its text first"),
    (rb"MMIDIDX\0\0", "the index of a token file. Its name must end in .idx"),
    (rb"version https://git-lfs\.github\.com/spec/", "a pointer of Git LFS in place of the file. Run git lfs pull"),
    *((pattern, f"{name}, not UTF-8. Convert it (iconv -f {name} -t UTF-8 FILE > NEW_FILE)") for name, pattern in _ENCODINGS.items()),
]
_COMPRESSED_BYTES = {one.first_bytes: one.name for one in COMPRESSIONS.values()}
_ANY_KIND = re.compile(b"|".join(b"(?:%b)" % pattern for pattern, _ in _KINDS), re.DOTALL)  # one search where most files have none
_HEAD_BYTES = 1 << 13
_FEW_NULS = 15  # can stand in any text
_NUL_SHARE = 0.1  # of the first bytes: UTF-16 without a byte-order mark has more; text that was extracted from documents has less


class OtherContent(ValueError):
    """The content of a file is not of the format that it is read in. The message names what it is."""


def check_file(path: Path, format: str) -> None:
    """Raise OtherContent if the content of a file is not of this format, as far as its first bytes show."""
    with open(path, "rb") as file:
        open_checked(file, path, format)


def open_checked(file: BinaryIO, path: Path, format: str) -> BinaryIO:
    """Return the decompressed bytes of an open file, like `decompressed`. Raises OtherContent as check_file does."""
    head = file.read(_HEAD_BYTES)
    if is_compressed(path):
        _check_compression(path, head)
        head = _first_bytes(decompressed(file, path))
    _check_head(head, path, format)
    file.seek(0)
    return decompressed(file, path)


def _check_head(head: bytes, path: Path, format: str) -> None:
    """Raise OtherContent if the first decompressed bytes of a file are not of this format."""
    for pattern, kind in _KINDS if _ANY_KIND.match(head) else ():
        if pattern != _TABLES.get(format) and re.match(pattern, head, re.DOTALL):
            if is_compressed(path) and pattern in _COMPRESSED_BYTES:
                raise OtherContent(f"it is compressed twice: its content is {_COMPRESSED_BYTES[pattern]} data again. Decompress it once")
            raise OtherContent(f"it is read as {format}, but its content is {kind}")
    if format in _TABLES and _is_text(head):
        raise OtherContent(f"it is read as {format}, but its content is plain text")
    if format not in _TABLES and head.count(0) > max(_FEW_NULS, _NUL_SHARE * len(head)):
        raise OtherContent(f"it is read as {format}, but many of its first bytes are NUL, as in binary files and in UTF-16 text")
    if format == "jsonl" and (jq := _filter_for_json_document(head)):
        kind = {".[]": "the whole file is one JSON array", ".": "a JSON object takes several lines"}.get(
            jq, "the whole file is one JSON object"
        )
        raise OtherContent(f"{kind}; each line must be a JSON object. Convert it ({_conversion(path, jq)})")


def _first_bytes(stream: BinaryIO) -> bytes:
    """Return the first bytes of a stream; fewer if it is damaged, which is reported with its place when the file is read."""
    head = b""
    try:
        while piece := stream.read1(_HEAD_BYTES - len(head)):  # type: ignore[attr-defined]  # read() loses what is before the damage
            head += piece
    except (*READ_ERRORS, MemoryError):
        pass
    return head


def _check_compression(path: Path, head: bytes) -> None:
    """Raise OtherContent if the first bytes of a file, whose suffix is one of a compression, are another kind of data."""
    suffix = path.suffix.lower()
    if re.match(COMPRESSIONS[suffix].first_bytes, head, re.DOTALL):
        return
    for pattern, kind in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            raise OtherContent(f"its name ends in {suffix}, but its content is {kind}")
    if _is_text(head):
        raise OtherContent(f"its name ends in {suffix}, but its content is plain text. Remove {suffix} from its name")


def _is_text(head: bytes) -> bool:
    """Return True if bytes are printable ASCII with white space."""
    return bool(re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head[:100]))


def _conversion(path: Path, jq: str) -> str:
    """Return the shell command that writes a JSON document as JSON lines. `jq` is jq's filter for the records."""
    source, suffix = shlex.quote(str(path)), path.suffix.lower()
    plain_name = Path(path.stem if suffix in COMPRESSIONS else path.name)
    lines = shlex.quote(str(plain_name.with_suffix(".lines.jsonl" if plain_name.suffix == ".jsonl" else ".jsonl")))
    if suffix in COMPRESSIONS:
        return f"{COMPRESSIONS[suffix].command} {source} | jq -c '{jq}' > {lines}"
    return f"jq -c '{jq}' {source} > {lines}"


def _filter_for_json_document(head: bytes) -> str | None:
    """Return jq's filter for the records of a file that is one JSON document of several lines, or None for any other file.

    Its first line is the beginning of a JSON value, and its second line is no value; a broken line between JSON lines is followed by one.
    """
    lines = [line for line in head.split(b"\n") if line.strip()] or [b""]
    is_cut = len(lines) < 2 or (len(lines) == 2 and not head.endswith(b"\n"))
    if not _is_incomplete(lines[0]) or _is_object(lines[1] if len(lines) > 1 else b""):
        return None
    if lines[0].lstrip().startswith(b"["):
        return ".[]"
    if is_cut or not lines[0].lstrip().startswith(b"{"):
        return None
    has_paragraphs = re.search(rb'"paragraphs"\s*:', head) is not None
    return filter_for_list(".data[]", has_paragraphs) if has_paragraphs or re.search(rb'"data"\s*:\s*\[', head) else "."


def _is_incomplete(line: bytes) -> bool:
    """Return True if a line is the beginning of a JSON value and ends before the value does."""
    text = line.decode(errors="replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (RecursionError, ValueError):
        return False
    return False


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
