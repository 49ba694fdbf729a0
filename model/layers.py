"""The layers of the list. Each takes and returns (hidden, segments); each forward is its equation.

hidden    [batch, seq, hidden]; token ids [batch, seq] before the embedding, logits [batch, seq, vocab] behind the head
segments  [batch, seq], numbers the documents of a packed sample from 1; 0 is padding

A constructor fills its own weights from (seed, layer number, name), so the numbers do not depend on rank, stage or build order.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig

Passed = tuple[Tensor, Tensor]

LONGEST_PLAIN_ATTENTION = 1024
"""Tokens up to which training on a CPU multiplies the attention out: there the fused kernel's backward takes twice as long."""


class KeyValueCache:
    """Keys and values that attention has seen, for generation: one pair [batch, kv_heads, seq, head] a block."""

    def __init__(self) -> None:
        self.length = 0
        self._pairs: dict[int, Passed] = {}

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> Passed:
        """All keys and values so far, the new ones last; each [batch, kv_heads, seq so far, head]."""
        if layer_number in self._pairs:
            old_key, old_value = self._pairs[layer_number]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self._pairs[layer_number] = key, value
        return key, value


def fresh_weight(shape: tuple[int, ...], std: float, *stream: object) -> nn.Parameter:
    """A parameter of normal numbers that depend on `stream` alone: always drawn in float32 on the CPU."""
    parameter = nn.Parameter(torch.empty(shape))
    if parameter.is_meta:  # only the shapes are wanted
        return parameter
    seed = int.from_bytes(hashlib.sha256(repr(stream).encode()).digest()[:8], "little", signed=True)
    # Drawn into an integer tensor's memory: deepspeed.zero.Init turns every new floating tensor into its own dtype.
    draw = torch.empty(shape, dtype=torch.int32, device="cpu").view(torch.float32)
    with torch.no_grad():
        parameter.copy_(draw.normal_(0.0, std, generator=torch.Generator().manual_seed(seed)))
    return parameter


def _count(*bounds: int) -> Tensor:
    """Integers for a table of positions: real ones even where weights are only shapes (meta), whole ones under zero.Init."""
    return torch.arange(*bounds, device="cpu")


class Linear(nn.Module):
    """x W^T + b.  [..., in] -> [..., out]"""

    def __init__(self, in_size: int, out_size: int, bias: bool, std: float, *stream: object):
        super().__init__()
        self.weight = fresh_weight((out_size, in_size), std, *stream)
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Zero mean and unit variance over the last axis, then a gain and perhaps a bias.  Ba et al. 2016, arXiv 1607.06450."""

    def __init__(self, size: int, epsilon: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RMSNorm(nn.Module):
    """Unit mean square over the last axis, then a gain.  Zhang and Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_epsilon)
    return LayerNorm(config.hidden_size, config.norm_epsilon, config.biases)


def positions_in_documents(segments: Tensor) -> Tensor:
    """Each token's place in its own document, from 0.  [batch, seq] -> [batch, seq]"""
    places = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.zeros_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def causal_mask_inside_documents(segments: Tensor) -> Tensor:
    """True where a query may look.  [batch, seq] -> [batch, 1, seq, seq]"""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (i, i + head/2) of each head by its position's angle.  [batch, heads, seq, head] -> same

    Su et al. 2021, arXiv 2104.09864, with the halves paired as in the released Llama checkpoints for Hugging Face.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(head)) V, causal where there is no mask.  [batch, heads, seq, head] -> same; keys may be grouped

    Vaswani et al. 2017, arXiv 1706.03762, equation 1.
    """
    heads, seq = query.shape[1:3]
    if query.device.type == "cpu" and query.requires_grad and seq <= LONGEST_PLAIN_ATTENTION:
        if heads != key.shape[1]:
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        allowed = torch.ones(seq, seq, dtype=torch.bool).tril() if mask is None else mask
        forbidden = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, -torch.inf)
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(2, 3) + forbidden).softmax(dim=-1)
        return F.dropout(weights, dropout) @ value
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and seq > 1, enable_gqa=heads != key.shape[1]
    )


class TokenEmbedding(nn.Module):
    """Token ids to vectors; as the tied head, vectors to logits.  [batch, seq] -> [batch, seq, hidden] -> [batch, seq, vocab]

    Both uses are calls of the module, because ZeRO-3 gathers a module's weights when it is called.
    With sinusoidal positions the vectors are scaled by sqrt(hidden): Vaswani et al. 2017, section 3.4.
    """

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.vocab_size, config.hidden_size), config.initializer_range, seed, "embedding")
        self.scale = math.sqrt(config.hidden_size) if config.positions == "sinusoidal" else None

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None, as_head: bool = False) -> Passed:
        tokens_or_hidden, segments = inputs
        if as_head:
            return F.linear(tokens_or_hidden, self.weight), segments
        hidden = F.embedding(tokens_or_hidden, self.weight)
        return (hidden if self.scale is None else hidden * self.scale), segments


class Positions(nn.Module):
    """Adds each position's vector, learned or sinusoidal (Vaswani et al. 2017, section 3.5), then drops out."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.restart = config.document_mask
        self.dropout = config.dropout
        self.first_place = 0  # of the part of the sequence that is here, where ranks share one
        shape = config.sequence_length, config.hidden_size
        if config.positions == "learned":
            self.weight = fresh_weight(shape, config.initializer_range, seed, "positions")
        else:
            wavelengths = 10000.0 ** (_count(0, config.hidden_size, 2) / config.hidden_size)
            angles = _count(config.sequence_length)[:, None] / wavelengths
            waves = torch.stack((angles.sin(), angles.cos()), dim=-1).view(shape)  # sin in even columns, cos in odd ones
            self.register_buffer("weight", waves, persistent=False)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments = inputs
        start = cache.length if cache else self.first_place
        here = slice(start, start + hidden.shape[1])
        restart = self.restart and cache is None  # a cache holds one document
        added = F.embedding(positions_in_documents(segments)[:, here], self.weight) if restart else self.weight[here]
        hidden = hidden + added.to(hidden.dtype)
        return F.dropout(hidden, self.dropout, self.training), segments


