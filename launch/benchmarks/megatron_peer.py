"""megatron-core as the peer of launch/benchmarks/preparation.py."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray


def build_index(prefix: Path, tokens: NDArray, documents: int) -> Iterator[None]:
    """Write N documents of the same tokens; yield once before the index is written."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for _ in range(documents):
        builder.add_document(tokens, [len(tokens)])
    yield
    builder.finalize(f"{prefix}.idx")


def build_blend(samples: int) -> Iterator[None]:
    """Compute the order of N samples of two sources, and yield while it is in memory."""
    sources, positions = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    helpers.build_blending_indices(sources, positions, np.array([0.7, 0.3]), 2, samples, False)
    np.random.RandomState(1).shuffle(np.arange(samples, dtype=np.uint32))
    yield


def open_dataset(prefix: Path, cache: Path) -> Any:
    """Return megatron-core's samples of one epoch, without the attention masks that it could build."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=2048,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=types.SimpleNamespace(eod=1, pad=2, vocab_size=50_000, unique_identifiers={}),
    )
    stored = IndexedDataset(str(prefix), mmap=True)
    documents = np.arange(len(stored.sequence_lengths), dtype=np.int32)
    return GPTDataset(stored, str(prefix), documents, None, Split.train, config)
