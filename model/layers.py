"""The stream between layers, and the layers around attention: linear, norms, embeddings, feed-forward, heads.

Each entry of the network's list (see transformer.py) takes a Stream and returns one; each forward is its equation.
A constructor fills its own weights from (seed, layer number, name), so they do not depend on rank, stage or build order.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, is_gated


class Stream(NamedTuple):
    """The tensors that pass from layer to layer. Fields that a network, or a part of it, does not have are None.

    An encoder-decoder first runs the encoder, with the target's tokens carried along; its decoder begins by moving the encoder's
    output to `encoding` and the target to `hidden`.
    """

    hidden: Tensor
    """[batch, seq, hidden]; token ids [batch, seq] before the embedding, logits [batch, seq, vocab] after the head"""
    segments: Tensor
    """[batch, seq], the number of each token's document in a packed sample, from 1; 0 is padding, -n the prefix of document n"""
    token_types: Tensor | None = None
    """[batch, seq], in an encoder until TokenTypes has added their vectors"""
    target: Tensor | None = None
    """[batch, target], token ids, in the encoder of an encoder-decoder"""
    target_segments: Tensor | None = None
    """[batch, target]"""
    encoding: Tensor | None = None
    """[batch, source, hidden], the encoder's output, in the decoder of an encoder-decoder"""
    source_segments: Tensor | None = None
    """[batch, source]"""
    relative_table: Tensor | None = None
    """[buckets, heads], the table of relative positions of the running part"""
    class_logits: Tensor | None = None
    """[batch, classes], after Classifier"""

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Stream":
        """The stream of a network's inputs, or of what `tensors` gave at any layer: counts and types tell the fields apart.

        The inputs of a decoder or encoder are tokens, segments[, token types], those of an encoder-decoder source, source segments,
        target tokens, target segments.
        """
        hidden, segments, *others = tensors
        if not others:
            return cls(hidden, segments)
        if len(others) == 1:
            (other,) = others
            return cls(hidden, segments, class_logits=other) if other.is_floating_point() else cls(hidden, segments, token_types=other)
        other, other_segments, *tables = others
        table = tables[0] if tables else None
        if other.is_floating_point():
            return cls(hidden, segments, encoding=other, source_segments=other_segments, relative_table=table)
        return cls(hidden, segments, target=other, target_segments=other_segments, relative_table=table)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are not None, in their order."""
        return tuple(tensor for tensor in self if tensor is not None)


def fresh_weight(shape: tuple[int, ...], std: float, *stream: object) -> nn.Parameter:
    """A parameter of normally distributed numbers that depend on the seeds in `stream` only; drawn in float32 on the CPU."""
    parameter = nn.Parameter(torch.empty(shape))
    if parameter.is_meta:  # shapes only
        return parameter
    seed = int.from_bytes(hashlib.sha256(repr(stream).encode()).digest()[:8], "little", signed=True)
    # Drawn into an integer tensor's memory, because deepspeed.zero.Init casts every new floating tensor to its own type.
    draw = torch.empty(shape, dtype=torch.int32, device="cpu").view(torch.float32)
    with torch.no_grad():
        parameter.copy_(draw.normal_(0.0, std, generator=torch.Generator().manual_seed(seed)))
    return parameter


class Linear(nn.Module):
    """x W^T + b.  [..., in] -> [..., out]"""

    def __init__(self, in_size: int, out_size: int, bias: bool, std: float, *stream: object):
        super().__init__()
        self.weight = fresh_weight((out_size, in_size), std, *stream)
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """Zero mean and unit variance over the last axis, then a gain and optionally a bias.  Ba et al. 2016, arXiv 1607.06450."""

    def __init__(self, size: int, epsilon: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> same"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RMSNorm(nn.Module):
    """Unit mean square over the last axis, then a gain.  Zhang and Sennrich 2019, arXiv 1910.07467."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> same"""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def norm(config: ModelConfig) -> nn.Module:
    """The configured norm over the hidden size."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_epsilon)
    return LayerNorm(config.hidden_size, config.norm_epsilon, config.biases)


class TokenEmbedding(nn.Module):
    """Token ids to vectors; if tied, also vectors to logits.  [batch, seq] -> [batch, seq, hidden]; [.., hidden] -> [.., vocab]

    With sinusoidal positions the vectors are multiplied by sqrt(hidden): Vaswani et al. 2017, section 3.4. With relative positions
    the tied head's input is multiplied by 1 / sqrt(hidden), as in T5.
    """

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.vocab_size, config.hidden_size), config.initializer_range, seed, "embedding")
        self.scale = math.sqrt(config.hidden_size) if config.positions == "sinusoidal" else None
        self.head_scale = config.hidden_size**-0.5 if config.positions == "relative" else None
        self.softcap = config.logit_softcap

    def forward(self, stream: Stream, use: Literal["tokens", "target", "head"] = "tokens") -> Stream:
        """Embed the tokens or the target, or act as the head. One forward for all, because ZeRO-3 gathers weights in module calls."""
        if use == "head":
            hidden = stream.hidden if self.head_scale is None else stream.hidden * self.head_scale
            return stream._replace(hidden=softcapped(F.linear(hidden, self.weight), self.softcap))
        if use == "target":
            assert stream.target is not None and stream.target_segments is not None
            return Stream(self.embed(stream.target), stream.target_segments, encoding=stream.hidden, source_segments=stream.segments)
        return stream._replace(hidden=self.embed(stream.hidden))

    def embed(self, tokens: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq, hidden]"""
        hidden = F.embedding(tokens, self.weight)
        return hidden if self.scale is None else hidden * self.scale


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits between -cap and cap: cap x tanh(logits / cap).  Gemma 2, arXiv 2408.00118, section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class TokenTypes(nn.Module):
    """Adds the vector of each token's type to the embeddings.  Devlin et al. 2018, arXiv 1810.04805."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.token_types, config.hidden_size), config.initializer_range, seed, "token types")

    def forward(self, stream: Stream) -> Stream:
        """hidden [batch, seq, hidden] -> same; token_types becomes None."""
        assert stream.token_types is not None
        return stream._replace(hidden=stream.hidden + F.embedding(stream.token_types, self.weight), token_types=None)


class EmbeddingNorm(nn.Module):
    """The norm of the input of an encoder's first block, then dropout.  Devlin et al. 2018, arXiv 1810.04805."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = norm(config)
        self.dropout = config.dropout

    def forward(self, stream: Stream) -> Stream:
        """hidden [batch, seq, hidden] -> same"""
        return stream._replace(hidden=F.dropout(self.norm(stream.hidden), self.dropout, self.training))