class Attention(nn.Module):
    """Causal self-attention with grouped keys.  [batch, seq, hidden] -> [batch, seq, hidden]

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2. Grouped keys: Ainslie et al. 2023, arXiv 2305.13245.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int):
        super().__init__()
        self.layer_number = layer_number
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.document_mask = config.document_mask
        hidden, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_size
        keys = config.num_key_value_heads * config.head_size
        self.query = Linear(hidden, queries, config.biases, std, seed, layer_number, "query")
        self.key = Linear(hidden, keys, config.biases, std, seed, layer_number, "key")
        self.value = Linear(hidden, keys, config.biases, std, seed, layer_number, "value")
        self.output = Linear(queries, hidden, config.biases, std / math.sqrt(2 * config.num_layers), seed, layer_number, "output")
        self.query_norm = RMSNorm(config.head_size, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_size, config.norm_epsilon) if config.qk_norm else None
        if config.positions == "rotary":
            # 1 / theta^x, not theta^-x: the last bit, which counts at far positions, is then that of transformers.
            inverse_wavelengths = 1.0 / config.rope_theta ** (_count(0, config.head_size, 2) / config.head_size)
            angles = _count(config.sequence_length)[:, None] * inverse_wavelengths
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.cos = self.sin = None

    def forward(self, hidden: Tensor, segments: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        query = self.query(hidden).unflatten(-1, (-1, self.head_size))
        key = self.key(hidden).unflatten(-1, (-1, self.head_size))
        value = self.value(hidden).unflatten(-1, (-1, self.head_size))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return self.output(self.mix(query, key, value, segments, cache).flatten(2))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """All that passes between tokens; no weights, and each group of heads for itself.  [batch, seq, heads, head] -> same"""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        seq = query.shape[2]
        if self.cos is not None:
            start = cache.length if cache else 0
            # Rotation is relative, so positions need not restart inside documents.
            cos = self.cos[start : start + seq].to(query.dtype)
            sin = self.sin[start : start + seq].to(query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mask = causal_mask_inside_documents(segments) if self.document_mask and cache is None else None
        if cache is not None:
            key, value = cache.append(self.layer_number, key, value)
            if key.shape[2] > seq > 1:  # several new queries behind old keys: each sees the old and its own past
                mask = torch.ones(seq, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - seq)
        return attend(query, key, value, mask, self.dropout if self.training else 0.0).transpose(1, 2)


class FeedForward(nn.Module):
    """W2 act(W1 x); with SwiGLU W2 (silu(Wg x) * W1 x), Shazeer 2020, arXiv 2002.05202.  [batch, seq, hidden] -> same"""

    def __init__(self, config: ModelConfig, layer_number: int, seed: int):
        super().__init__()
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation = config.activation
        self.gate = Linear(hidden, inner, config.biases, std, seed, layer_number, "gate") if config.activation == "swiglu" else None
        self.up = Linear(hidden, inner, config.biases, std, seed, layer_number, "up")
        self.down = Linear(inner, hidden, config.biases, std / math.sqrt(2 * config.num_layers), seed, layer_number, "down")

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(hidden)) * self.up(hidden))
        if self.activation == "relu":
            return self.down(F.relu(self.up(hidden)))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down(F.gelu(self.up(hidden), approximate=approximate))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.  (hidden, segments) -> same

    `recompute` keeps only the block's input for the backward pass and runs its forward again there.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int, recompute: bool = False):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.dropout = config.dropout
        self.recompute = recompute
        self.attention_norm = norm(config)
        self.attention = Attention(config, layer_number, seed)
        self.feed_forward_norm = norm(config)
        self.feed_forward = FeedForward(config, layer_number, seed)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments = inputs
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.transform, hidden, segments, use_reentrant=False), segments
        return self.transform(hidden, segments, cache), segments

    def transform(self, hidden: Tensor, segments: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]"""
        if self.norm_first:
            hidden = hidden + self.drop(self.attention(self.attention_norm(hidden), segments, cache))
            return hidden + self.drop(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.attention_norm(hidden + self.drop(self.attention(hidden, segments, cache)))
        return self.feed_forward_norm(hidden + self.drop(self.feed_forward(hidden)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class FinalNorm(nn.Module):
    """The norm before the head of a pre-norm network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = norm(config)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments = inputs
        return self.norm(hidden), segments


class Head(nn.Module):
    """Vectors to logits with weights of their own.  [batch, seq, hidden] -> [batch, seq, vocab]"""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.vocab_size, config.hidden_size), config.initializer_range, seed, "head")

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments = inputs
        return F.linear(hidden, self.weight), segments
