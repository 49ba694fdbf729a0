"""Attention masks: which keys a query may attend to. Pure functions of the segments and of one rule."""

import dataclasses

import torch
from torch import Tensor

from model.config import ModelConfig, Part


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """The keys that a query of self-attention may attend to, as far as the configuration decides it."""

    is_causal: bool
    """A query attends to its own key and to earlier ones; otherwise also to later ones."""
    within_documents: bool
    """A query attends to keys of its own document only."""
    has_prefix: bool
    """Every query may attend to the keys of its document's prefix (arXiv 1910.10683, section 3.2.1)."""
    window: int | None
    """Sliding window: number of keys up to the query's own, itself included, or half of them on each side if not causal."""

    @classmethod
    def of(cls, config: ModelConfig, part: Part) -> "MaskRule":
        """The rule for the blocks of the encoder or of the decoder."""
        return cls(part == "decoder", config.uses_segments, config.prefix_attention, config.sliding_window)


def attention_mask(rule: MaskRule, segments: Tensor, num_queries: int, num_keys: int, is_cached: bool = False) -> Tensor | None:
    """True where a query may attend to a key.  segments [batch, seq] -> [batch or 1, 1, queries, keys]

    The queries are the last of the keys' tokens; with a cache (`is_cached`), which holds one document, they are the new tokens.
    None stands for plain causal attention over all keys, for which faster kernels need no mask.
    """
    within_documents = rule.within_documents and not is_cached
    shows_prefix = rule.has_prefix and num_keys == segments.shape[1]  # later queries of a cache come after the prefix
    if not (within_documents or shows_prefix) and rule.window is None and num_queries in (1, num_keys):
        return None
    first = num_keys - num_queries  # index of the first query's own key
    window = 2 * num_keys if rule.window is None else rule.window
    before, after = (window - 1, 0) if rule.is_causal else (window // 2, window // 2)
    allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=segments.device).tril(first + after)
    if shows_prefix:
        allowed = allowed | (segments[:, None, None, :] < 0)
    allowed = allowed.triu(first - before)  # last, because the window limits what is seen of a prefix too
    return allowed & same_document(segments, segments) if within_documents else allowed


def cross_attention_mask(segments: Tensor, source_segments: Tensor) -> Tensor:
    """True where a target's query may attend to a source's key.  [batch, target], [batch, source] -> [batch, 1, target, source]

    A query without any key of its own document (padding) may attend to all keys: a softmax over no key is not a number.
    """
    mask = same_document(segments, source_segments)
    return mask | ~mask.any(dim=-1, keepdim=True)


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """True where query and key have the same segment.  [batch, queries], [batch, keys] -> [batch, 1, queries, keys]"""
    return queries[:, None, :, None].abs() == keys[:, None, None, :].abs()


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed and -infinity elsewhere, to be added to the scores.  Same shape"""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)
