"""Corpora: which files are read, in which order, and how they are cut into units."""

import lzma
import os
import re
import shlex

import datasets
import numpy as np
import pytest

from data.command_line import UserError
from data.preparation.corpus import FileCorpus, Span, dataset_corpus, embedded_corpus, file_corpus
from data.preparation.fields import Fields, Problem
from data.preparation.input_files import find_files
from data.preparation.records import PartReader
from data.preparation.standard_library import embedded_documents

TEXT = Fields("text")


def names(*inputs):
    return [file.name for file in find_files([str(path) for path in inputs])[0]]


@pytest.fixture(scope="module")
def embedded():
    return {document.source: document.text for document in embedded_documents()}


def test_embedded_corpus_is_several_megabytes_of_code_and_documentation(embedded):
    assert 6e6 < sum(map(len, embedded.values())) < 30e6
    assert "class JSONDecoder" in embedded["json/decoder.py"]
    assert embedded["pydoc_data/topics.py:assert"].startswith('The "assert" statement\n***')
    parts = {part for source in embedded for part in source.split("/")}
    assert not parts & {"test", "tests", "encodings", "site-packages", "__pycache__", "lib-dynload", "topics.py"}
    assert not [source for source in embedded if "_sysconfigdata" in source]


def test_embedded_corpus_does_not_depend_on_the_working_folder(embedded, tmp_path, monkeypatch):
    before = embedded_corpus()
    (tmp_path / "json").mkdir()
    monkeypatch.chdir(tmp_path)
    again = embedded_corpus()
    assert again.identity() == before.identity()
    assert [texts for _, _, texts in again.rows()] == [(text,) for text in embedded.values()]
    assert again.names == list(embedded)


def test_folder_is_read_recursively_and_in_order(tmp_path):
    for name in (
        "b.txt",
        "a/z.md",
        "a.txt",
        "a/y.py",
        "image.png",
        "a/.hidden.swp",
        "c.parquet",
        "d.csv.gz",
        "e.arrow",
        "f.tsv",
        "g.ndjson",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path) == ["a/y.py", "a/z.md", "a.txt", "b.txt", "c.parquet", "d.csv.gz", "e.arrow", "f.tsv", "g.ndjson"]
    others = find_files([str(tmp_path)])[1]
    expected = {"has no known suffix": [f"{tmp_path}/a/.hidden.swp", f"{tmp_path}/image.png"]}
    assert others == expected, "files that are not read are returned too"


def test_glob_names_are_relative_to_its_fixed_part(tmp_path):
    for name in ("x/1/a.txt", "x/2/a.txt", "y/1/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path / "x" / "**" / "*.txt") == ["1/a.txt", "2/a.txt"]
    assert names(tmp_path / "y/1/a.txt") == ["a.txt"]
    assert names(tmp_path / "x" / "*") == ["1/a.txt", "2/a.txt"], "a folder that a pattern matches is read"


@pytest.mark.parametrize("name", ["part-00000", "a.log", "x.warc.wet.gz", "a.jsonl.bak", "a.jsonl.lz4", "a.gz"])
def test_file_of_an_unknown_suffix_needs_input_format(tmp_path, name):
    (tmp_path / name).write_text('{"text": "one"}\n')
    for given, file in ((name, "this file"), (f"{name[:3]}*", f"{tmp_path}/{name}")):
        with pytest.raises(UserError, match=rf"the format of {file} is unknown\. Known suffixes: \.txt .* \.idx, .* with --input_format"):
            names(tmp_path / given)
    with pytest.raises(UserError, match=rf"no \.txt, .* in this folder, .* Not read: .*{name}\. --input_format reads files of any name"):
        names(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    files, skipped = find_files([str(tmp_path)])
    assert [file.name for file in files] == ["b.jsonl"] and skipped == {"has no known suffix": [f"{tmp_path}/{name}"]}
    assert [file.name for file in find_files([str(tmp_path / name)], any_name=True)[0]] == [name]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "A.TGZ", "a.zip", "a.7z", "a.jsonl.tar.zst"])
def test_archive_must_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name} must be unpacked first: archives are not read"):
        names(tmp_path / name)


def test_files_next_to_the_parts_of_spark_are_not_read(tmp_path):
    for name in ("part-00000", "_SUCCESS", "._SUCCESS.crc", ".part-00000.crc", "__init__.py", "._a.jsonl"):
        (tmp_path / name).write_text("")
    files, skipped = find_files([str(tmp_path)], any_name=True)
    assert [file.name for file in files] == ["__init__.py", "part-00000"]
    assert skipped == {
        "begins with ._ (written by macOS)": [f"{tmp_path}/._SUCCESS.crc", f"{tmp_path}/._a.jsonl"],
        "begins with . or _ and has no known suffix": [f"{tmp_path}/.part-00000.crc", f"{tmp_path}/_SUCCESS"],
    }


