"""The key-value cache of generation."""

from collections.abc import Callable

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens read so far, for each block, and the encoded source.  Each [batch, kv_heads, seq, head]

    A cache holds one document a row, so positions count from its first token.
    """

    def __init__(self) -> None:
        self.length = 0
        """Number of tokens read; in an encoder-decoder, by the decoder."""
        self.encoding: Tensor | None = None
        """Output of the encoder for the source.  [batch, seq, hidden]"""
        self.pairs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        """Keys and values by ("self" or "cross", layer number)."""

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens and return those of all tokens, the new ones last."""
        entry = "self", layer_number
        if entry in self.pairs:
            old_key, old_value = self.pairs[entry]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self.pairs[entry] = key, value
        return key, value

    def source_pair(self, layer_number: int, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the source; `compute` is called the first time only."""
        entry = "cross", layer_number
        if entry not in self.pairs:
            self.pairs[entry] = compute()
        return self.pairs[entry]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be selected more than once.  [new batch]"""
        self.pairs = {entry: (key[rows], value[rows]) for entry, (key, value) in self.pairs.items()}
        self.encoding = self.encoding[rows] if self.encoding is not None else None
