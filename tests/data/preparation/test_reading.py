"""The property of reading: a file gives exactly its documents, or a problem that names the file; never fewer documents in silence.

Random documents are written in every format and compression, in several streams, with padding, and read in units as data/prepare.py
does. Then one byte is changed, or the file is cut off. If reading reports no problem, the allowed results are:

- Where a checksum covers every document (.gz, .bz2, .xz, .zst with a checksum): exactly the documents.
- Elsewhere no reader can know that a character was changed. Text must then give exactly what an independent reading of the changed bytes
  gives; and JSON Lines, .tsv, tables and token files as many documents as were written, because what joins two of them is no valid
  record. In .csv a changed quote, and in separated plain text a changed separator, can join two documents into one that is valid.
- The formats without a checksum are plain files, .zst and .xz that were written without one, Arrow, token files (.bin, .idx) and Parquet:
  its pages may have checksums, which are compared, but its footer has none.
- A file that was cut off between two streams, or plain text that was cut off anywhere, is a valid shorter file: what is left is read.

MEGABATCH_READING_EXAMPLES=10000 sets the number of examples (default 200).
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.preparation.compressed import COMPRESSED
from data.preparation.corpus import file_corpus
from data.preparation.fields import Fields, Problem
from data.preparation.records import PartReader
from data.shards import ShardWriter

EXAMPLES = int(os.environ.get("MEGABATCH_READING_EXAMPLES", "200"))

COMPRESSIONS: dict[str, tuple[str, Callable[[bytes], bytes], bool]] = {
    "none": ("", bytes, False),
    "gz": (".gz", gzip.compress, True),
    "bz2": (".bz2", bz2.compress, True),
    "xz": (".xz", lzma.compress, True),
    "xz without checksum": (".xz", lambda data: lzma.compress(data, check=lzma.CHECK_NONE), False),
    "zst": (".zst", lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data), True),
    "zst without checksum": (".zst", zstandard.compress, False),
}
"""Suffix, function that compresses a stream, and whether a checksum covers it."""
PADDING = {"": [b""], ".gz": [b"", bytes(1), bytes(512)], ".bz2": [b"", bytes(3)], ".xz": [b"", bytes(4), bytes(400)], ".zst": [b""]}


def json_lines(texts: list[str], draw) -> bytes:
    lines = [json.dumps({"id": number, "text": text}, ensure_ascii=draw(st.booleans())) for number, text in enumerate(texts)]
    return draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines).encode()


def from_json_lines(data: bytes) -> list[str]:
    return [json.loads(line.decode())["text"] for line in data.split(b"\n") if line.strip()]


def comma_separated(texts: list[str], draw) -> bytes:
    file = io.StringIO(newline="")
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    csv.writer(file, quoting=quoting).writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def from_comma_separated(data: bytes) -> list[str]:
    header, *rows = [row for row in csv.reader(io.StringIO(data.decode(), newline="\n"), strict=True) if "".join(row).strip()] or [[]]
    return [row[header.index("text")] for row in rows]


def tab_separated(texts: list[str], draw) -> bytes:
    return "".join(["id\ttext\n", *(f"{number}\t{text}\n" for number, text in enumerate(texts))]).encode()


def from_tab_separated(data: bytes) -> list[str]:
    first, *lines = [line.rstrip(b"\r") for line in data.split(b"\n") if line.strip()] or [b""]
    header = first.decode(errors="replace").split("\t")  # names of columns that are not read need not be UTF-8
    rows = [line.decode().split("\t") for line in lines]
    return [row[header.index("text")] for row in rows]


def by_lines(texts: list[str], draw) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def from_lines(data: bytes) -> list[str]:
    return [line.decode() for line in data.split(b"\n") if line.strip()]


def by_blank_lines(texts: list[str], draw) -> bytes:
    return "\n\n".join(texts).encode()


def from_blank_lines(data: bytes) -> list[str]:
    lines = [line if line.strip() else b"" for line in data.split(b"\n")]
    return [document.decode() for document in b"\n".join(lines).split(b"\n\n") if document.strip()]


def parquet(texts: list[str], draw) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        table(texts, draw, pyarrow.string(), pyarrow.large_string()),
        buffer,
        row_group_size=draw(st.integers(1, 5)),
        compression=draw(st.sampled_from(["none", "snappy", "zstd"])),
        use_dictionary=draw(st.booleans()),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])),
        write_page_checksum=draw(st.booleans()),
    )
    return buffer.getvalue()


def arrow(texts: list[str], draw) -> bytes:
    buffer = io.BytesIO()
    rows = table(
        texts, draw, pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())
    )
    options = pyarrow.ipc.IpcWriteOptions(compression=draw(st.sampled_from([None, "zstd", "lz4"])))
    new = draw(st.sampled_from([pyarrow.ipc.new_stream, pyarrow.ipc.new_file]))
    with new(buffer, rows.schema, options=options) as writer:
        for batch in rows.to_batches(max_chunksize=draw(st.integers(1, 5))):
            writer.write_batch(batch)
    return buffer.getvalue()


def table(texts: list[str], draw, *types: pyarrow.DataType) -> pyarrow.Table:
    column = pyarrow.array(texts, pyarrow.string()).cast(draw(st.sampled_from(types)))
    return pyarrow.table({"id": range(len(texts)), "text": column})


@dataclass(frozen=True)
class Format:
    name: str
    write: Callable
    read: Callable[[bytes], list[str]] | None
    """An independent reading of the bytes; None for tables."""
    excluded: str = ""
    """Characters that its texts cannot contain."""
    separator: str | None = None
    keeps_count: bool = True
    """No changed byte can join or divide documents so that all are valid."""


FORMATS = [
    Format("a.jsonl", json_lines, from_json_lines),
    Format("a.csv", comma_separated, from_comma_separated, keeps_count=False),
    Format("a.tsv", tab_separated, from_tab_separated, "\t\r\n"),
    Format("a.txt", lambda texts, draw: "".join(texts).encode(), lambda data: [data.decode()] if data.strip() else []),
    Format("lines.txt", by_lines, from_lines, "\n", "line", keeps_count=False),
    Format("blank.txt", by_blank_lines, from_blank_lines, "\n", "blank", keeps_count=False),
    Format("a.parquet", parquet, None),
    Format("a.arrow", arrow, None),
]
# NUL is excluded: a file with many of them is refused as binary.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from('a",\n\t\r {}\\é'), max_size=20)


@dataclass(frozen=True)
class Stream:
    start: int
    end: int
    plain: bytes


def decompress(content: bytes, suffix: str, streams: list[Stream]) -> bytes:
    """Decompress each stream alone, by the library's function for that."""
    if suffix == ".zst":
        return b"".join(zstandard.ZstdDecompressor().decompressobj().decompress(content[stream.start : stream.end]) for stream in streams)
    return b"".join(lzma.decompress(content[stream.start : stream.end]) for stream in streams) if suffix == ".xz" else content


