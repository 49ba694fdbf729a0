"""The shard format, byte by byte; each invalid file is refused with its own message."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.shards import PreparedData, Shard, ShardWriter, TokenStream, token_dtype

FOREIGN = Path(__file__).parents[3] / "shared/corpora/megatron-owt1000/meg-gpt2-openwebtext_text_document"
HEADER = "<9sQBQQ"


def pack_index(lengths, offsets, boundaries, code=8, magic=b"MMIDIDX\0\0", version=1) -> bytes:
    header = struct.pack(HEADER, magic, version, code, len(lengths), len(boundaries))
    arrays = struct.pack(f"<{len(lengths)}i", *lengths), struct.pack(f"<{len(offsets)}q", *offsets)
    return header + b"".join(arrays) + struct.pack(f"<{len(boundaries)}q", *boundaries)


def pack_pair(prefix: Path, stored: bytes, **index) -> Path:
    prefix.with_suffix(".bin").write_bytes(stored)
    prefix.with_suffix(".idx").write_bytes(pack_index(**index))
    return prefix


@pytest.mark.parametrize("dtype, letter, code", [("<u2", "H", 8), ("<i4", "i", 4)])
def test_written_shard_has_the_documented_bytes(write_shard, dtype, letter, code):
    prefix = write_shard([[1, 2, 3], [4], [5, 6]], dtype)
    size = struct.calcsize(letter)
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack(f"<6{letter}", 1, 2, 3, 4, 5, 6)
    assert prefix.with_suffix(".idx").read_bytes() == pack_index([3, 1, 2], [0, 3 * size, 4 * size], [0, 1, 2, 3], code)


def test_tokens_below_megatrons_bound_take_two_bytes():
    assert token_dtype(65_499).itemsize == 2
    assert token_dtype(65_500).itemsize == 4


@given(documents=st.lists(st.lists(st.integers(0, 65_535), max_size=20), min_size=1, max_size=20).filter(any))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_written_shard_is_read_back_unchanged(write_shard, documents):
    shard = Shard(write_shard(documents))
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    starts = [shard.document_start(number) for number in range(len(documents) + 1)]
    assert np.diff(starts).tolist() == [len(document) for document in documents]


def test_writers_hashes_are_those_of_the_files(tmp_path):
    with ShardWriter(tmp_path / "shard", np.dtype("<u2")) as writer:
        writer.add(np.array([1, 2], "<u2"))
    for kind, digest in writer.sha256.items():
        assert digest == hashlib.sha256((tmp_path / f"shard.{kind}").read_bytes()).hexdigest()


def test_failed_writer_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "shard", np.dtype("<u2")) as writer:
        writer.add(np.array([1, 2], "<u2"))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


GOOD = {"lengths": [2, 3], "offsets": [0, 4], "boundaries": [0, 1, 2]}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"magic": b"TNTIDX\0\0\0"}, "is not a Megatron index"),
        ({"version": 2}, "version 2"),
        ({"code": 9}, "dtype code 9"),
        ({"lengths": [], "offsets": [], "boundaries": [0]}, "no sequences"),
        ({"lengths": [6, -1]}, "negative length"),
        ({"lengths": [2, 4]}, r"10 bytes long; for the 6 tokens and dtype code 8 of its .idx it must have 12 \(uint16\) or 48 \(uint64\)"),
        ({"code": 4}, r"20 \(int32\)"),
        ({"code": 6, "lengths": [1, 0], "offsets": [0, 8]}, r"2 \(uint16\)"),
        ({"offsets": [0, 2]}, "offset of sequence 1"),
        ({"offsets": [4, 0]}, "offset of sequence 0"),
        ({"boundaries": [1, 1, 2]}, "from 0 to 2"),
        ({"boundaries": [0, 1, 1]}, "from 0 to 2"),
        ({"boundaries": [0, 2, 1, 2]}, "not in ascending order"),
    ],
)
def test_invalid_index_is_refused_with_its_own_message(tmp_path, change, sentence):
    prefix = pack_pair(tmp_path / "shard", bytes(10), **GOOD)
    Shard(prefix)
    with pytest.raises(UserError, match=sentence):
        Shard(pack_pair(tmp_path / "shard", bytes(10), **(GOOD | change)))


def test_truncated_file_is_refused_at_every_length(tmp_path):
    prefix = pack_pair(tmp_path / "shard", bytes(10), **GOOD)
    for kind in (".idx", ".bin"):
        whole = prefix.with_suffix(kind).read_bytes()
        for size in range(len(whole)):
            prefix.with_suffix(kind).write_bytes(whole[:size])
            with pytest.raises(UserError, match=f"shard{kind} is (empty|{size} bytes long)"):
                Shard(prefix)
        prefix.with_suffix(kind).write_bytes(whole)


@pytest.mark.parametrize("kind", [".bin", ".idx"])
def test_shard_that_is_truncated_while_it_is_read_is_named(write_shard, kind):
    """A memory map would end the process with SIGBUS."""
    prefix = write_shard([[1, 2, 3]] * 3000)
    stream = TokenStream([Shard(prefix)], 0)
    path = prefix.with_suffix(kind)
    os.truncate(path, 4)
    reads = {
        ".bin": [lambda: stream.read(0, 9000), lambda: stream.gather(np.array([8000]))],
        ".idx": [lambda: stream.document_start(2500), lambda: stream.document_lengths(0, 3000), lambda: stream.document_starts(8000, 9)],
    }
    for read in reads[kind]:
        with pytest.raises(UserError, match=rf"{path} was truncated while it was read: it is 4 bytes long; "):
            read()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"shard\.idx: No such file"):
        Shard(tmp_path / "shard")


@pytest.mark.parametrize("code, letter", [(1, "B"), (3, "h"), (4, "i"), (5, "q"), (6, "H"), (7, "I"), (8, "H"), (8, "Q")])
def test_bin_size_decides_between_the_types_of_a_dtype_code(tmp_path, code, letter):
    stored = struct.pack(f"<5{letter}", *range(1, 6))
    size = struct.calcsize(letter)
    prefix = pack_pair(tmp_path / "shard", stored, code=code, lengths=[2, 3], offsets=[0, 2 * size], boundaries=[0, 1, 2])
    assert Shard(prefix).tokens.tolist() == [1, 2, 3, 4, 5]


def test_documents_of_several_sequences_or_none_keep_their_starts(tmp_path):
    index = {"lengths": [2, 1, 2], "offsets": [0, 4, 6], "boundaries": [0, 2, 2, 3, 3]}
    shard = Shard(pack_pair(tmp_path / "shard", bytes(10), **index))
    assert [shard.document_start(number) for number in range(5)] == [0, 3, 3, 5, 5]
    assert shard.document_starts(0, 5).tolist() == [0, 3, 3]


@pytest.mark.skipif(not FOREIGN.with_suffix(".idx").exists(), reason=f"{FOREIGN} is not here: a pair that Megatron's own tools wrote")
def test_pairs_written_by_megatron_are_read():
    shard = Shard(FOREIGN)
    assert (shard.num_documents, len(shard.tokens)) == (1000, 1_361_845)
    ends = [shard.document_start(number + 1) - 1 for number in range(1000)]
    assert set(shard.tokens[ends].tolist()) == {4999}


SHARDS = st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=4)


@given(shards=SHARDS, data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_stream_equals_its_shards_joined(stream, shards, data):
    joined = stream(*shards)
    documents = [document for shard in shards for document in shard]
    tokens = [token for document in documents for token in document]
    starts = np.cumsum([0] + [len(document) for document in documents])
    start = data.draw(st.integers(0, len(tokens) - 1))
    count = data.draw(st.integers(1, len(tokens) - start))
    assert len(joined) == len(tokens) and joined.num_documents == len(documents)
    assert joined.read(start, count).tolist() == tokens[start : start + count]
    assert joined.document_starts(start, count).tolist() == [place - start for place in starts if start <= place < start + count]


@pytest.fixture
def prepared(tmp_path, write_shard):
    """A prepared folder made by hand: two documents to train on and none held out."""
    write_shard([[1, 2, 3], [4, 5]], name="train/00000")
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    hashes = {kind: hashlib.sha256((tmp_path / f"train/00000.{kind}").read_bytes()).hexdigest() for kind in ("bin", "idx")}
    manifest = {
        "format": 1,
        "tokenizer": {"file": "tokenizer.model", "sha256": hashlib.sha256(b"any").hexdigest(), "vocab_size": 6, "end_of_text": 0},
        "splits": {
            "train": {"bytes": 9, "shards": [{"prefix": "train/00000", "documents": 2, "tokens": 5, "sha256": hashes}]},
            "validation": {"bytes": 0, "shards": []},
        },
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_prepared_folder_opens(prepared):
    opened = PreparedData(prepared)
    assert [len(opened.splits[name]) for name in ("train", "validation")] == [5, 0]
    assert (opened.splits["train"].num_bytes, opened.vocab_size, opened.end_of_text) == (9, 6, 0)
    opened.verify()


def test_verify_finds_a_changed_byte(prepared):
    opened, path = PreparedData(prepared), prepared / "train/00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"00000\.bin was changed"):
        opened.verify()
    PreparedData(prepared)


def test_fingerprint_depends_on_the_tokens_and_not_on_the_folder(prepared, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "prepared"
    before = PreparedData(prepared).fingerprint
    prepared.rename(moved)
    assert PreparedData(moved).fingerprint == before
    text = (moved / "manifest.json").read_text()
    (moved / "manifest.json").write_text(text.replace('"bin": "', '"bin": "0'))
    assert PreparedData(moved).fingerprint != before


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ('"format": 1', '"format": 3', "format 3; supported formats are 1 and 2"),
        ('"tokens": 5', '"tokens": 6', "has 2 documents and 5 tokens; .* lists 2 and 6"),
        ("{", "", "not have the content that data/prepare.py writes"),
        ('"splits"', '"parts"', "not have the content .* writes: KeyError, 'splits'"),
        ("tokenizer.model", "other.model", r"other\.model is missing"),
        ("train/00000", "train/00001", "No such file"),
    ],
)
def test_invalid_manifest_is_refused(prepared, old, new, sentence):
    path = prepared / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=sentence):
        PreparedData(prepared)


def test_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing\. Create one with data/prepare\.py"):
        PreparedData(tmp_path)
