"""Self-attention and cross-attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import KeyValueCache
from model.config import ModelConfig, Part
from model.layers import Linear, RMSNorm
from model.masks import MaskRule, additive_mask, attention_mask, cross_attention_mask
from model.positions import attention_positions

LONGEST_PLAIN_ATTENTION = 1024
"""Tokens up to which training on a CPU computes attention without the fused kernel, whose backward pass takes twice as long there."""


class AttentionWeights(nn.Module):
    """The linear layers of any attention: query, key, value and output, with grouped keys.  Ainslie et al. 2023, arXiv 2305.13245.

    `kind` seeds the weights of a second attention in the same block apart from those of the first.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int, kind: str = ""):
        super().__init__()
        self.layer_number = layer_number
        self.head_size = config.head_size
        self.dropout = config.dropout
        hidden, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_size
        keys = config.num_key_value_heads * config.head_size
        # T5 does not divide the scores by sqrt(head), but draws smaller query weights.
        query_std = std * config.head_size**-0.5 if config.positions == "relative" else std
        output_std = std / math.sqrt(2 * config.num_layers)
        self.query = Linear(hidden, queries, config.biases, query_std, seed, layer_number, f"{kind}query")
        self.key = Linear(hidden, keys, config.biases, std, seed, layer_number, f"{kind}key")
        self.value = Linear(hidden, keys, config.biases, std, seed, layer_number, f"{kind}value")
        self.output = Linear(queries, hidden, config.biases, output_std, seed, layer_number, f"{kind}output")
        self.query_norm = RMSNorm(config.head_size, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_size, config.norm_epsilon) if config.qk_norm else None

    def queries(self, hidden: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, heads, head]"""
        query = self.query(hidden).unflatten(-1, (-1, self.head_size))
        return query if self.query_norm is None else self.query_norm(query)

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, seq, hidden] -> 2 x [batch, seq, kv_heads, head]"""
        key = self.key(hidden).unflatten(-1, (-1, self.head_size))
        key = key if self.key_norm is None else self.key_norm(key)
        return key, self.value(hidden).unflatten(-1, (-1, self.head_size))


class Attention(AttentionWeights):
    """Self-attention, causal in a decoder.  [batch, seq, hidden] -> [batch, seq, hidden]

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2. `relative_table` [buckets, heads] is that of relative positions.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int, part: Part = "decoder"):
        super().__init__(config, layer_number, seed)
        self.mask_rule = MaskRule.of(config, part)
        self.positions = attention_positions(config, part)

    def forward(self, hidden: Tensor, segments: Tensor, cache: KeyValueCache | None = None, relative_table: Tensor | None = None) -> Tensor:
        """[batch, seq, hidden], [batch, seq] -> [batch, seq, hidden]; with a cache, hidden is that of the new tokens."""
        query, (key, value) = self.queries(hidden), self.keys_and_values(hidden)
        return self.output(self.mix(query, key, value, segments, cache, relative_table).flatten(2))

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Tensor,
        cache: KeyValueCache | None = None,
        relative_table: Tensor | None = None,
    ) -> Tensor:
        """All that passes between tokens: no weights, and each group of heads by itself.  [batch, seq, heads, head] -> same"""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = self.positions.rotate(query, key, start=cache.length if cache is not None else 0)
        key, value = self.append_to_cache(key, value, cache)
        num_queries, num_keys = query.shape[2], key.shape[2]
        mask = attention_mask(self.mask_rule, segments, num_queries, num_keys, is_cached=cache is not None)
        bias = self.positions.bias(num_queries, num_keys, relative_table, like=query)
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, mask, dropout, self.positions.score_scale, bias).transpose(1, 2)

    def append_to_cache(self, key: Tensor, value: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
        """The keys and values that queries attend to: those of the cache and the new ones.  2 x [batch, kv_heads, seq, head]"""
        return (key, value) if cache is None else cache.append(self.layer_number, key, value)


class CrossAttention(AttentionWeights):
    """A target's queries over its source's keys, without positions.  [batch, target, hidden], [batch, source, hidden] -> the first

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int):
        super().__init__(config, layer_number, seed, "cross ")
        self.score_scale = 1.0 if config.positions == "relative" else None

    def forward(
        self, hidden: Tensor, segments: Tensor, encoding: Tensor, source_segments: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[batch, target, hidden], [batch, target], [batch, source, hidden], [batch, source] -> [batch, target, hidden]"""

        def source_pair() -> tuple[Tensor, Tensor]:
            """Keys and values of the source.  2 x [batch, kv_heads, source, head]"""
            key, value = self.keys_and_values(encoding)
            return key.transpose(1, 2), value.transpose(1, 2)

        key, value = source_pair() if cache is None else cache.source_pair(self.layer_number, source_pair)
        mask = cross_attention_mask(segments, source_segments)
        query = self.queries(hidden).transpose(1, 2)
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0, self.score_scale)
        return self.output(mixed.transpose(1, 2).flatten(2))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale Q K^T + bias) V, causal if there is no mask.  [batch, heads, seq, head] -> same; keys may be grouped

    Vaswani et al. 2017, arXiv 1706.03762, equation 1. `scale` is 1 / sqrt(head) by default.
    """
    heads, seq = query.shape[1:3]
    if query.device.type == "cpu" and query.requires_grad and max(seq, key.shape[2]) <= LONGEST_PLAIN_ATTENTION:
        if heads != key.shape[1]:
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        added = additive_mask(torch.ones(seq, seq, dtype=torch.bool).tril() if mask is None else mask, query.dtype)
        if bias is not None:
            added = added + bias
        weights = (query * (scale or query.shape[-1] ** -0.5) @ key.transpose(2, 3) + added).softmax(dim=-1)
        return F.dropout(weights, dropout) @ value
    if bias is not None:
        if mask is None and seq > 1:
            mask = torch.ones(seq, key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and seq > 1,
        scale=scale,
        enable_gqa=heads != key.shape[1],
    )
