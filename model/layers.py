"""The layers of the list. Each takes a tuple and returns one; each forward is its equation.

What passes from layer to layer of a decoder or an encoder is (hidden, segments); of an encoder-decoder (hidden, segments, other hidden,
other segments): first the source's with the target's tokens beside it, then the target's with the source's encoding beside it. Behind
these stands, with relative positions, the table of the part that is under way.

hidden    [batch, seq, hidden]; token ids [batch, seq] before the embedding, logits [batch, seq, vocab] behind the head
segments  [batch, seq], numbers the documents of a packed sample from 1; 0 is padding, -n the prefix of document n

A constructor fills its own weights from (seed, layer number, name), so the numbers do not depend on rank, stage or build order.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import RELATIVE_BUCKETS, RELATIVE_DISTANCE, ModelConfig, is_gated

Passed = tuple[Tensor, ...]

LONGEST_PLAIN_ATTENTION = 1024
"""Tokens up to which training on a CPU multiplies the attention out: there the fused kernel's backward takes twice as long."""


class KeyValueCache:
    """What generation has computed: keys and values [batch, kv_heads, seq, head] of each block, and the source's encoding."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens seen, of an encoder-decoder in its decoder."""
        self.encoding: Tensor | None = None
        self._pairs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the new ones last; each [batch, kv_heads, seq so far, head]."""
        place = "own", layer_number
        if place in self._pairs:
            old_key, old_value = self._pairs[place]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self._pairs[place] = key, value
        return key, value

    def of_source(self, layer_number: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, which `make` computes the first time."""
        place = "source", layer_number
        if place not in self._pairs:
            self._pairs[place] = make()
        return self._pairs[place]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, some perhaps more than once.  [new batch]"""
        self._pairs = {place: (key[rows], value[rows]) for place, (key, value) in self._pairs.items()}
        self.encoding = self.encoding[rows] if self.encoding is not None else None


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
    segments = segments.abs()
    places = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.zeros_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def distances(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """From each query forward to each key, in tokens; the last query stands at the last key.  -> [queries, keys]"""
    places = torch.arange(num_keys, device=device)
    return places - places[num_keys - num_queries :, None]


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """True where query and key have one segment.  [batch, queries], [batch, keys] -> [batch, 1, queries, keys]"""
    return queries[:, None, :, None].abs() == keys[:, None, None, :].abs()


def rotary_waves(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles.  -> 2 x [sequence_length, head / 2]

    Su et al. 2021, arXiv 2104.09864. Stretched alike: Chen et al. 2023, arXiv 2306.15595. By a larger base: "NTK-aware", as in
    section 3.1 of YaRN, Peng et al. 2023, arXiv 2309.00071, whose own way, equations 17 to 25, leaves alone what turns 32 times or
    more within the old context, stretches what turns less than once, and sharpens attention. Llama 3.1 (arXiv 2407.21783) does the
    same between 4 turns and 1, on a straight line between the wavelengths' inverses, and does not sharpen.
    """
    size, theta, factor = config.head_size, config.rope_theta, config.rope_factor
    if config.rope_scaling == "ntk":
        theta *= factor ** (size / (size - 2))
    # 1 / theta^x, not theta^-x: the last bit, which counts at far positions, is then that of transformers.
    frequencies = 1.0 / theta ** (_count(0, size, 2) / size)
    sharpness = 1.0
    if config.rope_scaling == "linear":
        frequencies = frequencies / factor
    elif config.rope_scaling == "yarn":
        pair_that_turns = lambda turns: size * math.log(config.rope_original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
        first, last = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), size - 1)
        stretched = ((_count(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        frequencies = frequencies / factor * stretched + frequencies * (1 - stretched)
        sharpness = 0.1 * math.log(factor) + 1.0
    elif config.rope_scaling == "llama3":
        turns = config.rope_original_length * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    angles = _count(config.sequence_length)[:, None] * frequencies
    return angles.cos() * sharpness, angles.sin() * sharpness


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (i, i + head/2) of each head by its position's angle.  [batch, heads, seq, head] -> same

    Su et al. 2021, arXiv 2104.09864, with the halves paired as in the released Llama checkpoints for Hugging Face.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def alibi_slopes(num_heads: int) -> Tensor:
    """How fast each head's attention falls with distance.  -> [heads]

    Press et al. 2021, arXiv 2108.12409: 2^(-8 i / n); where n is no power of two, those of the power below, then every other one
    of the power above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = 8 * (_count(power) + 1) / power, 4 * (2 * _count(num_heads - power) + 1) / power
    return 2.0 ** -torch.cat(exponents)


def relative_buckets(distance: Tensor, both_sides: bool) -> Tensor:
    """The row of the table for each distance: near ones each have their own, far ones share, on a scale of logarithms.  [q, k] -> same

    Raffel et al. 2019, arXiv 1910.10683, section 2.1. An encoder has half of the rows for each side.
    """
    buckets = RELATIVE_BUCKETS // 2 if both_sides else RELATIVE_BUCKETS
    size = distance.abs() if both_sides else -distance.clamp(max=0)
    own = buckets // 2
    spread = math.log(RELATIVE_DISTANCE / own)
    shared = own + ((size.clamp(min=1).float() / own).log() / spread * (buckets - own)).long()
    bucket = torch.where(size < own, size, shared.clamp(max=buckets - 1))
    return bucket + buckets * (distance > 0) if both_sides else bucket


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale Q K^T + bias) V, causal where there is no mask.  [batch, heads, seq, head] -> same; keys may be grouped

    Vaswani et al. 2017, arXiv 1706.03762, equation 1: scale is 1 / sqrt(head) where none is given.
    """
    heads, seq = query.shape[1:3]
    if query.device.type == "cpu" and query.requires_grad and max(seq, key.shape[2]) <= LONGEST_PLAIN_ATTENTION:
        if heads != key.shape[1]:
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        allowed = torch.ones(seq, seq, dtype=torch.bool).tril() if mask is None else mask
        forbidden = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, -torch.inf)
        if bias is not None:
            forbidden = forbidden + bias
        weights = (query * (scale or query.shape[-1] ** -0.5) @ key.transpose(2, 3) + forbidden).softmax(dim=-1)
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


class TokenEmbedding(nn.Module):
    """Token ids to vectors; as the tied head, vectors to logits.  [batch, seq] -> [batch, seq, hidden] -> [batch, seq, vocab]

    All uses are calls of the module, because ZeRO-3 gathers a module's weights when it is called.
    With sinusoidal positions the vectors are scaled by sqrt(hidden): Vaswani et al. 2017, section 3.4. With relative ones it is what
    goes into the head that is scaled, by 1 / sqrt(hidden), as in T5.
    """

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.vocab_size, config.hidden_size), config.initializer_range, seed, "embedding")
        self.scale = math.sqrt(config.hidden_size) if config.positions == "sinusoidal" else None
        self.head_scale = config.hidden_size**-0.5 if config.positions == "relative" else None
        self.softcap = config.logit_softcap

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None, use: str = "tokens") -> Passed:
        if use == "head":
            hidden, *others = inputs
            hidden = hidden if self.head_scale is None else hidden * self.head_scale
            return softcapped(F.linear(hidden, self.weight), self.softcap), *others
        if use == "target":
            encoding, source_segments, tokens, segments = inputs[:4]
            return self.embed(tokens), segments, encoding, source_segments
        return self.embed(inputs[0]), *inputs[1:]

    def embed(self, tokens: Tensor) -> Tensor:
        hidden = F.embedding(tokens, self.weight)
        return hidden if self.scale is None else hidden * self.scale


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """Kept between -cap and cap.  Gemma 2, arXiv 2408.00118, section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class TokenTypes(nn.Module):
    """Adds the vector of each token's type.  (hidden, segments, types [batch, seq]) -> (hidden, segments)"""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.token_types, config.hidden_size), config.initializer_range, seed, "token types")

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments, types = inputs
        return hidden + F.embedding(types, self.weight), segments


