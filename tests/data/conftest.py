import numpy as np
import pytest

from data.shards import Shard, ShardWriter, TokenStream


@pytest.fixture
def write_shard(tmp_path):
    """Return a function that writes documents, lists of ids, as a shard and returns its prefix."""

    def write(documents, dtype="<u2", name="shard"):
        with ShardWriter(tmp_path / name, np.dtype(dtype)) as writer:
            for document in documents:
                writer.add(np.array(document, dtype))
        return tmp_path / name

    return write


@pytest.fixture
def stream(write_shard):
    """A TokenStream of shards, each a list of documents, each a list of ids."""
    return lambda *shards: TokenStream([Shard(write_shard(shard, name=str(number))) for number, shard in enumerate(shards)], num_bytes=0)


@pytest.fixture
def counted():
    """Documents of these lengths; each token is its own index in the stream."""

    def count(*lengths):
        ends = np.cumsum(lengths)
        return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]

    return count
