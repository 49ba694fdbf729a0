"""Records of every format: a file cut anywhere gives the same records, and an invalid record is one problem."""

import bz2
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shlex
import tarfile
import unittest.mock
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.preparation.corpus import file_corpus
from data.preparation.fields import Fields, Problem, TokenRecord, read_json
from data.preparation.records import PartReader

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
QUICK = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 25}
TEXTS = ["one", "zwei\nZeilen", '"quoted", with\r\na line\'s end', "tab\tinside", "汉字 ▁ <|endoftext|>", "x" * 3000, "\u2028 \0 é", "last"]


def records(path, fields=None, cuts=()):
    """Return the records of a file, read in parts that are separated by the cuts."""
    reader = PartReader(fields or Fields("text"))
    ends = [*sorted(set(cuts)), None]
    return [found for start, end in zip([0, *ends[:-1]], ends, strict=True) for found in reader.read(path, start, end)]


def texts(path, fields=None, cuts=()):
    return [record[0] for _, record in records(path, fields, cuts) if isinstance(record, tuple)]


def reasons(path, fields=None):
    return [record.reason for _, record in records(path, fields) if isinstance(record, Problem)]


def json_lines(path):
    return "".join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in TEXTS).encode()


def comma_separated(path):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    return file.getvalue().encode()


def tab_separated(path):
    return "".join(["text\tlabel\n", *(f"{' '.join(text.split())}\t1\n" for text in TEXTS)]).encode()


def by_blank_lines(path):
    return "".join(text.replace("\r\n", "\n") + "\n\n \n" for text in TEXTS).encode()


def by_marker(path):
    return "<|end|>\n".join(text + "\n" for text in TEXTS).encode()


KINDS = {
    "a.jsonl": (json_lines, Fields("text")),
    "a.csv": (comma_separated, Fields("text")),
    "a.tsv": (tab_separated, Fields("text")),
    "blank.txt": (by_blank_lines, Fields("text", separator="blank")),
    "marker.txt": (by_marker, Fields("text", separator="<|end|>")),
}


@pytest.fixture(params=[(name, suffix) for name in KINDS for suffix in COMPRESS], ids="".join)
def file(request, tmp_path):
    """(path, fields, uncompressed bytes) of a file of each format and compression that is cut by bytes."""
    name, suffix = request.param
    write, fields = KINDS[name]
    content = write(name)
    (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](content))
    return tmp_path / f"{name}{suffix}", fields, len(content)


def test_each_format_gives_its_texts(file):
    path, fields, _ = file
    expected = {"a.tsv": [" ".join(text.split()) for text in TEXTS]}.get(path.name.partition(".tsv")[0] + ".tsv", TEXTS)
    found = texts(path, fields)
    assert [text.rstrip("\n").replace("\r\n", "\n") for text in found] == [text.replace("\r\n", "\n") for text in expected]


@given(data=st.data())
@settings(**QUICK)
def test_file_cut_anywhere_gives_the_same_records(file, data):
    path, fields, size = file
    cuts = data.draw(st.lists(st.integers(1, size + 50), max_size=6))
    assert records(path, fields, cuts) == records(path, fields)


def test_parts_can_be_read_in_any_order(file):
    path, fields, size = file
    reader = PartReader(fields)
    middle = size // 2
    later, earlier = (list(reader.read(path, *part)) for part in ((middle, None), (0, middle)))
    assert earlier + later == records(path, fields)


def test_end_of_file_is_reported(file):
    path, fields, size = file
    reader = PartReader(fields)
    list(reader.read(path, 0, 10))
    assert not reader.at_end
    list(reader.read(path, 10, size + 1))
    assert reader.at_end
    assert list(reader.read(path, size + 1, size + 2)) == [] and reader.at_end