class Positions(nn.Module):
    """Adds each position's vector, learned or sinusoidal (Vaswani et al. 2017, section 3.5), then drops out.

    The sines fill the first half of the columns, the cosines the second, as in the authors' tensor2tensor and in Marian.
    In an encoder the norm comes before the dropout, and both are EmbeddingNorm's.
    """

    def __init__(self, config: ModelConfig, seed: int, is_decoder: bool = True):
        super().__init__()
        self.restart = config.document_mask or config.architecture != "decoder"
        self.is_decoder = is_decoder
        self.dropout = 0.0 if config.architecture == "encoder" else config.dropout
        self.first_place = 0  # of the part of the sequence that is here, where ranks share one
        shape = config.sequence_length, config.hidden_size
        if config.positions == "learned":
            self.weight = fresh_weight(shape, config.initializer_range, seed, "positions" if is_decoder else "source positions")
        else:
            wavelengths = 10000.0 ** (_count(0, config.hidden_size, 2) / config.hidden_size)
            angles = _count(config.sequence_length)[:, None] / wavelengths
            self.register_buffer("weight", torch.cat((angles.sin(), angles.cos()), dim=-1), persistent=False)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments, *others = inputs
        cache = cache if self.is_decoder else None
        start = cache.length if cache else self.first_place
        here = slice(start, start + hidden.shape[1])
        restart = self.restart and cache is None  # a cache holds one document
        added = F.embedding(positions_in_documents(segments)[:, here], self.weight) if restart else self.weight[here]
        hidden = hidden + added.to(hidden.dtype)
        return F.dropout(hidden, self.dropout, self.training), segments, *others


