"""The configuration of a network, the named sizes, and its parameter and FLOP counts."""

import dataclasses
import difflib
import functools
import operator
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:

    class DerivedInt:
        """A field that may be given as None and is always read as a number: __post_init__ derives it from the other fields."""

        def __get__(self, instance: object, owner: type | None = None) -> int: ...
        def __set__(self, instance: object, value: int | None) -> None: ...

else:
    DerivedInt = int | None

Part = Literal["encoder", "decoder"]
"""A stack of blocks. The blocks of a decoder are causal; an encoder-decoder has both parts."""

_DERIVED: Any = None  # the default of a DerivedInt, in a type that mypy accepts
_BOUNDS = {Gt: (operator.gt, "above"), Ge: (operator.ge, "at least"), Lt: (operator.lt, "below")}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a network. Every combination of values is one list of layers (see transformer.py)."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """Which tokens attend to which. decoder: each token to earlier ones (GPT, Llama). encoder: each token to its whole document
    (BERT). encoder_decoder: an encoder for a source and a decoder for its target (the original Transformer, T5)."""
    vocab_size: Annotated[int, Ge(1)] = 4096
    """Rows of the embedding: at least the largest token id + 1."""
    sequence_length: Annotated[int, Ge(1)] = 256
    """Longest context in tokens. An encoder-decoder has it for its source and again for its target."""
    hidden_size: Annotated[int, Ge(1)] = 256
    """Width of the residual stream."""
    num_layers: Annotated[int, Ge(1)] = 4
    """Number of blocks (attention and feed-forward); in an encoder-decoder, of its encoder."""
    num_decoder_layers: Annotated[int | None, Ge(1)] = None
    """Number of blocks of an encoder-decoder's decoder (default: num_layers)."""
    num_attention_heads: Annotated[int, Ge(1)] = 4
    """Number of query heads."""
    num_key_value_heads: Annotated[DerivedInt, Ge(1)] = _DERIVED
    """Number of key/value heads, a divisor of num_attention_heads (default: num_attention_heads; arXiv 2305.13245)."""
    head_size: Annotated[DerivedInt, Ge(1)] = _DERIVED
    """Width of a head (default: hidden_size / num_attention_heads)."""
    intermediate_size: Annotated[DerivedInt, Ge(1)] = _DERIVED
    """Width inside the feed-forward (default: 4 x hidden_size)."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467)."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: normalise the input of attention and feed-forward. post: normalise the sum after them."""
    norm_epsilon: Annotated[float, Gt(0)] = 1e-5
    """Number added to the variance inside every norm."""
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "relative"] = "rotary"
    """learned: a vector for each position. sinusoidal: fixed sines and cosines (arXiv 1706.03762, section 3.5). rotary: rotation of
    queries and keys (arXiv 2104.09864). alibi: a penalty on distance (arXiv 2108.12409). relative: a learned number for each head and
    bucket of distances (T5, arXiv 1910.10683)."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """Scaling of the rotary wavelengths for a longer context. linear: all by the same factor (arXiv 2306.15595). ntk: by a larger base.
    yarn: the long wavelengths only (arXiv 2309.00071). llama3: as in Llama 3.1."""
    rope_factor: Annotated[float, Ge(1)] = 1.0
    """Scaling factor: new context / original context."""
    rope_original_length: Annotated[int | None, Ge(1)] = None
    """Original context in tokens; required by yarn and llama3."""
    sliding_window: Annotated[int | None, Ge(1)] = None
    """Number of keys that a token attends to, its own included (default: all). An encoder has half of them on each side
    (arXiv 2004.05150)."""
    prefix_attention: bool = False
    """True if the tokens of a decoder's prefix attend to one another: a prefix language model (arXiv 1910.10683, section 3.2.1)."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"] = "swiglu"
    """Nonlinearity of the feed-forward. gelu_tanh is GPT-2's approximation; swiglu and geglu (with gelu_tanh) are gated
    (arXiv 2002.05202)."""
    biases: bool = False
    """True if linear layers and LayerNorms have biases (the head never has one)."""
    qk_norm: bool = False
    """True if an RMSNorm is applied to each head's queries and keys, as in Qwen3."""
    tie_embeddings: bool = True
    """True if the head uses the embedding's weight."""
    logit_softcap: Annotated[float | None, Gt(0)] = None
    """Bound of the logits: cap x tanh(logits / cap) (arXiv 2408.00118; default: no bound)."""
    token_types: Annotated[int, Ge(0)] = 0
    """Number of token types of an encoder, each with a vector added to the embeddings; BERT has 2, for two sentences (default: 0, none)."""
    num_classes: Annotated[int, Ge(0)] = 0
    """Number of classes that an encoder predicts for a whole sample from its first token; 2 for next-sentence prediction
    (default: 0, none)."""
    token_head: bool = True
    """True if an encoder predicts its masked tokens; false for classes only."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout probability for embeddings, attention weights, and the outputs of attention and feed-forward."""
    document_mask: bool = False
    """True if attention and positions stay inside each document of a packed sample; false for the fast causal path. An encoder-decoder
    always keeps its pairs apart."""
    initializer_range: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of initial weights, as in GPT-2; layers that write to the residual stream have 1/sqrt(2 num_layers) of it."""

    def __post_init__(self) -> None:
        complaints = _range_complaints(self)
        if any(isinstance(value, int) and value < 1 for value in (self.hidden_size, self.num_attention_heads, self.num_key_value_heads)):
            raise ValueError("\n".join(complaints))  # the checks below divide by these
        has_head_size = self.head_size is not None or self.hidden_size % self.num_attention_heads == 0
        if not has_head_size:
            heads = min(
                (n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0),
                key=lambda n: abs(n - self.num_attention_heads),
            )
            complaints.append(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads "
                f"{self.num_attention_heads}. Nearest number of heads: {heads}; or set model.head_size."
            )
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "head_size": max(1, self.hidden_size // self.num_attention_heads),
            "intermediate_size": 4 * self.hidden_size,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.architecture == "encoder_decoder" and self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        if self.positions == "rotary" and self.head_size % 2 and has_head_size:
            complaints.append(
                f"model.head_size {self.head_size} is odd; rotary positions need an even number. Nearest: {self.head_size + 1}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            complaints.append(
                f"model.num_key_value_heads {self.num_key_value_heads} does not divide "
                f"model.num_attention_heads {self.num_attention_heads}."
            )
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            complaints.append(
                f"model.hidden_size {self.hidden_size} is odd; sinusoidal positions need an even number. Nearest: {self.hidden_size + 1}."
            )
        complaints += self._rope_complaints() + self._architecture_complaints()
        if complaints:
            raise ValueError("\n".join(complaints))

    def _rope_complaints(self) -> list[str]:
        complaints = []
        if self.rope_scaling not in ("yarn", "llama3") and self.rope_original_length is not None:
            complaints.append(
                f"model.rope_original_length {self.rope_original_length} has no effect with model.rope_scaling "
                f'"{self.rope_scaling}"; only yarn and llama3 use it.'
            )
        if self.rope_scaling == "none":
            if self.rope_factor != 1:
                complaints.append(f"model.rope_factor {self.rope_factor:g} has no effect without model.rope_scaling.")
            return complaints
        if self.positions != "rotary":
            complaints.append(f'model.rope_scaling "{self.rope_scaling}" needs model.positions "rotary", not "{self.positions}".')
        if self.rope_scaling == "ntk" and self.head_size == 2:
            complaints.append('model.rope_scaling "ntk" has no effect for model.head_size 2; use 4 or more.')
        if self.rope_scaling in ("yarn", "llama3") and self.rope_original_length is None:
            complaints.append(f'model.rope_scaling "{self.rope_scaling}" needs model.rope_original_length, the original context in tokens.')
        return complaints

    def _architecture_complaints(self) -> list[str]:
        """Return a message for each option that only another architecture has."""
        owners: dict[str, dict[str, object]] = {
            "encoder": {"token_types": 0, "num_classes": 0, "token_head": True},
            "decoder": {"prefix_attention": False},
            "encoder_decoder": {"num_decoder_layers": None},
        }
        complaints = [
            f'model.{name} {str(getattr(self, name)).lower()} is for architecture "{owner}"; this is "{self.architecture}".'
            for owner, defaults in owners.items()
            for name, default in defaults.items()
            if owner != self.architecture and getattr(self, name) != default
        ]
        if self.positions == "relative" and self.architecture != "encoder_decoder":
            complaints.append(f'model.positions "relative" is for architecture "encoder_decoder"; this is "{self.architecture}".')
        if self.num_classes == 1:
            complaints.append("model.num_classes is 1; it must be 0 (none) or at least 2.")
        if not self.token_head and not self.num_classes:
            complaints.append("model.token_head is false and model.num_classes 0: the network would have no output. Set one of them.")
        return complaints

    @property
    def uses_segments(self) -> bool:
        """True if attention depends on the segments; otherwise the fast causal path is taken."""
        return self.document_mask or self.prefix_attention or self.architecture != "decoder"

    @property
    def total_blocks(self) -> int:
        """Number of blocks of encoder and decoder together."""
        return self.num_layers + (self.num_decoder_layers or 0)


@functools.cache
def _bounds() -> dict[str, list[Ge | Gt | Lt]]:
    """Return the bounds of each field of ModelConfig that has any, from its annotation."""
    hints = typing.get_type_hints(ModelConfig, include_extras=True)
    return {name: list(hint.__metadata__) for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _range_complaints(config: ModelConfig) -> list[str]:
    """Return a message for each field outside its range. None is always allowed."""
    complaints = []
    for name, bounds in _bounds().items():
        value = getattr(config, name)
        limits = [(*_BOUNDS[type(bound)], *dataclasses.astuple(bound)) for bound in bounds]
        if value is not None and not all(compare(value, limit) for compare, _, limit in limits):
            allowed = " and ".join(f"{word} {limit}" for _, word, limit in limits)
            complaints.append(f"model.{name} is {value}; it must be {allowed}.")
    return complaints


_GPT2 = {
    "vocab_size": 50257,
    "sequence_length": 1024,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu_tanh",
    "biases": True,
    "tie_embeddings": True,
}
_LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "biases": False, "tie_embeddings": False}
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "sequence_length": 8192, "rope_theta": 500000.0, "num_key_value_heads": 8}
_LLAMA31 = _LLAMA3 | {"sequence_length": 131072, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 8192}
_QWEN3 = _LLAMA | {
    "vocab_size": 151936,
    "sequence_length": 40960,
    "rope_theta": 1000000.0,
    "num_key_value_heads": 8,
    "head_size": 128,
    "qk_norm": True,
    "norm_epsilon": 1e-6,
}
_BERT = {
    "architecture": "encoder",
    "vocab_size": 30522,
    "sequence_length": 512,
    "norm": "layernorm",
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "positions": "learned",
    "activation": "gelu",
    "biases": True,
    "token_types": 2,
    "dropout": 0.1,
}
_MODERN_BERT = {
    "architecture": "encoder",
    "vocab_size": 50368,
    "sequence_length": 8192,
    "norm": "layernorm",
    "positions": "rotary",
    "rope_theta": 160000.0,
    "activation": "geglu",
    "biases": False,
}
_TRANSFORMER = {
    "architecture": "encoder_decoder",
    "vocab_size": 37000,
    "sequence_length": 512,
    "norm": "layernorm",
    "norm_position": "post",
    "positions": "sinusoidal",
    "activation": "relu",
    "biases": True,
}
_T5 = {
    "architecture": "encoder_decoder",
    "vocab_size": 32128,
    "sequence_length": 512,
    "norm": "rmsnorm",
    "norm_epsilon": 1e-6,
    "positions": "relative",
    "activation": "geglu",
    "biases": False,
    "tie_embeddings": False,
    "head_size": 64,
}


def _shape(hidden_size: int, num_layers: int, num_attention_heads: int, intermediate_size: int | None = None, **more: object) -> dict:
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size or 4 * hidden_size,
    } | dict(more)


# Sources of the sizes.
# GPT-2: Radford et al. 2019, table 2, and the released checkpoints.
# GPT-3: Brown et al. 2020 (arXiv 2005.14165), table 2.1. Its alternating sparse attention is dense here, which changes no parameter.
# The paper's rows for 1.3B and 13B are inconsistent (24 heads of 128 in 2048; width 5140); here they are consistent.
# Llama: arXiv 2302.13971, 2307.09288, 2407.21783 and the released config.json files; llama-160m is JackFram's, llama-1.1b is
# TinyLlama's (arXiv 2401.02385). Qwen3: arXiv 2505.09388.
# BERT: Devlin et al. 2018 (arXiv 1810.04805), uncased. ModernBERT: Warner et al. 2024 (arXiv 2412.13663), with global attention only.
# Transformer: Vaswani et al. 2017 (arXiv 1706.03762), table 3.
# T5: version 1.1, of Shazeer 2020 (arXiv 2002.05202) and the released config.json files.
SIZES: dict[str, dict] = {
    "gpt2-124m": _GPT2 | _shape(768, 12, 12),
    "gpt2-355m": _GPT2 | _shape(1024, 24, 16),
    "gpt2-774m": _GPT2 | _shape(1280, 36, 20),
    "gpt2-1.5b": _GPT2 | _shape(1600, 48, 25),
    "gpt3-125m": _GPT2 | _shape(768, 12, 12, sequence_length=2048),
    "gpt3-350m": _GPT2 | _shape(1024, 24, 16, sequence_length=2048),
    "gpt3-760m": _GPT2 | _shape(1536, 24, 16, sequence_length=2048),
    "gpt3-1.3b": _GPT2 | _shape(2048, 24, 16, sequence_length=2048),
    "gpt3-2.7b": _GPT2 | _shape(2560, 32, 32, sequence_length=2048),
    "gpt3-6.7b": _GPT2 | _shape(4096, 32, 32, sequence_length=2048),
    "gpt3-13b": _GPT2 | _shape(5120, 40, 40, sequence_length=2048),
    "gpt3-175b": _GPT2 | _shape(12288, 96, 96, sequence_length=2048),
    "llama-160m": _LLAMA | _shape(768, 12, 12, 3072, vocab_size=32000, sequence_length=2048),
    "llama-1.1b": _LLAMA | _shape(2048, 22, 32, 5632, vocab_size=32000, sequence_length=2048, num_key_value_heads=4),
    "llama2-7b": _LLAMA | _shape(4096, 32, 32, 11008, vocab_size=32000, sequence_length=4096),
    "llama2-13b": _LLAMA | _shape(5120, 40, 40, 13824, vocab_size=32000, sequence_length=4096),
    "llama2-70b": _LLAMA | _shape(8192, 80, 64, 28672, vocab_size=32000, sequence_length=4096, num_key_value_heads=8),
    "llama3-1b": _LLAMA3 | _shape(2048, 16, 32, 8192, tie_embeddings=True),
    "llama3-8b": _LLAMA3 | _shape(4096, 32, 32, 14336),
    "llama3-70b": _LLAMA3 | _shape(8192, 80, 64, 28672),
    "llama3.1-8b": _LLAMA31 | _shape(4096, 32, 32, 14336),
    "llama3.1-70b": _LLAMA31 | _shape(8192, 80, 64, 28672),
    "qwen3-0.6b": _QWEN3 | _shape(1024, 28, 16, 3072, tie_embeddings=True),
    "qwen3-1.7b": _QWEN3 | _shape(2048, 28, 16, 6144, tie_embeddings=True),
    "qwen3-4b": _QWEN3 | _shape(2560, 36, 32, 9728, tie_embeddings=True),
    "qwen3-8b": _QWEN3 | _shape(4096, 36, 32, 12288),
    "qwen3-14b": _QWEN3 | _shape(5120, 40, 40, 17408),
    "qwen3-32b": _QWEN3 | _shape(5120, 64, 64, 25600),
    "bert-base": _BERT | _shape(768, 12, 12),
    "bert-large": _BERT | _shape(1024, 24, 16),
    "modern-bert-base": _MODERN_BERT | _shape(768, 22, 12, 1152),
    "transformer-base": _TRANSFORMER | _shape(512, 6, 8, dropout=0.1),
    "transformer-big": _TRANSFORMER | _shape(1024, 6, 16, dropout=0.3),
    "t5-small": _T5 | _shape(512, 8, 6, 1024),
    "t5-base": _T5 | _shape(768, 12, 12, 2048),
    "t5-large": _T5 | _shape(1024, 24, 16, 2816),
}

RELATIVE_BUCKETS = 32
"""Rows of T5's table of distances."""
RELATIVE_DISTANCE = 128
"""Distance in tokens from which on all distances share one row."""