def test_links_to_folders_are_followed_and_no_file_is_read_twice(tmp_path):
    for name in ("in/a/x.txt", "elsewhere/b/y.txt", "elsewhere/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/link").symlink_to("../elsewhere")
    (tmp_path / "in/link again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/a/loop").symlink_to("..")
    (tmp_path / "elsewhere/b/to itself").symlink_to("../b")
    (tmp_path / "in/same.txt").symlink_to("a/x.txt")
    assert names(tmp_path / "in") == ["a/x.txt", "link/b/y.txt", "link/z.txt"]
    assert names(tmp_path / "in/link") == ["b/y.txt", "z.txt"]
    assert names(tmp_path / "in" / "**" / "*.txt") == ["a/x.txt", "link/b/y.txt", "link/z.txt"]
    assert names(tmp_path / "**" / "in" / "**") == ["in/a/x.txt", "in/link/b/y.txt", "in/link/z.txt"]


def test_broken_link_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("nowhere/b.txt")
    for given in ("", "b.txt", "*.txt"):
        with pytest.raises(UserError, match=r"b\.txt is a symbolic link to nowhere/b\.txt, which does not exist\. Restore that file or"):
            names(tmp_path / given)
    (tmp_path / "b.txt").rename(tmp_path / "folder")  # nothing shows that the link led to a file
    with pytest.raises(UserError, match=r"folder is a symbolic link to nowhere/b\.txt, which does not exist\."):
        names(tmp_path)
    (tmp_path / "folder").rename(tmp_path / ".#lock")  # as Emacs links to nothing while a file is open
    assert find_files([str(tmp_path)])[1] == {"has no known suffix": [f"{tmp_path}/.#lock"]}


def test_pipe_is_refused_with_standard_input_as_the_way(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for given in ("a.jsonl", "*.jsonl", ""):
        with pytest.raises(
            UserError, match=r"is a pipe, which can be read only once\. .* \| python data/prepare\.py --input - --input_format"
        ):
            names(tmp_path / given)
    with pytest.raises(UserError, match=r"^--input /dev/null is not a regular file\.$"):
        names("/dev/null")


def test_file_without_permission_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read every file
    with pytest.raises(UserError, match=r"a\.txt cannot be read: no permission\."):
        names(tmp_path)


def test_folder_of_save_to_disk_is_refused_with_its_pattern(tmp_path):
    saved = tmp_path / "it's"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(saved / "train")
    (saved / "train/cache-1.arrow").write_bytes(b"")
    expected = re.escape(f"was written by Dataset.save_to_disk. Use --input {shlex.quote(f'{saved}/train/data-*.arrow')}.")
    for given in ("train", "*", ""):
        with pytest.raises(UserError, match=expected):
            names(saved / given)
    with pytest.raises(UserError, match=f"^--dataset .*train {expected}$"):
        dataset_corpus(str(saved / "train"), "train", TEXT)
    assert names(saved / "train" / "data-*.arrow") == ["data-00000-of-00001.arrow"]
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    either = " or ".join(f"--input {shlex.quote(f'{saved}/{split}/data-*.arrow')}" for split in ("train", "test"))
    with pytest.raises(UserError, match=re.escape(f"was written by DatasetDict.save_to_disk and has several splits. Use {either}.")):
        names(saved)


@pytest.mark.parametrize("more_keys", ["dataset_info:\n  features: []\n", "language:\n- en\n", ""])
def test_dataset_card_is_not_read_as_text(tmp_path, more_keys):
    tmp_path = tmp_path / "save_to_disk"  # the name of a folder does not show its kind
    (tmp_path / "data").mkdir(parents=True)
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{more_keys}---\n# Card\n")
    options = f"--dataset {tmp_path} --dataset_split train or --input '{tmp_path}/**/*.parquet*' for all splits"
    with pytest.raises(UserError, match=re.escape(f"its README.md is not text to train on. Use {options}.")):
        names(tmp_path)
    assert dataset_corpus(str(tmp_path), "train", TEXT).names == ["save_to_disk:train"]
    assert names(tmp_path / "**" / "*.parquet*") == ["data/train-00000-of-00001.parquet"]
    (tmp_path / "README.md").write_text("---\ntitle: notes\n---\n# Notes\n")
    assert "README.md" in names(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (tmp_path / "data/train-00000-of-00001.parquet").rename(tmp_path / "notes.txt")
    assert "README.md" in names(tmp_path), "the card of a model, which has no tables"


def test_file_in_two_inputs_belongs_to_the_first(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (file,), _ = find_files([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])
    assert (file.name, file.input_name, file.size) == ("a.txt", str(tmp_path), 4)


def test_token_file_is_given_by_its_bin_or_idx(tmp_path, write_shard):
    write_shard([[1, 2]], name="tokens")
    assert names(tmp_path / "tokens.bin") == names(tmp_path / "tokens.idx") == names(tmp_path / "tokens.*") == ["tokens.idx"]


def test_input_without_files_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"--input .*: no \.txt, .* in this folder"):
        find_files([str(tmp_path)])
    with pytest.raises(UserError, match=r"--input .*\.txt: no such file"):
        find_files([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match=r"https://.*: no such file\. It is not downloaded"):
        find_files(["https://example.org/a.jsonl"])
    with pytest.raises(UserError, match=r'--input "" is empty'):
        find_files([""])  # an empty path would be the whole working folder


def test_small_files_share_a_unit_and_large_files_are_cut(tmp_path):
    sizes = {"1.jsonl": 30, "2.jsonl": 50, "3.jsonl": 250, "4.txt": 300, "5.jsonl.gz": 60, "6.jsonl": 10}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"\n" * size)
    units = list(file_corpus([str(tmp_path)], TEXT).units(100))
    assert [unit.spans for unit in units] == [
        (Span(0), Span(1)),
        (Span(2, 0, 100),),
        (Span(2, 100, 200),),
        (Span(2, 200),),
        (Span(3),),  # one document, which cannot be cut
        (Span(4, 0, 100),),
        (Span(5),),
    ]
    assert [unit.is_open_ended for unit in units] == [False] * 5 + [True, False]
    assert units[5].next_part().spans == (Span(4, 100, 200),) and units[5].next_part().name == "0000005-000001"
    assert [unit.index for unit in units] == list(range(7))
    assert [unit.size for unit in units] == [80, 83, 83, 83, 300, 60, 10]


@pytest.mark.parametrize("unit_bytes", [1, 300, 10**9])
def test_units_of_tables_and_token_files_cover_each_record_once(tmp_path, write_shard, unit_bytes):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) for n in range(50)]}), tmp_path / "a.parquet", row_group_size=7)
    write_shard([[n] for n in range(100)], name="tokens")
    corpus = file_corpus([str(tmp_path)], TEXT)
    reader = PartReader(TEXT)
    spans = [span for unit in corpus.units(unit_bytes) for span in unit.spans]
    found = [(span.file, place) for span in spans for place, _ in reader.read(corpus.files[span.file].path, span.start, span.end)]
    assert found == [(0, row) for row in range(50)] + [(1, document) for document in range(100)]
    assert len(spans) == {1: 8 + 100, 10**9: 2}.get(unit_bytes, len(spans)) and len(spans) >= 2


