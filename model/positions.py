"""Kinds of position, one class each: vectors added to the embeddings, rotation of queries and keys, or a bias on the scores.

A kind acts in one of two places or in both. `POSITION_LAYERS` are entries of the list of layers, after the embedding;
`attention_positions` gives the object that self-attention uses in every block.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import KeyValueCache
from model.config import RELATIVE_BUCKETS, RELATIVE_DISTANCE, ModelConfig, Part
from model.layers import Stream, fresh_weight


def _integers(*bounds: int) -> Tensor:
    """torch.arange for a table of positions: on the CPU also while weights are shapes only (meta), and never cast by zero.Init."""
    return torch.arange(*bounds, device="cpu")


class AbsolutePositions(nn.Module):
    """Adds one vector for each position to the embeddings, then applies dropout.  Subclasses define `weight` [positions, hidden].

    In an encoder the norm comes before the dropout; EmbeddingNorm applies both.
    """

    weight: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.counts_per_document = config.document_mask or config.architecture != "decoder"
        self.dropout = 0.0 if config.architecture == "encoder" else config.dropout
        self.first_position = 0
        """Position of this rank's first token, where several ranks share a sequence."""

    def forward(self, stream: Stream, cache: KeyValueCache | None = None) -> Stream:
        """hidden [batch, seq, hidden] -> same; with a cache the positions continue after its tokens."""
        start = self.first_position if cache is None else cache.length
        positions = slice(start, start + stream.hidden.shape[1])
        if self.counts_per_document and cache is None:
            vectors = F.embedding(positions_in_documents(stream.segments)[:, positions], self.weight)
        else:
            vectors = self.weight[positions]
        hidden = stream.hidden + vectors.to(stream.hidden.dtype)
        return stream._replace(hidden=F.dropout(hidden, self.dropout, self.training))


class LearnedPositions(AbsolutePositions):
    """A learned vector for each position, as in GPT-2 and BERT."""

    def __init__(self, config: ModelConfig, seed: int, part: Part = "decoder"):
        super().__init__(config)
        shape = config.sequence_length, config.hidden_size
        self.weight = fresh_weight(shape, config.initializer_range, seed, "positions" if part == "decoder" else "source positions")


class SinusoidalPositions(AbsolutePositions):
    """Fixed sines and cosines.  Vaswani et al. 2017, arXiv 1706.03762, section 3.5.

    The sines fill the first half of the columns and the cosines the second, as in the authors' tensor2tensor and in Marian.
    """

    def __init__(self, config: ModelConfig, seed: int, part: Part = "decoder"):
        super().__init__(config)
        wavelengths = 10000.0 ** (_integers(0, config.hidden_size, 2) / config.hidden_size)
        angles = _integers(config.sequence_length)[:, None] / wavelengths
        self.register_buffer("weight", torch.cat((angles.sin(), angles.cos()), dim=-1), persistent=False)


class RelativePositions(nn.Module):
    """T5's learned table [buckets, heads], put into the stream for all blocks of one stack.  Raffel et al. 2019, arXiv 1910.10683."""

    def __init__(self, config: ModelConfig, seed: int, part: Part):
        super().__init__()
        shape = RELATIVE_BUCKETS, config.num_attention_heads
        # The last argument was once a boolean; it seeds the weight, so it must stay one.
        self.weight = fresh_weight(shape, config.initializer_range, seed, "relative positions", part == "decoder")

    def forward(self, stream: Stream) -> Stream:
        """Adds `relative_table` to the stream."""
        return stream._replace(relative_table=self.weight.clone())  # a clone: ZeRO-3 frees the weight itself after this call


POSITION_LAYERS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions, "relative": RelativePositions}
"""Entry of the list of layers for each kind of position that has one."""


