"""data/prepare.py: complete folders or none, and the same bytes for any number of workers and nodes."""

import base64
import dataclasses
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.fields import Fields
from data.preparation.filters import FilterSettings
from data.preparation.input_files import find_files
from data.preparation.records import PartReader
from data.preparation.settings import PrepareSettings
from data.shards import PreparedData, Shard
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from tests.data.tokenization.test_huggingface_files import sentencepiece_file
from tests.data.tokenization.vocabularies import HOPELESS, exhausting_byte_level
from tests.ranks import REPOSITORY

CORPORA = REPOSITORY.parent / "shared" / "corpora"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([source.read_text() for source in sorted(Path(json.__file__).parent.glob("*.py"))], path, 600)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """400 documents of about 2,000 characters in a plain and a compressed file, and some small ones; one document is there twice."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"def f{number}():\n    return {number}\n" * 70}) for number in range(400)]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:200]).encode()))
    (folder / "c.jsonl").write_text("\n".join(lines[200:]))
    (folder / "b.txt").write_text("one text ▁ <|endoftext|>")
    (folder / "d.txt").write_text(json.loads(lines[7])["text"])
    (folder / "e.py").write_text("")
    return folder


@pytest.fixture
def make(corpus, tokenizer, tmp_path):
    """A function that prepares the corpus in about twenty units; keywords change the settings."""

    def run(log=lambda line: None, **changes):
        settings = {"input": (str(corpus),), "output": str(tmp_path / "prepared"), "tokenizer": str(tokenizer), "workers": 1}
        return prepare(PrepareSettings(**(settings | {"unit_megabytes": 0.05} | changes)), log=log)

    return run


def texts(prepared: PreparedData, split: str) -> list[str]:
    tokenizer, stream = load_tokenizer(prepared.tokenizer_path), prepared.splits[split]
    tokens = stream.read(0, len(stream)) if len(stream) else np.zeros(0)
    ends = np.flatnonzero(tokens == prepared.end_of_text)
    return [tokenizer.decode(document[:-1]) for document in np.split(tokens, ends + 1)[:-1]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_prepared_text_is_the_input_text(make, corpus):
    prepared = make(held_out=0.1, shard_tokens=30_000)
    lines = [*gzip.decompress((corpus / "a.jsonl.gz").read_bytes()).splitlines(), *(corpus / "c.jsonl").read_bytes().splitlines()]
    expected = {json.loads(line)["text"] for line in lines} | {(corpus / "b.txt").read_text()}
    train, validation = texts(prepared, "train"), texts(prepared, "validation")
    assert set(train) | set(validation) == expected and len(train) + len(validation) == len(expected)
    assert 20 < len(validation) < 60
    assert len(prepared.splits["train"].shards) > 2
    for split, written in (("train", train), ("validation", validation)):
        assert prepared.splits[split].num_documents == len(written)
        assert prepared.splits[split].num_bytes == sum(len(text.encode()) for text in written)
    assert prepared.manifest["dropped"] == {"duplicate": 1, "empty file": 1}
    assert prepared.manifest["documents_read"] == len(expected) + 2
    (given,) = prepared.manifest["inputs"]
    assert (given["files"], given["documents"], given["dropped"]) == (5, len(expected), 2)
    prepared.verify()


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_output_does_not_depend_on_number_of_workers(make, tmp_path, workers):
    alone, together = (make(workers=count, output=str(tmp_path / str(count)), shard_tokens=30_000).folder for count in (1, workers))
    assert len(files(alone)) > 20
    assert files(alone) == files(together)


@pytest.mark.parametrize("nodes", [2, 3])
def test_output_does_not_depend_on_number_and_order_of_nodes(make, tmp_path, nodes):
    alone = make(output=str(tmp_path / "alone"), shard_tokens=30_000).folder
    logged = []
    for rank in random.Random(nodes).sample(range(nodes), nodes):
        made = make(logged.append, rank=rank, world_size=nodes, shard_tokens=30_000)
    assert sum("The rank that finishes last writes the shards" in line for line in logged) == nodes - 1
    assert files(made.folder) == files(alone)
    assert not (tmp_path / "prepared.partial").exists()


def test_output_does_not_depend_on_unit_size(make, tmp_path):
    one, other = (make(unit_megabytes=size, output=str(tmp_path / str(size))).folder for size in (0.01, 64))
    assert files(one) == files(other)


def test_rank_and_world_size_come_from_srun(make, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert make() is None
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert make().splits["train"].num_documents > 300


def test_recorded_places_lead_to_the_documents(make, corpus):
    prepared = make(held_out=0.1, shard_tokens=30_000)
    paths = {file.name: file.path for file in find_files([str(corpus)])[0]}
    reader = PartReader(Fields("text"))
    for split in ("train", "validation"):
        for document, text in enumerate(texts(prepared, split)):
            name, _, place = prepared.place_of(split, document).partition(", byte ")
            position, record = next(reader.read(paths[name], int(place.replace(",", "") or 0)))
            assert record == (text,) and position == int(place.replace(",", "") or 0)


def test_existing_folder_is_kept_and_differences_are_named(make, corpus):
    logged = []
    prepared = make()
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.rglob("*")}
    make(logged.append, workers=2, unit_megabytes=1)
    assert logged == [f"{prepared.folder} already contains the result of these settings: nothing to do."]
    with pytest.raises(UserError, match=r"from other text or with other settings: --held_out was 0\.02 and is now 0\.5"):
        make(held_out=0.5)
    with pytest.raises(UserError, match=r"--input was .* and is now .*; the input files changed \(names, sizes or times\)"):
        make(input=(str(corpus / "b.txt"),))
    assert {path: path.stat().st_mtime_ns for path in prepared.folder.rglob("*")} == before
    manifest = prepared.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match=r"it was written by another version of this project \(format 1; this version writes 2\)"):
        make()


def test_folders_with_other_content_are_not_touched(make, tmp_path):
    for name in ("prepared", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a prepared data folder; it is not overwritten"):
        make()
    with pytest.raises(UserError, match=r"other\.partial is needed for unfinished work, but it exists and contains something else"):
        make(output=str(tmp_path / "other"))
    assert list(files(tmp_path)) == ["other.partial/thesis.tex", "prepared/thesis.tex"]


BAD = b'{"text": "good"}\n{"text": \n{"txt": "x"}\n{"text": "fine"}\n{"text": "\xff"}\n'


@pytest.fixture
def invalid_input(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.jsonl").write_bytes(BAD)
    return str(tmp_path / "in")


def test_invalid_line_stops_and_on_error_skip_resumes(make, corpus, invalid_input, tmp_path):
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: it is not JSON: .* --on_error skip or quarantine leaves out such records\."):
        make(input=(str(corpus), invalid_input))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared.partial/units").glob("*.json")}
    assert len(done) > 5
    prepared = make(input=(str(corpus), invalid_input), on_error="skip")
    assert prepared.manifest["dropped"]["broken JSON"] == prepared.manifest["dropped"]["missing field"] == 1
    assert {"good", "fine"} <= {text for split in ("train", "validation") for text in texts(prepared, split)}
    again = make(input=(str(corpus), invalid_input), on_error="skip", output=str(tmp_path / "again"))
    assert files(prepared.folder) == files(again.folder)


def test_finished_units_are_not_processed_again(make, corpus, invalid_input, tmp_path, monkeypatch):
    with pytest.raises(UserError):
        make(input=(str(corpus), invalid_input))
    before = {path.name for path in (tmp_path / "prepared.partial/units").glob("*.json")}
    done = []
    from data.preparation.work_units import UnitWorker

    do = UnitWorker.process
    monkeypatch.setattr(
        UnitWorker, "process", lambda worker, unit, rows=None: (done.append(f"{unit.name}.json"), do(worker, unit, rows))[1]
    )
    make(input=(str(corpus), invalid_input), on_error="skip")
    assert len(done) == 1 and not before & set(done)


def test_quarantine_keeps_invalid_records_with_their_places(make, corpus, invalid_input):
    prepared = make(input=(str(corpus), invalid_input), on_error="quarantine")
    kept = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["place"], line["reason"]) for line in kept] == [
        ("bad.jsonl, byte 17", "broken JSON"),
        ("bad.jsonl, byte 27", "missing field"),
        ("bad.jsonl, byte 57", "invalid UTF-8"),
    ]
    assert kept[0]["record"] == '{"text": \n' and base64.b64decode(kept[2]["record_base64"]) == b'{"text": "\xff"}\n'
    assert {"good", "fine"} <= {text for split in ("train", "validation") for text in texts(prepared, split)}


def test_tokenizer_that_cannot_be_exported_is_said_at_the_start(make, tmp_path):
    own, logged = sentencepiece_file(tmp_path / "own.model", remove_extra_whitespaces=True), []
    make(logged.append, tokenizer=str(own))
    (warning,) = [line for line in logged if line.startswith("Warning")]
    assert warning == (
        f"Warning: {own} cannot be written as a tokenizer.json: it removes spaces. "
        "A model that is trained with it cannot be exported, quantized or pruned. Everything else works."
    )
    assert logged.index(warning) < next(number for number, line in enumerate(logged) if "Tokenizing" in line)
    logged.clear()
    make(logged.append, output=str(tmp_path / "other"))
    assert make(logged.append, tokenizer=str(own), output=str(tmp_path / "shared"), rank=1, world_size=2) is None  # rank 0 warns
    assert not [line for line in logged if line.startswith("Warning")]


def test_document_that_cannot_be_tokenized_is_a_problem_with_its_place(make, invalid_input, tmp_path):
    exhausting_byte_level().save(str(tmp_path / "tokenizer.json"))
    texts_read = ["one", HOPELESS, "two", *(f"text {number}" for number in range(20))]
    Path(invalid_input, "bad.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_read))
    settings = {"input": (invalid_input,), "tokenizer": str(tmp_path / "tokenizer.json"), "held_out": 0.0}
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: it cannot be tokenized with .*tokenizer\.json \(.*\): .* --on_error skip"):
        make(**settings)
    prepared = make(**settings, on_error="quarantine")
    assert prepared.manifest["dropped"] == {"cannot be tokenized": 1} and prepared.manifest["documents_read"] == len(texts_read)
    assert texts(prepared, "train") == [text for text in texts_read if text != HOPELESS]
    [kept] = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert (kept["place"], kept["reason"], kept["record"]) == ("bad.jsonl, byte 16", "cannot be tokenized", HOPELESS)


def test_more_errors_than_max_errors_stop_the_work(make, invalid_input):
    assert make(input=(invalid_input,), on_error="skip", max_errors=3, held_out=0.0).splits["train"].num_documents == 2
    with pytest.raises(UserError, match=r"3 records are not valid text \(.*1 broken JSON.*\); --max_errors allows 2"):
        make(input=(invalid_input,), on_error="skip", max_errors=2, output=f"{invalid_input}/../other", held_out=0.0)


def test_changes_since_the_first_start_are_named(make, corpus, invalid_input, tokenizer, tmp_path):
    def stopped(**changes):
        with pytest.raises(UserError) as refused:
            make(**{"input": (str(corpus), invalid_input)} | changes)
        return str(refused.value)

    assert "line 2" in stopped()
    assert "was started with other text or settings: --shard_tokens was 268435456 and is now 1000" in stopped(shard_tokens=1000)
    assert "line 2" in stopped(workers=2, unit_megabytes=0.1), "settings that do not change the result may change"
    (tmp_path / "in/bad.jsonl").write_bytes(BAD + b'{"text": "more"}\n')
    assert "bad.jsonl has another size" in stopped()
    (tmp_path / "in/bad.jsonl").write_bytes(BAD)
    assert "bad.jsonl was modified" in stopped()
    (tmp_path / "in/bad.jsonl").rename(tmp_path / "in/worse.jsonl")
    assert "bad.jsonl was removed; worse.jsonl was added" in stopped()
    other = tmp_path / "tokenizer.model"
    other.write_bytes(tokenizer.read_bytes())
    with pytest.raises(UserError):
        make(tokenizer=str(other), output=str(tmp_path / "third"), input=(invalid_input,))
    train_sentencepiece(["other text " * 100 + "".join(map(chr, range(32, 500)))], other, 520)
    with pytest.raises(UserError, match="names another tokenizer"):
        make(tokenizer=str(other), output=str(tmp_path / "third"), input=(invalid_input,))


def test_second_process_with_the_same_rank_is_refused(make, corpus, invalid_input, tmp_path):
    import fcntl

    with pytest.raises(UserError):
        make(input=(str(corpus), invalid_input))
    with open(tmp_path / "prepared.partial/rank-0.lock", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"Another process is preparing .*prepared\.partial as rank 0"):
            make(input=(str(corpus), invalid_input))


def test_missing_pair_field_is_blamed_on_pair_field(make, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    for name, field in (("a.jsonl", "lable"), ("a.jsonl", "label"), ("a.parquet", "label")):
        with pytest.raises(UserError, match=f'"{field}".* Set the field with --pair_field'):
            make(input=(str(tmp_path / name),), pair_field=field, output=str(tmp_path / field / name))
    with pytest.raises(UserError, match=r'no field "txt".* Set the field with --text_field'):
        make(input=(str(tmp_path / "a.jsonl"),), text_field="txt", pair_field="text")


def test_file_of_another_format_is_refused_before_a_folder_is_made(make, tmp_path, invalid_input):
    (tmp_path / "in/worse.txt").write_bytes("one".encode("utf-16"))
    with pytest.raises(UserError, match=r"worse\.txt: it is read as txt, but its content is UTF-16, not UTF-8\. Convert it \(iconv"):
        make(input=(invalid_input,))
    assert list(files(tmp_path)) == ["in/bad.jsonl", "in/worse.txt"]
    assert make(input=(invalid_input,), on_error="skip").manifest["dropped"]["other format"] == 1


def test_error_explains_why_there_is_no_text_to_train_a_tokenizer(make, tmp_path):
    (tmp_path / "a.tsv").write_text("abstract\tone\ttwo\nmore\tone\ttwo\n")
    with pytest.raises(UserError, match=r'contains no text to train a tokenizer on\. .*a\.tsv: it has no field "text"'):
        make(tokenizer=None, input=(str(tmp_path / "a.tsv"),))


@pytest.mark.parametrize("more", [{}, {"tokenizer_kind": "unigram"}, {"pieces_within_words": True}, {"vocab_size": 4096}])
def test_text_too_short_for_any_tokenizer_needs_a_tokenizer(make, tmp_path, more):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"short document {number}"}) + "\n" for number in range(5)))
    with pytest.raises(UserError, match=r"^The text is too short .* for \d+ ids, .* at least 512\. Give a --tokenizer, or more text\.$"):
        make(tokenizer=None, input=(str(tmp_path / "a.jsonl"),), **{"vocab_size": 512} | more)
    assert list(files(tmp_path)) == ["a.jsonl"]


def test_same_tokenizer_under_another_path_is_accepted(make, tokenizer):
    logged = []
    make()
    make(logged.append, tokenizer=str(tokenizer.parent))
    assert "nothing to do" in logged[0]


def test_verify_finds_a_changed_tokenizer_configuration(make):
    prepared = make()
    prepared.verify()
    (prepared.folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json was changed"):
        prepared.verify()


def test_tokenizer_is_trained_if_none_is_given(make):
    prepared = make(tokenizer=None, input=(str(Path(json.__file__).parent / "*.py"),), vocab_size=700, special_tokens=("<|fim_prefix|>",))
    assert prepared.vocab_size == 700
    assert load_tokenizer(prepared.tokenizer_path).special_token_id("<|fim_prefix|>") < 700
    found = texts(prepared, "train") + texts(prepared, "validation")
    assert sorted(found) == sorted(path.read_text() for path in Path(json.__file__).parent.glob("*.py"))


def test_separators_cut_plain_text_into_documents(make, tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n")
    (tmp_path / "b.txt").write_text("one\n\nstill one\n<|end|>\ntwo\n")
    assert texts(make(input=(str(tmp_path / "a.txt"),), separator="blank", held_out=0.0), "train") == ["one\nstill one\n", "two\n"]
    found = make(input=(str(tmp_path / "b.txt"),), separator="<|end|>", held_out=0.0, output=str(tmp_path / "b"))
    assert texts(found, "train") == ["one\n\nstill one\n", "two\n"]
    found = make(input=(str(tmp_path / "a.txt"),), separator="line", held_out=0.0, output=str(tmp_path / "c"))
    assert texts(found, "train") == ["one\n", "still one\n", "two\n"]
    logged = []
    make(logged.append, input=(str(tmp_path / "b.txt"),), separator="===", output=str(tmp_path / "d"))
    assert (
        "--separator === does not occur in the input: each file is one document" in logged[-1] and "no document is held out" in logged[-1]
    )


def test_pair_becomes_two_sequences_of_one_document(make, tmp_path, tokenizer):
    (tmp_path / "a.tsv").write_text("good film\t1\nbad film\t0\n")
    prepared = make(
        input=(str(tmp_path / "a.tsv"),), columns=("sentence", "label"), text_field="sentence", pair_field="label", held_out=0.0
    )
    shard, model = Shard(prepared.folder / "train/00000"), load_tokenizer(tokenizer)
    assert (shard.num_documents, len(shard._lengths)) == (2, 4)
    expected = [[*model.encode(text), model.end_of_text] for text in ("good film", "1", "bad film", "0")]
    assert shard.tokens.tolist() == [token for sequence in expected for token in sequence]
    assert shard.document_start(1) == len(expected[0]) + len(expected[1])


def test_standard_input_is_stored_and_compared_when_given_again(make, corpus, tmp_path, monkeypatch):
    lines = (corpus / "c.jsonl").read_bytes()

    def give(content, **changes):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return make(input=("-",), input_format="jsonl", **changes)

    with pytest.raises(UserError, match=r"standard-input, line 201: it is not JSON"):
        give(lines + b"\nno json\n")
    with pytest.raises(UserError, match="Standard input is not the same as when"):
        give(lines)
    prepared = give(lines + b"\nno json\n", on_error="skip")
    assert prepared.place_of("train", 0).startswith("standard input, byte ")
    direct = make(input=(str(corpus / "c.jsonl"),), output=str(tmp_path / "direct"))
    assert texts(direct, "train") == texts(prepared, "train")


def test_other_standard_input_of_the_same_size_is_refused(make, tmp_path, monkeypatch):
    def give(text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        return make(input=("-",), input_format="txt", held_out=0.0)

    give(b"some text")
    give(b"some text")
    with pytest.raises(UserError, match=r"the input files changed \(names, sizes or times\)"):
        give(b"more text")
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_empty_input_is_refused_before_a_folder_is_made(make, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"^The input is empty: every file has 0 bytes\.$"):
        make(input=(str(tmp_path / "a.jsonl"),))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UserError, match=r"^--input - read nothing from standard input"):
        make(input=("-",), input_format="jsonl")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match=r"^--input - reads standard input, which is closed"):
        make(input=("-",), input_format="jsonl")
    assert list(files(tmp_path)) == ["a.jsonl"]
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="There is no document to train on: the input contains no record"):
        make(input=(str(tmp_path / "a.jsonl"),))


def test_more_units_than_open_files_allowed_are_merged(make, corpus):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        prepared = make(unit_megabytes=0.003, near_duplicates="drop")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert prepared.splits["train"].num_documents > 0


def test_input_that_changes_during_the_work_is_refused(make, tmp_path, monkeypatch):
    from data.preparation.work_units import UnitWorker

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "old"}\n' * 5000)
    do = UnitWorker.process

    def meanwhile(worker, unit, rows=None):
        os.utime(path, ns=(1, unit.index))
        return do(worker, unit, rows)

    monkeypatch.setattr(UnitWorker, "process", meanwhile)
    with pytest.raises(UserError, match=r"The input changed while it was read: a\.jsonl was modified"):
        make(input=(str(path),))
    assert not (tmp_path / "prepared").exists()


def test_padding_between_xz_streams_loses_no_document(make, tmp_path):
    path = tmp_path / "a.jsonl.xz"
    one, two = (lzma.compress(b"".join(b'{"text": "%s %d"}\n' % (word, n) for n in range(count))) for word, count in ((b"a", 2), (b"b", 3)))
    path.write_bytes(one + bytes(8) + two + bytes(4))
    whole = make(input=(str(path),), held_out=0.0, output=str(tmp_path / "whole"))
    assert texts(whole, "train") == ["a 0", "a 1", "b 0", "b 1", "b 2"]
    path.write_bytes(one + bytes(8) + two[:-1])
    with pytest.raises(
        UserError, match=rf"a\.jsonl\.xz: it cannot be read to its end: the xz stream that begins at byte {len(one) + 8} is"
    ):
        make(input=(str(path),))
    skipped = make(input=(str(path),), on_error="skip")
    assert skipped.manifest["dropped"] == {"cut off or damaged": 1}


@pytest.mark.parametrize("workers", [1, 4])
def test_truncated_file_is_one_error_for_any_number_of_workers(make, tmp_path, workers):
    whole = gzip.compress("".join(json.dumps({"text": os.urandom(100).hex()}) + "\n" for _ in range(2000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    prepared = make(input=(str(tmp_path / "cut.jsonl.gz"),), on_error="skip", max_errors=1, workers=workers)
    assert prepared.manifest["dropped"] == {"cut off or damaged": 1}


def test_files_with_equal_names_are_distinguished_and_output_is_not_read(make, tmp_path, invalid_input):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/bad.jsonl").write_bytes(BAD)
    prepared = make(input=(invalid_input, str(tmp_path / "more")), on_error="quarantine", output=f"{invalid_input}/prepared")
    places = {json.loads(line)["place"].partition(",")[0] for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()}
    assert places == {f"{invalid_input}/bad.jsonl", f"{tmp_path}/more/bad.jsonl"}
    logged = []
    make(logged.append, input=(invalid_input, str(tmp_path / "more")), on_error="quarantine", output=f"{invalid_input}/prepared")
    assert "nothing to do" in logged[0]


def test_rank_that_starts_after_the_end_reports_it(make, tmp_path, monkeypatch):
    from data.preparation.node import Node

    def finished_by_another(node, workers):
        monkeypatch.undo()
        (tmp_path / "prepared.partial").rename(tmp_path / "elsewhere")
        make()
        raise FileNotFoundError(2, "No such file or directory")

    logged = []
    monkeypatch.setattr(Node, "tokenize", finished_by_another)
    assert make(logged.append).folder == tmp_path / "prepared"
    assert logged[-1].endswith("prepared was finished by another rank.")


def test_empty_partial_folder_is_used(make, tmp_path):
    (tmp_path / "prepared.partial").mkdir()
    assert make().splits["train"].num_documents > 300


def test_names_and_keys_that_are_not_utf8_are_escaped(make, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"a\xff.jsonl")).write_text('{"text": "one"}\n{"text\\ud800": "x"}\n')
    prepared = make(input=(str(tmp_path / "in"),), on_error="quarantine", held_out=0.0)
    assert prepared.place_of("train", 0) == "a\\xff.jsonl, byte 0"
    assert json.loads((prepared.folder / "quarantine.jsonl").read_text())["reason"] == "missing field"


def test_foreign_token_files_become_shards_with_the_same_tokens(make, tmp_path, write_shard, tokenizer):
    model = load_tokenizer(tokenizer)
    written = ["import json\n", "def f(x):\n", "return x"]
    documents = [[*model.encode(text), model.end_of_text] for text in written]
    write_shard([documents[0], documents[1], documents[2][:-1]], name="megatron")
    prepared = make(input=(str(tmp_path / "megatron.bin"),), held_out=0.0)
    assert texts(prepared, "train") == written
    assert prepared.splits["train"].read(0, 3).tolist() == documents[0][:3]
    assert prepared.splits["train"].num_bytes == sum(map(len, written))
    stored = (tmp_path / "megatron.bin").read_bytes()
    (tmp_path / "megatron.bin").write_bytes(stored[2:4] + stored[2:])
    with pytest.raises(UserError, match=r"the input files changed \(names, sizes or times\)"):
        make(input=(str(tmp_path / "megatron.bin"),), held_out=0.0)
    write_shard([[2, 7]] * 20, name="other")
    with pytest.raises(UserError, match=r"other\.idx end with token 7, but the end of text of .* is token 1\. Give the tokenizer"):
        make(input=(str(tmp_path / "other.idx"),), output=str(tmp_path / "other"))
    write_shard([[1, 599], [3, 600]], name="foreign")
    with pytest.raises(UserError, match=r"foreign\.idx, document 2: it contains a token outside the 600 ids of the tokenizer"):
        make(input=(str(tmp_path / "foreign.idx"),), output=str(tmp_path / "foreign"))


def test_document_longer_than_a_shard_becomes_its_own_shard(make, tmp_path):
    (tmp_path / "long.txt").write_text("a long text. " * 5000)
    (tmp_path / "short.txt").write_text("a short text")
    prepared = make(input=(str(tmp_path / "*.txt"),), shard_tokens=100, held_out=0.0)
    assert [shard.num_documents for shard in prepared.splits["train"].shards] == [1, 1]
    assert texts(prepared, "train") == ["a long text. " * 5000, "a short text"]


def test_filters_drop_count_and_keep_examples(make, corpus):
    prepared = make(filters=FilterSettings(min_characters=100))
    assert prepared.manifest["dropped"]["min_characters"] == 1
    examples = json.loads((prepared.folder / "dropped.json").read_text())
    assert examples["min_characters"] == [{"place": "b.txt", "text": "one text ▁ <|endoftext|>"}]
    assert examples["duplicate"][0]["place"] == "d.txt" and examples["duplicate"][0]["text"].startswith("def f7():")
    page = (prepared.folder / "report.html").read_text()
    assert "min_characters" in page and "d.txt" in page


def near_copies(number: int) -> list[str]:
    dice = random.Random(number)
    words = [f"w{dice.randrange(2000)}" for _ in range(300)]
    copy = list(words)
    copy[dice.randrange(300)] = "changed"
    return [" ".join(words), " ".join(copy)]


@pytest.mark.parametrize("which", ["held_out", "drop"])
def test_no_held_out_document_is_near_duplicate_of_a_training_one(make, tmp_path, which):
    pairs = [near_copies(number) for number in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for pair in zip(*pairs, strict=True) for text in pair))
    settings = {"input": (str(tmp_path / "a.jsonl"),), "held_out": 0.3, "unit_megabytes": 0.02}
    of = {text: number for number, pair in enumerate(pairs) for text in pair}
    plain = make(**settings, output=str(tmp_path / "plain"))
    splits = {split: {of[text] for text in texts(plain, split)} for split in ("train", "validation")}
    assert len(splits["train"] & splits["validation"]) > 20, "by default, near-duplicates are in both splits"
    prepared = make(**settings, near_duplicates=which)
    splits = {split: [of[text] for text in texts(prepared, split)] for split in ("train", "validation")}
    assert not set(splits["train"]) & set(splits["validation"]) and splits["validation"]
    if which == "drop":
        assert sorted(splits["train"] + splits["validation"]) == list(range(100))
    assert prepared.manifest["dropped"]["near duplicate"] == 200 - len(splits["train"]) - len(splits["validation"])


def test_large_vocabularies_are_stored_as_int32(make, monkeypatch):
    monkeypatch.setattr("data.shards._UINT16_VOCAB_SIZE", 500)
    prepared = make()
    assert prepared.splits["train"].shards[0].tokens.dtype == np.int32
    assert texts(prepared, "train")[0].startswith("def f0()")


@pytest.mark.parametrize(
    "name, text_field", [("wikitext-2/valid.txt", "text"), ("csl-title/dev.tsv", "abstract"), ("multi30k-en-de/val.de", "text")]
)
def test_real_text_in_three_languages_is_preserved(make, tmp_path, name, text_field):
    path = CORPORA / name
    if not path.exists():
        pytest.skip(f"{path} is not here: real text in English, Chinese and German")
    columns = ("task", "abstract", "title") if path.suffix == ".tsv" else ()
    settings = {"input": (str(path),), "held_out": 0.0, "exact_duplicates": "keep", "columns": columns, "text_field": text_field}
    settings |= {"input_format": "txt"} if path.suffix == ".de" else {}
    prepared = make(**settings, separator=None if columns else "blank", tokenizer=None, vocab_size=6000, tokenizer_characters=300_000)
    if columns:
        expected = [line.split("\t")[1] for line in path.read_text().split("\n")[:-1]]
    else:
        lines, expected = path.read_text().splitlines(keepends=True), [""]
        for line in lines:
            expected[-1:] = [expected[-1], ""] if line.isspace() else [expected[-1] + line]
        expected = [text for text in expected if text]
    assert texts(prepared, "train") == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"held_out": 0.999999}, "holds out all of them"),
        ({"held_out": 1.0}, r"^held_out is 1\.0; it must be at least 0 and below 1\.$"),
        ({"vocab_size": 8192}, "^vocab_size 8192 applies only to a tokenizer that is trained here"),
        ({"special_tokens": ("<x>",)}, r"^special_tokens .* applies only to a tokenizer that is trained here"),
        ({"dataset": "name"}, "are both given"),
        ({"tokenizer": None, "end_of_text": "</s>"}, "^end_of_text </s> applies only to a given tokenizer"),
        ({"shard_tokens": 0}, r"^shard_tokens is 0; it must be above 0\.$"),
        ({"tokenizer": "nowhere.model"}, r"nowhere\.model: no such file"),
        ({"rank": 2, "world_size": 2}, r"^rank 2 must be below world_size 2\.$"),
        ({"world_size": 0}, r"^world_size is 0; it must be above 0\.$"),
        ({"output": "."}, r"^output \. is not the name of a folder"),
        ({"tokenizer": None, "vocab_size": 2**40}, "^vocab_size is 1099511627776; it must be at least 512 and below 2147483648"),
        ({"pair_field": "label"}, r"--pair_field label applies only to records with fields; .* has none"),
        ({"columns": ("a",)}, r"--columns applies only to \.csv and \.tsv files, and --input contains none"),
        ({"columns": ("text", "n", "text")}, r'^columns .* has "text" more than once\. Give each column to read a name of its own\.'),
        ({"separator": "###\n"}, 'must be "blank"'),
        ({"input": ("-",)}, "it needs input_format"),
        ({"input": ("-",), "input_format": "parquet"}, "^input_format parquet is not supported for standard input"),
        ({"input": ("-",), "input_format": "txt", "world_size": 2}, "only one node can read"),
        ({"pair_field": "text"}, "^pair_field text must be another field than text_field text"),
        ({"separator": ""}, 'must be "blank"'),
        ({"unit_megabytes": 0.0}, r"^unit_megabytes is 0\.0; it must be above 0\.$"),
        ({"near_duplicate_similarity": 0.0}, r"^near_duplicate_similarity is 0\.0; it must be at least 0\.06 and at most 1\.$"),
        (
            {"filters": FilterSettings(min_words=5, max_words=4)},
            "^filters.min_words 5 is above filters.max_words 4: every document",
        ),
        ({"filters": FilterSettings(min_words=-1)}, r"^filters\.min_words is -1; it must be at least 0\.$"),
        ({"held_out": -0.1, "workers": -1}, r"^held_out is -0\.1; .*\nworkers is -1; it must be at least 0\.$"),
    ],
)
def test_invalid_settings_are_refused(make, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
    assert not (tmp_path / "prepared").exists() and (changes.get("held_out") == 0.999999 or files(tmp_path) == {})


def run_script(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "data/prepare.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_script_prepares_and_prints_a_summary(corpus, tokenizer, tmp_path):
    done = run_script(
        "--input", str(corpus / "b.txt"), str(corpus / "a.jsonl.gz"), "--tokenizer", str(tokenizer), "--workers", "2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "bytes per token" in done.stdout and "written to prepared" in done.stdout
    assert PreparedData(tmp_path / "prepared").splits["train"].num_documents > 180


def test_script_reports_a_user_error_without_traceback(tmp_path):
    done = run_script("--input", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "--input nowhere: no such file.\n")
    assert list(tmp_path.iterdir()) == []


def test_dataset_without_network_is_a_user_error(tmp_path):
    done = run_script("--dataset", "somebody/something:some_config", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert (
        done.stderr.startswith("--dataset somebody/something:some_config, split train, cannot be read: ") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "prepared").exists() and not (tmp_path / "prepared.partial").exists()


def test_output_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--output .*file/prepared: .*file is a file, not a folder"):
        make(output=str(tmp_path / "file/prepared"))


def test_manifest_records_all_settings_that_change_the_result(make):
    recorded = make().manifest["settings"]
    left_out = {field.name for field in dataclasses.fields(PrepareSettings)} - set(recorded)
    assert left_out == {"output", "workers", "rank", "world_size", "unit_megabytes", "max_errors", "tokenizer", "end_of_text"}