def activate(x: Tensor, activation: str) -> Tensor:
    """The nonlinearity of that name; for a gated activation, that of its gate."""
    if activation == "relu":
        return F.relu(x)
    if activation == "swiglu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


class FeedForward(nn.Module):
    """W2 act(W1 x), or with a gate W2 (act(Wg x) * W1 x): Shazeer 2020, arXiv 2002.05202.  [batch, seq, hidden] -> same"""

    def __init__(self, config: ModelConfig, layer_number: int, seed: int):
        super().__init__()
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation = config.activation
        self.gate = Linear(hidden, inner, config.biases, std, seed, layer_number, "gate") if is_gated(config) else None
        self.up = Linear(hidden, inner, config.biases, std, seed, layer_number, "up")
        self.down = Linear(inner, hidden, config.biases, std / math.sqrt(2 * config.num_layers), seed, layer_number, "down")

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, seq, hidden] -> same"""
        if self.gate is not None:
            return self.down(activate(self.gate(hidden), self.activation) * self.up(hidden))
        return self.down(activate(self.up(hidden), self.activation))


class FinalNorm(nn.Module):
    """The norm after the last block of a pre-norm stack."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = norm(config)

    def forward(self, stream: Stream) -> Stream:
        """hidden [batch, seq, hidden] -> same"""
        return stream._replace(hidden=self.norm(stream.hidden))


class Classifier(nn.Module):
    """Logits of a sample's classes from its first token: a linear layer, tanh, and a second linear layer.  -> [batch, classes]

    Devlin et al. 2018, arXiv 1810.04805: the pooler and the classes.
    """

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        hidden, std = config.hidden_size, config.initializer_range
        self.pooler = Linear(hidden, hidden, True, std, seed, "pooler")
        self.classes = Linear(hidden, config.num_classes, True, std, seed, "classes")
        self.dropout = config.dropout

    def forward(self, stream: Stream) -> Stream:
        """Add class_logits [batch, classes] to the stream."""
        pooled = torch.tanh(self.pooler(stream.hidden[:, 0]))
        return stream._replace(class_logits=self.classes(F.dropout(pooled, self.dropout, self.training)))


class TokenTransform(nn.Module):
    """norm(act(W x)) before an encoder's head.  Devlin et al. 2018, as in the authors' code."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.biases, config.initializer_range, seed, "token transform")
        self.norm = norm(config)
        self.activation = config.activation

    def forward(self, stream: Stream) -> Stream:
        """hidden [batch, seq, hidden] -> same"""
        return stream._replace(hidden=self.norm(activate(self.dense(stream.hidden), self.activation)))


class Head(nn.Module):
    """Vectors to logits, with weights of its own.  [batch, seq, hidden] -> [batch, seq, vocab]"""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.vocab_size, config.hidden_size), config.initializer_range, seed, "head")
        self.softcap = config.logit_softcap

    def forward(self, stream: Stream) -> Stream:
        """hidden [batch, seq, hidden] -> logits [batch, seq, vocab]"""
        return stream._replace(hidden=softcapped(F.linear(stream.hidden, self.weight), self.softcap))


class HeadBias(nn.Module):
    """Adds a learned number for each vocabulary entry to its logits.  [batch, seq, vocab] -> same"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, stream: Stream) -> Stream:
        """logits [batch, seq, vocab] -> same"""
        return stream._replace(hidden=stream.hidden + self.weight)