def named_size(name: str) -> dict:
    """Return the settings of a named size. Raises ValueError with the nearest name for an unknown one."""
    if name not in SIZES:
        nearest = difflib.get_close_matches(name, SIZES, n=1, cutoff=0)[0]
        raise ValueError(f'Unknown size "{name}". Did you mean "{nearest}"? There are: {", ".join(SIZES)}.')
    return dict(SIZES[name])


def _inner_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Return the width of all queries, of all keys, and inside the feed-forward."""
    return config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size, config.intermediate_size


def _attention_matrices(config: ModelConfig) -> int:
    queries, keys, _ = _inner_widths(config)
    return config.hidden_size * (2 * queries + 2 * keys)


def _feed_forward_matrices(config: ModelConfig) -> int:
    return config.hidden_size * _inner_widths(config)[2] * (3 if is_gated(config) else 2)


def is_gated(config: ModelConfig) -> bool:
    """Return True if the feed-forward has a gate."""
    return config.activation in ("swiglu", "geglu")


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters; tied weights count once."""
    hidden, (queries, keys, inner) = config.hidden_size, _inner_widths(config)
    norm = hidden * (2 if config.norm == "layernorm" and config.biases else 1)
    attention = _attention_matrices(config) + norm + (2 * queries // config.num_attention_heads if config.qk_norm else 0)
    feed_forward = _feed_forward_matrices(config) + norm
    if config.biases:
        attention += queries + 2 * keys + hidden
        feed_forward += inner * (2 if is_gated(config) else 1) + hidden
    cross_blocks = config.num_decoder_layers or 0
    total = config.total_blocks * (attention + feed_forward) + cross_blocks * attention
    stacks = 2 if config.architecture == "encoder_decoder" else 1
    if config.positions == "learned":
        total += stacks * config.sequence_length * hidden
    if config.positions == "relative":
        total += stacks * RELATIVE_BUCKETS * config.num_attention_heads
    if config.norm_position == "pre":
        total += stacks * norm
    if config.architecture == "encoder":
        total += norm + config.token_types * hidden
        if config.num_classes:
            total += hidden * hidden + hidden + config.num_classes * (hidden + 1)
        if config.token_head:
            total += hidden * hidden + (hidden if config.biases else 0) + norm + config.vocab_size
    embeddings = 1 if config.tie_embeddings or not config.token_head else 2
    return total + embeddings * config.vocab_size * hidden


def flops_per_token(
    config: ModelConfig, sequence_length: int | None = None, causal: bool | None = None, target_length: int | None = None
) -> float:
    """Return the floating-point operations for training on one token: forward pass and backward pass (twice the forward).

    A multiply-add counts as two; recomputation does not count. Every matrix product counts, the head's included, and the two products
    of attention over the mean number of keys a token attends to: (sequence_length + 1) / 2 if attention is `causal` (default: in a
    decoder), otherwise all, and at most a sliding window. For an encoder-decoder the result is the mean over all positions of a source
    of `sequence_length` tokens and a target of `target_length` tokens (default: sequence_length).
    """
    source = sequence_length or config.sequence_length
    if config.architecture == "encoder_decoder":
        target = target_length or source
        encoder = source * _stack_flops(config, config.num_layers, _keys_seen(config, source, bool(causal)))
        decoder = target * _stack_flops(config, config.num_decoder_layers or 0, _keys_seen(config, target, causal is not False))
        queries, keys, _ = _inner_widths(config)
        target_flops = target * (2 * config.hidden_size * queries + 2 * queries * source)
        cross = (config.num_decoder_layers or 0) * (target_flops + source * 2 * config.hidden_size * keys)
        return 3 * 2 * (encoder + decoder + cross + target * config.vocab_size * config.hidden_size) / (source + target)
    causal = config.architecture == "decoder" if causal is None else causal
    total = _stack_flops(config, config.num_layers, _keys_seen(config, source, causal))
    if config.token_head:
        total += config.vocab_size * config.hidden_size
        total += config.hidden_size**2 if config.architecture == "encoder" else 0
    return 3 * 2 * total


def _keys_seen(config: ModelConfig, length: int, causal: bool) -> float:
    """Return the mean number of keys that a token attends to in a sequence of `length` tokens."""
    window = config.sliding_window
    if window is None or window >= length:
        return (length + 1) / 2 if causal else length
    if causal:
        return window - window * (window - 1) / 2 / length
    side = window // 2
    return 2 * side + 1 - side * (side + 1) / length


def _stack_flops(config: ModelConfig, num_blocks: int, keys_seen: float) -> float:
    """Return the multiply-adds of one token in `num_blocks` blocks, without cross-attention."""
    matrices = _attention_matrices(config) + _feed_forward_matrices(config)
    return num_blocks * (matrices + 2 * _inner_widths(config)[0] * keys_seen)
