"""Documents from every source: which, in what order, and what is refused by name."""

import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import pytest
import zstandard

from data.command_line import UserError
from data.corpus import dataset_corpus, drop_duplicates_and_empty, embedded_corpus, file_corpus, find_files, is_held_out

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def read(*inputs, text_field="text"):
    documents = file_corpus([str(path) for path in inputs], text_field).documents()
    return [(document.source, document.text) for document in documents]


@pytest.fixture(scope="module")
def embedded():
    return embedded_corpus()


def test_the_embedded_corpus_is_some_megabytes_of_source_and_documentation(embedded):
    documents = {document.source: document.text for document in embedded.documents()}
    assert 6e6 < sum(map(len, documents.values())) < 30e6
    assert "class JSONDecoder" in documents["json/decoder.py"]
    assert documents["pydoc_data/topics.py:assert"].startswith('The "assert" statement\n***')
    parts = {part for source in documents for part in source.split("/")}
    assert not parts & {"test", "tests", "encodings", "site-packages", "__pycache__", "lib-dynload", "topics.py"}
    assert not [source for source in documents if "_sysconfigdata" in source]


def test_the_embedded_corpus_is_the_same_in_any_folder(embedded, tmp_path, monkeypatch):
    (tmp_path / "json").mkdir()
    monkeypatch.chdir(tmp_path)
    again = embedded_corpus()
    assert list(again.documents()) == list(embedded.documents())
    assert again.identity == embedded.identity


def test_about_the_fraction_is_held_out_whatever_else_is_there():
    sources = [f"folder/{number}.txt" for number in range(10_000)]
    held = {source for source in sources if is_held_out(source, 0.02)}
    assert 150 < len(held) < 250  # 3.5 standard deviations either way
    assert held < {source for source in sources if is_held_out(source, 0.05)}
    assert not any(is_held_out(source, 0) for source in sources)


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a.txt", "a/y.py", "image.png", "a/.hidden.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == [(name, name) for name in ("a/y.py", "a/z.md", "a.txt", "b.txt")]


def test_a_glob_takes_what_it_names_and_sources_begin_behind_its_fixed_part(tmp_path):
    for name in ("x/1/a.log", "x/2/a.log", "y/1/a.log"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "x" / "**" / "*.log") == [("1/a.log", "x/1/a.log"), ("2/a.log", "x/2/a.log")]
    assert read(tmp_path / "y/1/a.log") == [("a.log", "y/1/a.log")]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert len(read(tmp_path, tmp_path / "*.txt", tmp_path / "a.txt")) == 1


def test_what_matches_nothing_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"--input .*: no \.txt, .* in this folder"):
        find_files([str(tmp_path)])
    with pytest.raises(UserError, match=r"--input .*\.txt: no such file"):
        find_files([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match="names no file"):
        find_files([""])  # a path of nothing would be the whole working folder


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_reads_the_same(tmp_path, suffix):
    text = "Zeile\r\n\u2028один ▁\0" * 1000
    lines = "".join(json.dumps({"text": text + str(number)}, ensure_ascii=number % 2 == 0) + "\n" for number in range(30))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines.encode()))
    (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    expected = [(f"a.jsonl{suffix}:{number + 1}", text + str(number)) for number in range(30)] + [(f"b.txt{suffix}", text)]
    assert read(tmp_path) == expected


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_of_several_compressed_pieces_is_read_whole(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
    assert read(path) == [(path.name, "one two")]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_compressed_file_that_is_cut_off_or_damaged_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](os.urandom(1000).hex().encode())
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"no such format"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name} cannot be read to its end"):
            read(path)


@pytest.mark.parametrize(
    "line, sentence",
    [
        (b'{"text": "cut', r"line 2 is not JSON: Unterminated string starting at, column 10"),
        (b'["text"]', r"line 2 holds a list; a line is an object"),
        (b'{"txt": "a"}', r'line 2 has no field "text"\. Did you mean "txt"\? Set with --text_field'),
        (b'{"text": 7}', r'line 2: "text" is 7, a int; it must be a string'),
        (b'{"text": null}', r'line 2: "text" is None, a NoneType; it must be a string'),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8"),
        (b'{"text": "\\ud800"}', r'line 2: "text" is not text that UTF-8 can hold'),
    ],
)
def test_a_bad_line_is_refused_with_its_file_its_number_and_the_reason(tmp_path, line, sentence):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, " + sentence):
        read(tmp_path / "a.jsonl")


def test_a_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: .*position 2"):
        read(tmp_path)


def test_another_field_can_be_the_text_and_blank_lines_are_none(tmp_path):
    (tmp_path / "a.ndjson").write_text('{"text": 1, "body": "one"}\n\n \n{"body": "two"}')
    assert read(tmp_path, text_field="body") == [("a.ndjson:1", "one"), ("a.ndjson:4", "two")]


def test_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path):
    for name, text in {"a": "one", "b": " \n", "c": "two", "d": "one", "e": "", "f": "one "}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    dropped = Counter()
    kept = drop_duplicates_and_empty(file_corpus([str(tmp_path)], "text").documents(), dropped)
    assert [document.text for document in kept] == ["one", "two", "one "]
    assert dropped == {"empty": 2, "duplicate": 1}


def test_a_datasets_folder_is_streamed_without_a_network(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    documents = list(dataset_corpus(str(tmp_path), "train", "text").documents())
    assert [document.text for document in documents] == ["one", "two"]
    assert documents[1].source == f"{tmp_path.name}:train:2"


@pytest.mark.parametrize("split, field, sentence", [("test", "text", "Bad split: test"), ("train", "txt", 'row 1 has no field "txt"')])
def test_a_dataset_without_that_split_or_field_is_refused(tmp_path, split, field, sentence):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=sentence):
        list(dataset_corpus(str(tmp_path), split, field).documents())


def test_a_dataset_that_cannot_be_reached_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"^--dataset .*nowhere, split train, cannot be read: [^\n]*$"):
        list(dataset_corpus(str(tmp_path / "nowhere"), "train", "text").documents())