@st.composite
def files(draw) -> tuple[Format, list[str], str, bytes, bool, list[Stream]]:
    """Return (format, texts, name of the file, its content, whether a checksum covers it, its streams)."""
    format = draw(st.sampled_from(FORMATS))
    texts = draw(st.lists(TEXT, min_size=1, max_size=1 if format.name == "a.txt" else 8))
    texts = [
        f"{number}" + "".join(character for character in text if character not in format.excluded) for number, text in enumerate(texts)
    ]
    suffix, compress, has_checksum = COMPRESSIONS[draw(st.sampled_from(sorted(COMPRESSIONS)))]
    plain = format.write(texts, draw)
    cuts = sorted(draw(st.lists(st.integers(0, len(plain)), max_size=3))) if suffix else []
    content, streams = b"", []
    for start, end in zip([0, *cuts], [*cuts, len(plain)], strict=True):
        stream = compress(plain[start:end])
        streams.append(Stream(len(content), len(content) + len(stream), plain[start:end]))
        content += stream + draw(st.sampled_from(PADDING[suffix]))
    return format, texts, f"{format.name}{suffix}", content, has_checksum, streams


def read(path: Path, format: Format, unit_bytes: int) -> tuple[list[str], list[str]]:
    """Return the texts of a file and the messages about it, read in units as data/prepare.py does with --on_error skip."""
    texts, messages = [], []
    corpus = file_corpus([str(path)], Fields("text", separator=format.separator))
    reader = PartReader(corpus.fields)
    for unit in corpus.units(unit_bytes):
        while True:
            for span in unit.spans:
                for _, record in reader.read(path, span.start, span.end):
                    if isinstance(record, Problem):
                        messages.append(record.message)
                    elif record[0].strip():
                        texts.append(record[0].strip("\r\n"))
                    else:
                        messages.append("empty file")  # which is dropped and counted
            if not unit.is_open_ended or reader.at_end:
                break
            unit = unit.next_part()
    reader.close()
    return texts, messages


def documents_left(format: Format, texts: list[str], suffix: str, streams: list[Stream], place: int) -> list[str]:
    """Return the documents of a file that was cut off at a place and is valid nevertheless."""
    plain = b"".join(stream.plain for stream in streams)
    if suffix:
        assert place > 0 and not any(stream.start < place < stream.end for stream in streams), "it is cut off inside a stream"
        left = b"".join(stream.plain for stream in streams if stream.end <= place)
    else:
        left = plain[:place]
    if format.read is None:
        assert left == plain, "the table is cut off"
        return texts
    return format.read(left)


@given(file=files(), unit_bytes=st.sampled_from([10, 60, 300, 1 << 20]), data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_file_gives_exactly_its_documents_or_a_problem(tmp_path, file, unit_bytes, data):
    format, texts, name, content, has_checksum, streams = file
    path = tmp_path / name
    suffix = path.suffix if path.suffix in COMPRESSED else ""
    texts = [text.strip("\r\n") for text in texts]
    path.write_bytes(content)
    assert read(path, format, unit_bytes) == (texts, [])

    place = data.draw(st.integers(0, len(content) - 1))
    is_cut = data.draw(st.booleans())
    changed = (
        content[:place] if is_cut else content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
    )
    path.write_bytes(changed)
    found, messages = read(path, format, unit_bytes)
    if messages:
        return
    if is_cut:
        assert found == [text.strip("\r\n") for text in documents_left(format, texts, suffix, streams, place)]
    elif has_checksum:
        assert found == texts
    else:
        if format.read is not None:
            assert found == [text.strip("\r\n") for text in format.read(decompress(changed, suffix, streams))]
        assert len(found) == len(texts) or not format.keeps_count


@given(documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6), data=st.data())
@settings(max_examples=max(20, EXAMPLES // 5), deadline=None, suppress_health_check=list(HealthCheck))
def test_token_file_gives_as_many_documents_or_is_refused(tmp_path, documents, data):
    prefix = tmp_path / "tokens"
    with ShardWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add(np.array(document, "<u2"))
    path = prefix.with_suffix(data.draw(st.sampled_from([".bin", ".idx"])))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    rest = bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :] if data.draw(st.booleans()) else b""
    path.write_bytes(content[:place] + rest)
    try:
        records = list(PartReader(Fields("text")).read(prefix.with_suffix(".idx")))
    except UserError as error:
        assert str(prefix) in str(error)
    else:
        assert len(records) == len(documents)