@pytest.mark.parametrize("name, write", [("a.parquet", "parquet"), ("a.arrow", "stream"), ("b.arrow", "file")])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_tables_give_the_same_rows_whole_and_in_parts(tmp_path, name, write, suffix):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    buffer = io.BytesIO()
    if write == "parquet":
        pyarrow.parquet.write_table(table, buffer, row_group_size=3)
    else:
        with (pyarrow.ipc.new_stream if write == "stream" else pyarrow.ipc.new_file)(buffer, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=3):
                writer.write_batch(batch)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](buffer.getvalue()))
    assert records(path) == [(number, (text,)) for number, text in enumerate(TEXTS)]
    assert records(path, cuts=[1, 2]) == records(path)


def test_pair_is_two_texts_or_a_text_and_a_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"en": "one", "de": "eins", "label": 1}\n{"en": "two", "de": "zwei", "label": true}\n')
    assert [record for _, record in records(tmp_path / "a.jsonl", Fields("en", "de"))] == [("one", "eins"), ("two", "zwei")]
    labelled = [record for _, record in records(tmp_path / "a.jsonl", Fields("en", "label"))]
    assert labelled[0] == ("one", "1") and labelled[1].reason == "wrong type"


def test_columns_name_the_fields_of_files_without_a_header(tmp_path):
    for name, row in (("a.csv", "good,1\n"), ("a.tsv", "good\t1\n")):
        (tmp_path / name).write_text(row)
        assert records(tmp_path / name, Fields("text", "label", columns=("text", "label"))) == [(0, ("good", "1"))]


def test_given_format_overrides_the_suffix(tmp_path):
    (tmp_path / "part-0001").write_text('{"text": "one"}\n')
    assert texts(tmp_path / "part-0001", Fields("text", format="jsonl")) == ["one"]
    (tmp_path / "a.jsonl").write_text("{")
    assert texts(tmp_path / "a.jsonl", Fields("text", format="txt")) == ["{"]


def test_token_files_give_their_documents(write_shard):
    prefix = write_shard([[1, 2, 3], [4], [5, 6]])
    found = records(prefix.with_suffix(".idx"), cuts=[2])
    assert all(isinstance(record, TokenRecord) for _, record in found)
    assert [record.tokens.tolist() for _, record in found] == [[1, 2, 3], [4], [5, 6]]
    assert np.array_equal([place for place, _ in found], [0, 1, 2])


BAD_LINES = [
    (b'{"text": "cut', "broken JSON", "Unterminated string starting at, column 10"),
    (b'["text"]', "wrong type", "it is a list; a record must be an object"),
    (b'[{"text": "a"}]', "wrong type", "convert it (jq -c '.[]' FILE > NEW_FILE.jsonl)."),
    (b'{"data": [{"title": "a", "paragraphs": []}]}', "missing field", "convert it (jq -c '.data[].paragraphs[]' FILE > NEW_FILE.jsonl)."),
    (b'{"text": "a", "text": "b"}', "repeated field", 'it has the field "text" 2 times'),
    (b'{"text": "a", "te\\u0078t": "b"}', "repeated field", 'it has the field "text" 2 times'),
    (b'{"text": "a", "n": NaN, "t": {"text": "c"}, "text": "b"}', "repeated field", 'it has the field "text" 2 times'),
    (b'{"txt": "a"}', "missing field", 'no field "text". Did you mean "txt"?'),
    (b'{"text": 7}', "wrong type", '"text" is 7, a int; it must be a string'),
    (b'{"text": null}', "wrong type", '"text" is None, a NoneType; it must be a string'),
    (b'{"text": "\xff"}', "invalid UTF-8", "not UTF-8"),
    (b'{"text": "\\ud800"}', "invalid UTF-8", "cannot be written as UTF-8"),
    (b'{"text": " \\n"}', "empty document", '"text" is empty'),
    (b"[" * 100_000, "broken JSON", ""),
    (b'{"text": "a", "n": NaN, "m": ' + b"1" * 5000 + b"}", "broken JSON", "not JSON that Python can read"),
]