def test_sample_text_comes_from_files_across_the_corpus(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(str(number) * (10 if number == 1 else 100))
    corpus = file_corpus([str(tmp_path)], TEXT)
    taken = "".join(corpus.sample_text(100, lambda texts: True))
    assert [taken.count(str(number)) for number in range(4)] == [25, 10, 32, 33], "the rest of a short file's share goes to the later files"
    assert "0" not in "".join(corpus.sample_text(100, lambda texts: "0" not in texts[0]))


def test_local_dataset_is_streamed_without_network(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    corpus = dataset_corpus(str(tmp_path), "train", TEXT)
    first, bad, last = corpus.rows()
    assert (first, last) == ((0, 1, ("one",)), (0, 3, ("two",)))
    assert isinstance(bad[2], Problem) and bad[2].reason == "empty document"
    assert corpus.names == [f"{tmp_path.name}:train"]
    assert [len(rows) for _, rows in corpus.blocks(1)] == [1, 2]


def test_dataset_without_the_split_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="Bad split: test"):
        list(dataset_corpus(str(tmp_path), "test", TEXT).rows())


def test_dataset_folder_of_compressed_files_is_refused(tmp_path):
    (tmp_path / "train.jsonl.xz").write_bytes(lzma.compress(b'{"text": "one"}\n'))
    with pytest.raises(UserError, match=r"^--dataset .* contains compressed files, such as .*train\.jsonl\.xz\..* Give them with --input"):
        dataset_corpus(str(tmp_path), "train", TEXT)


def test_dataset_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl is a file\. Use --input "):
        dataset_corpus(str(tmp_path / "train.jsonl"), "train", TEXT)


def test_unreachable_dataset_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--dataset .*nowhere, split train, cannot be read: [^\n]*$"):
        list(dataset_corpus(str(tmp_path / "nowhere"), "train", TEXT).rows())


def test_ten_thousand_files_are_cut_into_units_quickly(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (file,), _ = find_files([str(tmp_path)])
    units = list(FileCorpus([file] * 10_000, TEXT).units(3000))
    assert len(units) == 10 and np.sum([len(unit.spans) for unit in units]) == 10_000