class RelativePositions(nn.Module):
    """Sends T5's table of distances, [buckets, heads], along to every block of its stack, which all share it (arXiv 1910.10683)."""

    def __init__(self, config: ModelConfig, seed: int, is_decoder: bool):
        super().__init__()
        shape = RELATIVE_BUCKETS, config.num_attention_heads
        self.weight = fresh_weight(shape, config.initializer_range, seed, "relative positions", is_decoder)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        return *inputs, self.weight.clone()  # ZeRO-3 takes the weight itself away when the module is done


class EmbeddingNorm(nn.Module):
    """The norm of what goes into an encoder's first block, then dropout.  Devlin et al. 2018, arXiv 1810.04805."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = norm(config)
        self.dropout = config.dropout

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments = inputs
        return F.dropout(self.norm(hidden), self.dropout, self.training), segments


class Attention(nn.Module):
    """Self-attention with grouped keys, causal in a decoder.  [batch, seq, hidden] -> [batch, seq, hidden]

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2. Grouped keys: Ainslie et al. 2023, arXiv 2305.13245.
    `table` [buckets, heads] is that of relative positions; with it the scores are not divided by sqrt(head), as in T5.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int, is_decoder: bool = True, kind: str = ""):
        super().__init__()
        self.layer_number = layer_number
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.is_causal = is_decoder
        self.uses_segments = config.uses_segments
        self.has_prefix = config.prefix_attention
        self.window = config.sliding_window
        self.scale = 1.0 if config.positions == "relative" else None
        hidden, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_size
        keys = config.num_key_value_heads * config.head_size
        query_std = std * config.head_size**-0.5 if self.scale else std  # what the scores are not divided by
        output_std = std / math.sqrt(2 * config.num_layers)
        self.query = Linear(hidden, queries, config.biases, query_std, seed, layer_number, f"{kind}query")
        self.key = Linear(hidden, keys, config.biases, std, seed, layer_number, f"{kind}key")
        self.value = Linear(hidden, keys, config.biases, std, seed, layer_number, f"{kind}value")
        self.output = Linear(queries, hidden, config.biases, output_std, seed, layer_number, f"{kind}output")
        self.query_norm = RMSNorm(config.head_size, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_size, config.norm_epsilon) if config.qk_norm else None
        self.cos = self.sin = self.slopes = None
        if config.positions == "rotary":
            for name, waves in zip(("cos", "sin"), rotary_waves(config), strict=True):
                delattr(self, name)
                self.register_buffer(name, waves, persistent=False)
        elif config.positions == "alibi":
            del self.slopes
            self.register_buffer("slopes", alibi_slopes(config.num_attention_heads), persistent=False)

    def forward(self, hidden: Tensor, segments: Tensor, cache: KeyValueCache | None = None, table: Tensor | None = None) -> Tensor:
        query, key, value = self.queries(hidden), *self.keys_and_values(hidden)
        return self.output(self.mix(query, key, value, segments, cache, table).flatten(2))

    def queries(self, hidden: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, heads, head]"""
        query = self.query(hidden).unflatten(-1, (-1, self.head_size))
        return query if self.query_norm is None else self.query_norm(query)

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, seq, hidden] -> 2 x [batch, seq, kv_heads, head]"""
        key = self.key(hidden).unflatten(-1, (-1, self.head_size))
        key = key if self.key_norm is None else self.key_norm(key)
        return key, self.value(hidden).unflatten(-1, (-1, self.head_size))

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Tensor,
        cache: KeyValueCache | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """All that passes between tokens; no weights, and each group of heads for itself.  [batch, seq, heads, head] -> same"""
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        seq = query.shape[2]
        if self.cos is not None:
            start = cache.length if cache else 0
            # Rotation is relative, so positions need not restart inside documents.
            cos = self.cos[start : start + seq].to(query.dtype)
            sin = self.sin[start : start + seq].to(query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = self.remember(key, value, cache)
        mask = self.mask(segments, seq, key.shape[2], cache is not None)
        bias = self.bias(seq, key.shape[2], table, query)
        return attend(query, key, value, mask, self.dropout if self.training else 0.0, self.scale, bias).transpose(1, 2)

    def remember(self, key: Tensor, value: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
        """The keys and values that queries look at: behind the cache's, where there is one.  2 x [batch, kv_heads, seq, head]"""
        return (key, value) if cache is None else cache.append(self.layer_number, key, value)

    def mask(self, segments: Tensor, queries: int, keys: int, is_cached: bool) -> Tensor | None:
        """True where a query may look, [batch or 1, 1, queries, keys]; None: at all keys that stand not behind it."""
        has_segments = self.uses_segments and not is_cached  # a cache holds one document
        shows_prefix = self.has_prefix and keys == segments.shape[1]  # to later queries it stands behind
        if not (has_segments or shows_prefix) and self.window is None and queries in (1, keys):
            return None
        own = keys - queries  # the key at the first query's place: the last query stands at the last key
        window = 2 * keys if self.window is None else self.window
        behind, ahead = (window - 1, 0) if self.is_causal else (window // 2, window // 2)
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=segments.device).tril(own + ahead)
        if shows_prefix:
            allowed = allowed | (segments[:, None, None, :] < 0)
        allowed = allowed.triu(own - behind)  # last: what is far behind is not seen, a prefix or not
        return allowed & same_document(segments, segments) if has_segments else allowed

    def bias(self, queries: int, keys: int, table: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores for the distance of query and key.  -> [1, heads, queries, keys]"""
        if self.slopes is None and table is None:
            return None
        distance = distances(queries, keys, like.device)
        if table is None:
            return (self.slopes[:, None, None] * -distance.abs())[None].to(like.dtype)
        return F.embedding(relative_buckets(distance, not self.is_causal), table).permute(2, 0, 1)[None].to(like.dtype)


class CrossAttention(Attention):
    """A target's queries over its source's keys.  [batch, target, hidden], [batch, source, hidden] -> [batch, target, hidden]

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3. Positions have no part in it.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, segments: Tensor, encoding: Tensor, source_segments: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        make = lambda: tuple(x.transpose(1, 2) for x in self.keys_and_values(encoding))  # noqa: E731
        key, value = make() if cache is None else cache.of_source(self.layer_number, make)
        mask = same_document(segments, source_segments)
        mask = mask | ~mask.any(dim=-1, keepdim=True)  # padding looks anywhere: over nothing at all there is no softmax
        query = self.queries(hidden).transpose(1, 2)
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0, self.scale)
        return self.output(mixed.transpose(1, 2).flatten(2))


def activate(x: Tensor, activation: str) -> Tensor:
    """The nonlinearity of that name; of a gated one that of its gate."""
    if activation == "relu":
        return F.relu(x)
    if activation == "swiglu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


class FeedForward(nn.Module):
    """W2 act(W1 x); with a gate W2 (act(Wg x) * W1 x), Shazeer 2020, arXiv 2002.05202.  [batch, seq, hidden] -> same"""

    def __init__(self, config: ModelConfig, layer_number: int, seed: int):
        super().__init__()
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation = config.activation
        self.gate = Linear(hidden, inner, config.biases, std, seed, layer_number, "gate") if is_gated(config) else None
        self.up = Linear(hidden, inner, config.biases, std, seed, layer_number, "up")
        self.down = Linear(inner, hidden, config.biases, std / math.sqrt(2 * config.num_layers), seed, layer_number, "down")

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(activate(self.gate(hidden), self.activation) * self.up(hidden))
        return self.down(activate(self.up(hidden), self.activation))


class Block(nn.Module):
    """Attention, over a source too where there is one, then feed-forward, each added to the residual stream.  A tuple -> the same

    `recompute` keeps only the block's input for the backward pass and runs its forward again there.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int, recompute: bool = False, is_decoder: bool = True):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.dropout = config.dropout
        self.recompute = recompute
        self.is_decoder = is_decoder
        self.has_table = config.positions == "relative"
        self.attention_norm = norm(config)
        self.attention = Attention(config, layer_number, seed, is_decoder)
        if is_decoder and config.architecture == "encoder_decoder":
            self.cross_attention_norm = norm(config)
            self.cross_attention = CrossAttention(config, layer_number, seed, is_decoder, "cross ")
        else:
            self.cross_attention = None
        self.feed_forward_norm = norm(config)
        self.feed_forward = FeedForward(config, layer_number, seed)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.transform, *inputs, use_reentrant=False), *inputs[1:]
        return self.transform(*inputs, cache=cache if self.is_decoder else None), *inputs[1:]

    def transform(self, hidden: Tensor, segments: Tensor, *others: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]"""
        table = others[-1] if self.has_table else None
        hidden = self.add(hidden, self.attention_norm, lambda x: self.attention(x, segments, cache, table))
        if self.cross_attention is not None:
            hidden = self.add(hidden, self.cross_attention_norm, lambda x: self.cross_attention(x, segments, *others[:2], cache))
        return self.add(hidden, self.feed_forward_norm, self.feed_forward)

    def add(self, hidden: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """x + part(norm(x)), or, with the norm behind, norm(x + part(x))."""
        if self.norm_first:
            return hidden + F.dropout(part(norm(hidden)), self.dropout, self.training)
        return norm(hidden + F.dropout(part(hidden), self.dropout, self.training))


class FinalNorm(nn.Module):
    """The norm behind the last block of a pre-norm stack."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = norm(config)

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, *others = inputs
        return self.norm(hidden), *others


class Classifier(nn.Module):
    """Logits of a sample's classes from its first token, put behind the tuple.  (hidden, segments) -> (.., .., [batch, classes])

    Devlin et al. 2018, arXiv 1810.04805: a pooler, W tanh, and a linear layer.
    """

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        hidden, std = config.hidden_size, config.initializer_range
        self.pooler = Linear(hidden, hidden, True, std, seed, "pooler")
        self.classes = Linear(hidden, config.num_classes, True, std, seed, "classes")
        self.dropout = config.dropout

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, segments = inputs
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return hidden, segments, self.classes(F.dropout(pooled, self.dropout, self.training))


class TokenTransform(nn.Module):
    """What an encoder puts before its head: norm(act(W x)).  Devlin et al. 2018, as in the authors' code."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.biases, config.initializer_range, seed, "token transform")
        self.norm = norm(config)
        self.activation = config.activation

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, *others = inputs
        return self.norm(activate(self.dense(hidden), self.activation)), *others


class Head(nn.Module):
    """Vectors to logits with weights of their own.  [batch, seq, hidden] -> [batch, seq, vocab]"""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.weight = fresh_weight((config.vocab_size, config.hidden_size), config.initializer_range, seed, "head")
        self.softcap = config.logit_softcap

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        hidden, *others = inputs
        return softcapped(F.linear(hidden, self.weight), self.softcap), *others


class HeadBias(nn.Module):
    """Adds a number of each vocabulary entry to its logits.  [batch, seq, vocab] -> same"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, inputs: Passed, cache: KeyValueCache | None = None) -> Passed:
        logits, *others = inputs
        return logits + self.weight, *others