@pytest.mark.parametrize("line, reason, message", BAD_LINES, ids=[reason for _, reason, _ in BAD_LINES])
def test_invalid_line_is_one_problem(tmp_path, line, reason, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two", "score": NaN}\n')
    (_, first), (place, problem), (_, last) = records(path)
    assert (first, last) == (("one",), ("two",))
    assert (place, problem.reason, problem.raw) == (16, reason, line + b"\n")
    assert message in problem.message and not problem.ends_file


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.xz", "a.tsv.bz2", "a.txt.zst"])
def test_broken_record_of_a_compressed_file_names_the_check_for_damage(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix](b'{"text": "one"}\n{"\n\xff\n'))
    problems = [record for _, record in records(path, Fields("text", columns=("text",))) if isinstance(record, Problem)]
    tool = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}[path.suffix]
    assert problems and all(f". The file may be damaged: check it with {tool} -t {path}." in problem.message for problem in problems)
    path.write_bytes(COMPRESS[path.suffix](b'{"text": ""}\n' if ".jsonl" in name else b'""\n'))
    assert not any(
        "damaged" in record.message for _, record in records(path, Fields("text", columns=("text",))) if isinstance(record, Problem)
    )


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'text,n\none,1\ntwo,"1\nthree,3\nfour,4\n', ["one", "broken CSV", "three", "four"]),
        (b"text,n\none,1\ntwo\nthree,3\n", ["one", "wrong number of fields", "three"]),
        (b'text,n\n"o\xff",1\ntwo,2\n', ["invalid UTF-8", "two"]),
        (b'text,n\nsay "hi",1\n"a ""b"" c",2\n\n', ['say "hi"', 'a "b" c']),
        (b"txt,n\none,1\n", ["missing field"]),
        (b"text\xff,n\none,1\n", ["invalid UTF-8"]),
        (b"text,n\n,1\n", ["empty document"]),
        (b"text,n,text\none,1,zwei\ntwo,2,drei\n", ["repeated field"]),
        (b"text,,\none,1,2\n", ["one"]),
    ],
)
def test_invalid_csv_row_is_one_problem(tmp_path, content, expected):
    (tmp_path / "a.csv").write_bytes(content)
    found = [record.reason if isinstance(record, Problem) else record[0] for _, record in records(tmp_path / "a.csv")]
    assert found == expected


