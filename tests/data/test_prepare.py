"""The door to data: whole folders or none, the same bytes for any number of workers."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.command_line import UserError
from data.prepare import PrepareSettings, prepare
from data.shards import PreparedData
from data.tokenizer import load_tokenizer, train_sentencepiece

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([source.read_text() for source in sorted(Path(json.__file__).parent.glob("*.py"))], path, 600)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """400 documents of about 10,000 characters: several of the pieces that workers get."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"def f{number}():\n    return {number}\n" * 300}) for number in range(400)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "b.txt").write_text("one text ▁ <|endoftext|>")
    return folder


@pytest.fixture
def make(corpus, tokenizer, tmp_path):
    """Prepares the corpus; keywords change the settings."""

    def run(**changes):
        settings = {"input": (str(corpus),), "output": str(tmp_path / "prepared"), "tokenizer": str(tokenizer), "workers": 1}
        return prepare(PrepareSettings(**(settings | changes)), progress=lambda line: None)

    return run


def texts(prepared: PreparedData, split: str) -> list[str]:
    tokenizer, stream = load_tokenizer(prepared.tokenizer_path), prepared.splits[split]
    tokens = stream.read(0, len(stream))
    ends = np.flatnonzero(tokens == prepared.end_of_text)
    return [tokenizer.decode(document[:-1]) for document in np.split(tokens, ends + 1)[:-1]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_goes_in_comes_out(make, corpus):
    prepared = make(held_out=0.1, shard_tokens=100_000)
    lines = gzip.decompress((corpus / "a.jsonl.gz").read_bytes()).splitlines()
    expected = {json.loads(line)["text"] for line in lines} | {(corpus / "b.txt").read_text()}
    train, validation = texts(prepared, "train"), texts(prepared, "validation")
    assert set(train) | set(validation) == expected and len(train) + len(validation) == len(expected)
    assert 20 < len(validation) < 60
    assert len(prepared.splits["train"].shards) > 2
    for split, written in (("train", train), ("validation", validation)):
        assert prepared.splits[split].num_documents == len(written)
        assert prepared.splits[split].num_bytes == sum(len(text.encode()) for text in written)
    prepared.verify()


def test_any_number_of_workers_writes_the_same_bytes(make, tmp_path):
    folders = [make(workers=workers, output=str(tmp_path / str(workers)), shard_tokens=300_000).folder for workers in (1, 2, 3)]
    assert len(files(folders[0])) > 6
    assert files(folders[0]) == files(folders[1]) == files(folders[2])


def test_a_folder_that_is_there_is_kept_and_told_apart(make, corpus):
    said = []
    prepared = make()
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.rglob("*")}
    settings = PrepareSettings(input=(str(corpus),), output=str(prepared.folder), tokenizer=prepared.manifest["settings"]["tokenizer"])
    prepare(settings, said.append)
    assert said == [f"{prepared.folder} holds exactly this already: nothing to do."]
    with pytest.raises(UserError, match="from other text or with other settings"):
        make(held_out=0.5)
    with pytest.raises(UserError, match="from other text or with other settings"):
        prepare(dataclasses.replace(settings, input=(str(corpus / "b.txt"),)))
    assert {path: path.stat().st_mtime_ns for path in prepared.folder.rglob("*")} == before


def test_a_folder_of_something_else_is_left_alone(make, tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no prepared folder; nothing is overwritten"):
        make()
    assert list(files(tmp_path)) == ["prepared/thesis.tex"]


def test_a_bad_line_leaves_nothing_behind(make, corpus, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.jsonl").write_text('{"text": "good"}\n{"text": ')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 is not JSON"):
        make(input=(str(corpus), str(tmp_path / "in")))
    assert list(files(tmp_path)) == ["in/bad.jsonl"]


def test_the_tokenizer_is_learnt_where_none_is_given(make, tmp_path):
    prepared = make(tokenizer=None, input=(str(Path(json.__file__).parent / "*.py"),), vocab_size=700)
    assert prepared.vocab_size == 700
    assert sorted(texts(prepared, "train")) == sorted(path.read_text() for path in Path(json.__file__).parent.glob("*.py"))


def test_ids_past_two_bytes_are_stored_in_four(make, tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards._UINT16_VOCAB_SIZE", 500)
    prepared = make()
    assert prepared.splits["train"].shards[0].tokens.dtype == np.int32
    assert texts(prepared, "train")[0].startswith("def f0()")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"held_out": 0.999999}, "takes every one"),
        ({"held_out": 1.0}, "below 1"),
        ({"vocab_size": 8192}, "--vocab_size 8192 is for a tokenizer to learn"),
        ({"dataset": "name"}, "both given"),
        ({"tokenizer": None, "end_of_text": "</s>"}, "--end_of_text is for a given --tokenizer"),
        ({"shard_tokens": 0}, "--shard_tokens 0 must be at least 1"),
        ({"tokenizer": "nowhere.model"}, r"nowhere\.model: no such file"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make(**changes)
    assert files(tmp_path) == {}


def door(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "data/prepare.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_the_door_prepares_and_sums_up(corpus, tokenizer, tmp_path):
    done = door("--input", str(corpus / "b.txt"), str(corpus / "a.jsonl.gz"), "--tokenizer", str(tokenizer), "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bytes a token" in done.stdout and "written to prepared" in done.stdout
    assert PreparedData(tmp_path / "prepared").splits["train"].num_documents > 380


def test_the_door_says_a_mistake_in_one_sentence(tmp_path):
    done = door("--input", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "--input nowhere: no such file.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_a_network_ends_in_one_sentence(tmp_path):
    done = door("--dataset", "somebody/something:some_config", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert (
        done.stderr.startswith("--dataset somebody/something:some_config, split train, cannot be read: ") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "prepared").exists()


def test_an_output_that_may_not_be_written_is_named(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/prepared cannot be written: Not a directory"):
        make(output=str(tmp_path / "file/prepared"))
