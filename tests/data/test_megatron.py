"""An independent reader of our shards: Megatron's own."""

import os

import numpy as np
import pytest

from data.shards import Shard

try:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("megatron-core is not installed", allow_module_level=True)

DOCUMENTS = [[5, 4, 3], [2], [60_000, 1, 0, 7]]


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_megatron_reads_our_shards(write_shard, dtype):
    read = IndexedDataset(str(write_shard(DOCUMENTS, dtype)))
    assert [document.tolist() for document in read] == DOCUMENTS
    assert read[0].dtype == np.dtype(dtype)
    assert read.sequence_lengths.tolist() == [3, 1, 4]
    assert read.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_our_shards_have_the_bytes_of_megatrons(write_shard, tmp_path, dtype):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = write_shard(DOCUMENTS, dtype)
    for kind in (".bin", ".idx"):
        assert ours.with_suffix(kind).read_bytes() == (tmp_path / f"theirs{kind}").read_bytes()


def test_megatrons_shards_of_many_sequences_are_read(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([6], [1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    shard = Shard(tmp_path / "theirs")
    assert shard.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert shard.document_starts(0, 6).tolist() == [0, 5]