class AttentionPositions(nn.Module):
    """Base class of the objects below; it does nothing, for kinds of position that are added to the embeddings."""

    score_scale: float | None = None
    """Factor of the attention scores; None: 1 / sqrt(head)."""

    def rotate(self, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of the positions from `start`, turned if the kind does so.  2 x [batch, heads, seq, head] -> same"""
        return query, key

    def bias(self, num_queries: int, num_keys: int, relative_table: Tensor | None, like: Tensor) -> Tensor | None:
        """Numbers added to the scores, in type and on device of `like`; None: none.  -> [1, heads, queries, keys]"""
        return None


class Rotary(AttentionPositions):
    """Rotation of queries and keys by their positions' angles.  Su et al. 2021, arXiv 2104.09864.

    Only the difference of two angles counts, so positions need not restart in each document.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def rotate(self, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by the angles of the positions from `start`."""
        positions = slice(start, start + query.shape[2])
        cos, sin = self.cos[positions].to(query.dtype), self.sin[positions].to(query.dtype)
        return rotate(query, cos, sin), rotate(key, cos, sin)


class Alibi(AttentionPositions):
    """A penalty on each score that grows with the distance, by a slope for each head.  Press et al. 2021, arXiv 2108.12409."""

    slopes: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(config.num_attention_heads), persistent=False)

    def bias(self, num_queries: int, num_keys: int, relative_table: Tensor | None, like: Tensor) -> Tensor:
        """-slope x distance.  -> [1, heads, queries, keys]"""
        distance = distances(num_queries, num_keys, like.device)
        return (self.slopes[:, None, None] * -distance.abs())[None].to(like.dtype)


class RelativeBias(AttentionPositions):
    """A learned number for each head and bucket of distances, added to the score.  Raffel et al. 2019, arXiv 1910.10683, section 2.1.

    As in T5, the scores are not divided by sqrt(head). The table comes with the stream: see RelativePositions.
    """

    score_scale = 1.0

    def __init__(self, part: Part):
        super().__init__()
        self.both_sides = part == "encoder"

    def bias(self, num_queries: int, num_keys: int, relative_table: Tensor | None, like: Tensor) -> Tensor:
        """The table's number for each distance.  -> [1, heads, queries, keys]"""
        assert relative_table is not None
        buckets = relative_buckets(distances(num_queries, num_keys, like.device), self.both_sides)
        return F.embedding(buckets, relative_table).permute(2, 0, 1)[None].to(like.dtype)


def attention_positions(config: ModelConfig, part: Part) -> AttentionPositions:
    """The object for the configured kind of position that self-attention uses in the encoder or the decoder."""
    if config.positions == "rotary":
        return Rotary(config)
    if config.positions == "alibi":
        return Alibi(config)
    if config.positions == "relative":
        return RelativeBias(part)
    return AttentionPositions()


def positions_in_documents(segments: Tensor) -> Tensor:
    """Each token's position in its own document, from 0.  [batch, seq] -> [batch, seq]"""
    segments = segments.abs()
    positions = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.zeros_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return positions - torch.where(starts, positions, 0).cummax(dim=1).values


def distances(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Distance in tokens from each query to each key, positive if the key comes later.  -> [queries, keys]

    The last query has the position of the last key.
    """
    positions = torch.arange(num_keys, device=device)
    return positions - positions[num_keys - num_queries :, None]


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of each position.  -> 2 x [sequence_length, head / 2]

    Su et al. 2021, arXiv 2104.09864. The scalings for a longer context:
    "linear" divides all frequencies by the factor (Chen et al. 2023, arXiv 2306.15595).
    "ntk" takes a larger base (NTK-aware; Peng et al. 2023, arXiv 2309.00071, section 3.1).
    "yarn" (the same paper, equations 17 to 25) keeps the frequencies of pairs that turn 32 times or more within the original
    context, divides those that turn less than once, interpolates between, and sharpens attention.
    "llama3" (arXiv 2407.21783) keeps what turns 4 times or more, divides what turns less than once, interpolates linearly between,
    and does not sharpen attention.
    """
    size, theta, factor = config.head_size, config.rope_theta, config.rope_factor
    if config.rope_scaling == "ntk":
        theta *= factor ** (size / (size - 2))
    # 1 / theta^x, not theta^-x: the last bit, which counts at far positions, is then that of transformers.
    frequencies = 1.0 / theta ** (_integers(0, size, 2) / size)
    sharpness = 1.0
    if config.rope_scaling == "linear":
        frequencies = frequencies / factor
    elif config.rope_scaling == "yarn":
        original = config.rope_original_length
        assert original is not None
        pair_with = lambda turns: size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
        first, last = max(math.floor(pair_with(32)), 0), min(math.ceil(pair_with(1)), size - 1)
        scaled = ((_integers(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        frequencies = frequencies / factor * scaled + frequencies * (1 - scaled)
        sharpness = 0.1 * math.log(factor) + 1.0
    elif config.rope_scaling == "llama3":
        assert config.rope_original_length is not None
        turns = config.rope_original_length * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    angles = _integers(config.sequence_length)[:, None] * frequencies
    return angles.cos() * sharpness, angles.sin() * sharpness


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (i, i + head/2) of each head by its position's angle.  [batch, heads, seq, head] -> same

    Su et al. 2021, arXiv 2104.09864, with the halves paired as in the released Llama checkpoints for Hugging Face.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head's penalty on distance.  -> [heads]

    Press et al. 2021, arXiv 2108.12409: 2^(-8 i / n). If n is not a power of two: the slopes of the power below, then every other
    slope of the power above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = 8 * (_integers(power) + 1) / power, 4 * (2 * _integers(num_heads - power) + 1) / power
    return 2.0 ** -torch.cat(exponents)


def relative_buckets(distance: Tensor, both_sides: bool) -> Tensor:
    """Row of T5's table for each distance: one row each for near distances, shared rows on a logarithmic scale for far ones.

    [queries, keys] -> same. Raffel et al. 2019, arXiv 1910.10683, section 2.1. With `both_sides` (an encoder) half of the rows are for
    keys before the query and half for keys after it.
    """
    buckets = RELATIVE_BUCKETS // 2 if both_sides else RELATIVE_BUCKETS
    size = distance.abs() if both_sides else -distance.clamp(max=0)
    exact = buckets // 2  # distances below this have a row each
    spread = math.log(RELATIVE_DISTANCE / exact)
    shared = exact + ((size.clamp(min=1).float() / exact).log() / spread * (buckets - exact)).long()
    bucket = torch.where(size < exact, size, shared.clamp(max=buckets - 1))
    return bucket + buckets * (distance > 0) if both_sides else bucket