def test_invalid_table_value_is_one_problem(tmp_path):
    column = pyarrow.array([b"one", b"\xff", None, b"", b"two"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "two"]
    assert reasons(tmp_path / "a.parquet") == ["invalid UTF-8", "wrong type", "empty document"]
    (found,) = records(tmp_path / "a.parquet", Fields("txt"))
    assert found[1].reason == "missing field" and 'Did you mean "text"?' in found[1].message and found[1].ends_file


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_records_before_the_end_of_a_truncated_archive_are_read(tmp_path, suffix, share):
    lines = [json.dumps({"text": os.urandom(500).hex()}) for _ in range(1000)]
    whole = COMPRESS[suffix]("\n".join(lines).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    *good, (_, problem) = records(path)
    assert (problem.reason, problem.ends_file) == ("cut off or damaged", True)
    assert [record[0] for _, record in good] == [json.loads(line)["text"] for line in lines[: len(good)]]
    assert share == 0.5 or suffix == ".bz2" or len(good) > 700  # bzip2 decompresses 900 kB at a time or none
    if suffix == ".gz":
        readable = zlib.decompressobj(wbits=31).decompress(path.read_bytes())
        assert len(good) >= readable.count(b"\n") - 20  # Python's reader does not return the data after its last full buffer
    cuts = [100_000, 200_000, 300_000, 10**9]
    assert [record for _, record in records(path, cuts=cuts)] == [record for _, record in [*good, (0, problem)]], (
        "the problem is reported once"
    )


def test_last_record_before_damaged_bytes_is_read(tmp_path):
    one, other = (json.dumps({"text": text}).encode() + b"\n" for text in ("one", "other"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(one + other) + b"rubbish")
    *good, (_, problem) = records(tmp_path / "a.jsonl.gz")
    assert [record for _, record in good] == [("one",), ("other",)] and problem.reason == "cut off or damaged"


def test_damaged_row_group_is_one_problem(tmp_path):
    texts_of = [f"{number:04d} " + os.urandom(200).hex() for number in range(400)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts_of}), path, row_group_size=50, compression="zstd")
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    whole = bytearray(path.read_bytes())
    whole[start : start + 400] = b"x" * 400
    path.write_bytes(whole)
    found = records(path)
    assert [place for place, record in found if isinstance(record, tuple)] == [*range(150), *range(200, 400)]
    assert [(place, record.reason) for place, record in found if isinstance(record, Problem)] == [(150, "cut off or damaged")]
    assert records(path, cuts=[1, 3, 4, 6]) == found


def arrow_bytes(column, new=pyarrow.ipc.new_stream, rows_in_a_batch=3):
    buffer = io.BytesIO()
    table = pyarrow.table({"text": column})
    with new(buffer, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows_in_a_batch):
            writer.write_batch(batch)
    return buffer.getvalue()


def test_arrow_stream_must_end_with_its_marker_and_nothing_after(tmp_path):
    path = tmp_path / "a.arrow"
    whole = arrow_bytes(TEXTS)
    for content, message in ((whole[:-8], "without its end-of-stream marker"), (whole + whole, "other bytes follow")):
        path.write_bytes(content)
        *good, (_, problem) = records(path)
        assert [record[0] for _, record in good] == TEXTS and message in problem.message and problem.ends_file
        assert [record for _, record in records(path, cuts=[1, 2])] == [record for _, record in [*good, (0, problem)]]


def test_arrow_footer_that_does_not_list_a_batch_is_a_problem(tmp_path):
    path = tmp_path / "a.arrow"
    whole = arrow_bytes(TEXTS, pyarrow.ipc.new_file)
    footer = len(whole) - 10 - int.from_bytes(whole[-10:-6], "little")
    for place in range(footer, len(whole) - 10, 4):
        if whole[place : place + 4] == b"\3\0\0\0":  # the number of batches, among others
            path.write_bytes(whole[:place] + b"\2" + whole[place + 1 :])
            if len(texts(path)) == 6:
                break
    assert texts(path) == TEXTS[:6]
    ((_, problem),) = [found for found in records(path, cuts=[1]) if isinstance(found[1], Problem)]
    assert "its footer lists 2 record batches, but it has at least 3" in problem.message


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_table_files_that_were_joined_are_a_problem(tmp_path, name, suffix):
    def whole(column):
        if name == "a.arrow":
            return arrow_bytes(column, pyarrow.ipc.new_file)
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "PAR1PAR1": ["PAR1PAR1"] * len(column)}), buffer := io.BytesIO())
        return buffer.getvalue()

    path = tmp_path / (name + suffix)
    for column in (TEXTS, [f"{number}" for number in range(len(TEXTS))]):
        path.write_bytes(COMPRESS[suffix](whole(column)))
        assert texts(path) == column
    path.write_bytes(COMPRESS[suffix](whole(["a", "b"])) + COMPRESS[suffix](whole(["c", "d"])))
    ((_, problem),) = [found for found in records(path, cuts=[1]) if isinstance(found[1], Problem)]
    assert "it consists of several files that were joined" in problem.message and problem.ends_file


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_damaged_lengths_and_indices_in_arrow_are_one_problem(tmp_path, new):
    path = tmp_path / "a.arrow"
    offsets, content = pyarrow.py_buffer(np.array([0, 2**30, 3], "<i4")), pyarrow.py_buffer(b"abc")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, content])
    dictionary = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 10**6]), pyarrow.array(["a"]), safe=False)
    for column in (text, dictionary):
        path.write_bytes(arrow_bytes(column, new))
        assert reasons(path) == ["cut off or damaged"] and texts(path) == []


def test_missing_rows_of_a_parquet_page_are_a_problem(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c", "d", "e"] * 2}), path, 5, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    place = whole.index(b"\x2c\x15\x0a") + 2  # the header of the first data page: 5 values (Thrift's compact protocol)
    path.write_bytes(whole[:place] + b"\x06" + whole[place + 1 :])
    ((row, problem),) = [found for found in records(path) if isinstance(found[1], Problem)]
    assert row == 3 and "2 rows of row group 0 are missing" in problem.message
    assert texts(path) == [*"abc", *"abcde"]


@pytest.mark.parametrize("name, content", [("a.csv", b"id,textX0,abc\n"), ("a.tsv", b"id\ttextX0\tabc\n")])
def test_header_without_the_field_is_a_problem_even_without_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert reasons(tmp_path / name) == ["missing field"]


def test_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\none,1\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbftext\tn\none\t1\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    for name in ("a.csv", "a.jsonl", "a.tsv", "a.txt"):
        assert texts(tmp_path / name) == ["one"], name


def test_suffix_ignores_case_and_json_is_read_by_line(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert records(tmp_path / "empty.jsonl") == []
    for name in ("a.JSONL", "b.json", "c.Json.gz"):
        content = b'{"text": "one"}\n'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert texts(tmp_path / name) == ["one"]


def test_file_of_another_format_is_damaged(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"\x00\x01nothing of the kind")
        assert reasons(tmp_path / name) == ["cut off or damaged"]


@pytest.mark.parametrize("name", ["text", "a.b", "é", "😀", 'a"b', "a\\b"])
def test_field_that_is_escaped_in_another_way_is_the_same_field(name):
    units = name.encode("utf-16-be").hex()
    escaped = "".join(f"\\u{units[start : start + 4].upper()}" for start in range(0, len(units), 4))
    plain = json.dumps(name, ensure_ascii=False)[1:-1]
    for first, second in itertools.combinations_with_replacement([plain, escaped], 2):
        assert read_json(f'{{"{first}": "a", "n": 1, "{second}": "b"}}'.encode(), Fields(name)).reason == "repeated field"
        assert read_json(f'{{"{first}": "a", "x{second}": "b"}}'.encode(), Fields(name)) == ("a",)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.tsv", "a.tsv.gz"])
def test_file_is_opened_once_to_be_checked_and_read(tmp_path, name):
    content = b"text\tn\none\t1\n" if "tsv" in name else b"one"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with unittest.mock.patch("builtins.open", wraps=open) as opened:
        assert texts(tmp_path / name) == ["one"]
    assert opened.call_count == 1


def test_field_that_a_record_has_twice_is_refused_in_each_format(tmp_path):
    repeated = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["text", "other", "text"])
    pyarrow.parquet.write_table(repeated, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,other,text\na,b,c\n" * 20)
    (tmp_path / "a.tsv").write_text("text\tother\ttext\na\tb\tc\n" * 20)
    for name in ("a.parquet", "a.csv", "a.tsv"):
        for cuts in ([], [1, 60, 200]):
            ((_, problem),) = records(tmp_path / name, cuts=cuts)
            assert (problem.reason, problem.message) == ("repeated field", 'columns 1 and 3 have the same name, "text"')
        assert records(tmp_path / name, Fields("other")), "a column that is not read may have any name"
    nested = b'{"text": "a", "more": {"text": "b"}, "kind": "text"}\n'
    (tmp_path / "a.jsonl").write_bytes(nested + b'{"text": "a", "label": 1, "label": 0}\n')
    assert texts(tmp_path / "a.jsonl") == ["a", "a"]
    assert [record.message for _, record in records(tmp_path / "a.jsonl", Fields("text", "label")) if isinstance(record, Problem)] == [
        'it has no field "label". Its fields: text, more, kind.',
        'it has the field "label" 2 times',
    ]


def tar(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue() + content


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def table_bytes(write):
    buffer = io.BytesIO()
    write(pyarrow.table({"text": ["one"]}), buffer)
    return buffer.getvalue()


def arrow_file(new, table, buffer):
    with new(buffer, table.schema) as writer:
        writer.write_table(table)


LINE = b'{"text": "one"}\n'
OTHER_CONTENTS = [
    ("a.jsonl", gzip.compress(LINE), "gzip data. Decompress it, or let its name end in .gz"),
    ("a.txt", zstandard.compress(LINE), "Zstandard data. Decompress it, or let its name end in .zst"),
    ("a.csv", lzma.compress(LINE), "xz data. Decompress it, or let its name end in .xz"),
    ("a.tsv", bz2.compress(LINE), "bzip2 data. Decompress it, or let its name end in .bz2"),
    ("a.jsonl.gz", zstandard.compress(LINE), "Zstandard data. Decompress it, or let its name end in .zst"),
    ("a.jsonl.xz", gzip.compress(LINE), "gzip data. Decompress it, or let its name end in .gz"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(LINE)), "it is compressed twice: its content is gzip data again. Decompress it once"),
    ("a.txt.xz", lzma.compress(zstandard.compress(LINE)), "it is compressed twice: its content is Zstandard data again. Decompress it"),
    *((f"a.jsonl{suffix}", LINE, f"plain text. Remove {suffix} from its name") for suffix in COMPRESS if suffix),
    ("a.jsonl.gz", gzip.compress(tar("a.jsonl", LINE)), "a tar archive. Unpack it and give its files"),
    ("a.txt", zipped("a.txt", LINE), "a zip archive. Unpack it and give its files"),
    ("a.jsonl", table_bytes(pyarrow.parquet.write_table), "of format parquet. Set --input_format parquet, or let its name end in .parquet"),
    ("a.txt", table_bytes(functools.partial(arrow_file, pyarrow.ipc.new_file)), "of format arrow. Set --input_format arrow"),
    ("a.parquet", table_bytes(functools.partial(arrow_file, pyarrow.ipc.new_stream)), "of format arrow. Set --input_format arrow"),
    ("a.arrow", table_bytes(pyarrow.parquet.write_table), "of format parquet. Set --input_format parquet"),
    ("a.arrow", LINE, "it is read as arrow, but its content is plain text"),
    ("a.txt", b"%PDF-1.7\n", "a PDF document, which is not supported"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS in place of the file"),
    ("a.txt", "one".encode("utf-16"), "UTF-16, not UTF-8. Convert it (iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE)"),
    ("a.jsonl", LINE.decode().encode("utf-32"), "UTF-32, not UTF-8"),
    ("a.csv", ("text\n" + "one\n" * 9).encode("utf-16-le"), "many of its first bytes are NUL"),
]


@pytest.mark.parametrize("name, content, message", OTHER_CONTENTS, ids=[f"{name}: {kind}" for name, _, kind in OTHER_CONTENTS])
def test_content_of_another_format_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for cuts in ([], [3, 8, 15]):
        ((position, problem),) = records(path, cuts=cuts)
        assert (position, problem.reason, problem.ends_file) == (0, "other format", True)
        assert message in problem.message
    with pytest.raises(UserError, match=f"{name}: .*{re.escape(message)}"):
        file_corpus([str(path)], Fields("text")).check_contents()


@pytest.mark.parametrize("text", ["%PDF-1 is the beginning of a PDF document", "BZh9 is the beginning of a bzip2 file", "Obj"])
def test_text_that_names_a_format_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "value, jq",
    [
        ([{"text": "one"}, {"text": "two"}], ".[]"),
        ({"text": "one", "n": [1]}, "."),
        ({"data": [{"title": "", "paragraphs": []}]}, ".data[].paragraphs[]"),
    ],
)
def test_file_that_is_one_json_document_is_refused_with_its_conversion(tmp_path, value, jq, indent):
    path = tmp_path / "it's.json"
    path.write_text(json.dumps(value, indent=indent))
    if indent is None and jq == ".":
        assert texts(path) == ["one"]
        return
    ((_, problem),) = records(path)
    assert f"jq -c '{jq}' {shlex.quote(str(path)) if indent else 'FILE'}" in problem.message and "not JSON" not in problem.message
    compressed = tmp_path / "b.json.xz"
    compressed.write_bytes(lzma.compress(path.read_bytes()))
    ((_, problem),) = records(compressed)
    assert f"xz -dc {compressed} | jq -c '{jq}' > b.jsonl" in problem.message or not indent


@pytest.mark.parametrize("name, line", [("a.csv", "text;label"), ("a.csv", "text\tlabel"), ("a.tsv", "text,label")])
def test_wrong_separator_of_fields_is_named(tmp_path, name, line):
    (tmp_path / name).write_text(f"{line}\n{line}\n")
    ((_, problem),) = records(tmp_path / name)
    assert f'it has one column, "{line}". Fields are separated by commas in csv and by tabs in tsv' in problem.message
    (tmp_path / "b.csv").write_text("good,1\nbad,0\n")
    ((_, problem),) = records(tmp_path / "b.csv")
    assert problem.message.endswith("Its fields: good, 1. If the first line of the file is a record, name the columns with --columns.")


@pytest.mark.parametrize("name, header", [("a.csv", "text,n"), ("a.tsv", "text\tn")])
def test_header_is_not_read_as_a_record(tmp_path, name, header):
    row = header.replace("text", "one")
    (tmp_path / name).write_text(f"{header}\n{row}\n{header}\n{row}\n")
    assert [getattr(record, "reason", record) for _, record in records(tmp_path / name)] == [("one",), "repeated header", ("one",)]
    first, *_ = records(tmp_path / name, Fields("text", columns=("text", "n")))
    assert first[0] == 0 and "leave out --columns" in first[1].message


@pytest.mark.parametrize(
    "header, again, message",
    [
        ("text,n", "\ufefftext,n", "it repeats the names of the columns"),
        ("text", "\ufefftext", "it repeats the names of the columns"),
        ("n,text", "text,n", "it names the columns in another order"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_header_of_a_joined_file_is_not_a_record(tmp_path, name, header, again, message):
    content = f"\ufeff{header}\none,one\n{again}\n" if "," in header else f"{header}\none\n{again}\n"
    (tmp_path / name).write_text(content.replace(",", "\t") if name == "a.tsv" else content)
    (_, first), (_, problem) = records(tmp_path / name)
    assert first == ("one",) and problem.reason == "repeated header" and message in problem.message


@pytest.mark.parametrize("columns", [(), ("text", "n")])
def test_tsv_lines_that_end_in_cr_alone_are_a_problem(tmp_path, columns):
    (tmp_path / "a.tsv").write_bytes(b"text\tn\rone\t1\rtwo\t2\r")
    ((position, problem),) = records(tmp_path / "a.tsv", Fields("text", columns=columns), cuts=[5])
    assert position == 0 and "its lines end in CR without LF" in problem.message and problem.ends_file
    (tmp_path / "a.tsv").write_bytes(b"text\tn\r\none\t1\r\n")
    assert texts(tmp_path / "a.tsv") == ["one"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_empty_first_line_is_named_as_a_header_without_columns(tmp_path, name):
    (tmp_path / name).write_text("\ntext\none\n")
    ((_, problem),) = records(tmp_path / name)
    assert "its first line names no column" in problem.message and problem.ends_file
    (tmp_path / name).write_text("")
    assert records(tmp_path / name) == []


def test_broken_first_line_between_json_lines_is_one_problem(tmp_path):
    for first in (b'{"text": ', b"{", b'{"text": "cut', b'{"text": ["a",'):
        (tmp_path / "a.jsonl").write_bytes(first + b"\n" + LINE * 3)
        assert [getattr(record, "reason", record) for _, record in records(tmp_path / "a.jsonl")] == ["broken JSON", *[("one",)] * 3]
