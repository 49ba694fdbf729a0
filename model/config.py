"""What a network is, in numbers: its configuration, the sizes people call by name, its parameter and FLOP counts."""

import dataclasses
import difflib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Every combination is one list of layers (see transformer.py)."""

    vocab_size: int = 4096
    """Rows of the embedding: the largest token id + 1, or more."""
    sequence_length: int = 256
    """Longest context, tokens."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks (attention and feed-forward)."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads, a divisor of num_attention_heads (default: as many; arXiv 2305.13245)."""
    head_size: int | None = None
    """Width of a head (default: hidden_size / num_attention_heads)."""
    intermediate_size: int | None = None
    """Width inside the feed-forward (default: 4 x hidden_size)."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467)."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise what enters attention and feed-forward (pre), or the sum behind them (post)."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside every norm."""
    positions: Literal["learned", "sinusoidal", "rotary"] = "rotary"
    """A learned table, the fixed waves of arXiv 1706.03762 section 3.5, or rotation of queries and keys (arXiv 2104.09864)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "swiglu"
    """gelu_tanh is GPT-2's approximation; swiglu has a gate beside it (arXiv 2002.05202)."""
    biases: bool = False
    """Biases in the linear layers and LayerNorms (the head never has one)."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, as in Qwen3."""
    tie_embeddings: bool = True
    """The head uses the embedding's weight."""
    dropout: float = 0.0
    """Probability of dropping: embeddings, attention weights, and what attention and feed-forward add."""
    document_mask: bool = False
    """Attention and positions stay inside a document of a packed sample; off: the fast causal path."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights (GPT-2's; what writes to the residual stream gets 1/sqrt(2 num_layers) of it)."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "sequence_length", "hidden_size", "num_layers", "num_attention_heads")
        derived = ("num_key_value_heads", "head_size", "intermediate_size")
        complaints = [
            f"model.{name} is {getattr(self, name)}; it must be at least 1."
            for name in sizes + derived
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if complaints:
            raise ValueError("\n".join(complaints))
        if self.head_size is None and self.hidden_size % self.num_attention_heads:
            heads = min(
                (n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0),
                key=lambda n: abs(n - self.num_attention_heads),
            )
            complaints.append(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads "
                f"{self.num_attention_heads}. Nearest number of heads: {heads}; or set model.head_size."
            )
        defaults = self.num_attention_heads, max(1, self.hidden_size // self.num_attention_heads), 4 * self.hidden_size
        for name, value in zip(derived, defaults, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        assert self.num_key_value_heads and self.head_size and self.intermediate_size
        if self.positions == "rotary" and self.head_size % 2 and not complaints:
            complaints.append(f"model.head_size {self.head_size} is odd; rotary positions turn pairs. Nearest: {self.head_size + 1}.")
        if self.num_attention_heads % self.num_key_value_heads:
            complaints.append(
                f"model.num_key_value_heads {self.num_key_value_heads} does not divide "
                f"model.num_attention_heads {self.num_attention_heads}."
            )
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            complaints.append(f"model.hidden_size {self.hidden_size} is odd; sinusoidal waves are pairs. Nearest: {self.hidden_size + 1}.")
        for name in ("norm_epsilon", "rope_theta", "initializer_range"):
            if not getattr(self, name) > 0:
                complaints.append(f"model.{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            complaints.append(f"model.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if complaints:
            raise ValueError("\n".join(complaints))


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


def _shape(hidden_size: int, num_layers: int, num_attention_heads: int, intermediate_size: int | None = None, **more: object) -> dict:
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size or 4 * hidden_size,
    } | dict(more)


# GPT-2: Radford et al. 2019, table 2, and the released checkpoints. GPT-3: Brown et al. 2020 (arXiv 2005.14165), table 2.1;
# its alternating sparse attention is dense here, which changes no parameter. Llama: arXiv 2302.13971, 2307.09288, 2407.21783
# and the released config.json files; llama-160m is JackFram's, llama-1.1b TinyLlama's (arXiv 2401.02385).
SIZES: dict[str, dict] = {
    "gpt2-124m": _GPT2 | _shape(768, 12, 12),
    "gpt2-355m": _GPT2 | _shape(1024, 24, 16),
    "gpt2-774m": _GPT2 | _shape(1280, 36, 20),
    "gpt2-1.5b": _GPT2 | _shape(1600, 48, 25),
    "gpt3-175b": _GPT2 | _shape(12288, 96, 96, sequence_length=2048),
    "llama-160m": _LLAMA | _shape(768, 12, 12, 3072, vocab_size=32000, sequence_length=2048),
    "llama-1.1b": _LLAMA | _shape(2048, 22, 32, 5632, vocab_size=32000, sequence_length=2048, num_key_value_heads=4),
    "llama2-7b": _LLAMA | _shape(4096, 32, 32, 11008, vocab_size=32000, sequence_length=4096),
    "llama2-13b": _LLAMA | _shape(5120, 40, 40, 13824, vocab_size=32000, sequence_length=4096),
    "llama2-70b": _LLAMA | _shape(8192, 80, 64, 28672, vocab_size=32000, sequence_length=4096, num_key_value_heads=8),
    "llama3-1b": _LLAMA3 | _shape(2048, 16, 32, 8192, tie_embeddings=True),
    "llama3-8b": _LLAMA3 | _shape(4096, 32, 32, 14336),
    "llama3-70b": _LLAMA3 | _shape(8192, 80, 64, 28672),
}


def named_size(name: str) -> dict:
    """The settings of a named size; raises ValueError with the nearest name for an unknown one."""
    if name not in SIZES:
        nearest = difflib.get_close_matches(name, SIZES, n=1, cutoff=0)[0]
        raise ValueError(f'Unknown size "{name}". Did you mean "{nearest}"? There are: {", ".join(SIZES)}.')
    return dict(SIZES[name])


def _inner_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Width of all queries, of all keys, and inside the feed-forward."""
    assert config.num_key_value_heads and config.head_size and config.intermediate_size
    return config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size, config.intermediate_size


def _matrix_parameters_per_block(config: ModelConfig) -> int:
    queries, keys, inner = _inner_widths(config)
    feed_forward = 3 if config.activation == "swiglu" else 2
    return config.hidden_size * (2 * queries + 2 * keys + feed_forward * inner)


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the built module, tied weights once."""
    queries, keys, inner = _inner_widths(config)
    has_bias = config.norm == "layernorm" and config.biases
    norm = config.hidden_size * (2 if has_bias else 1)
    block = _matrix_parameters_per_block(config) + 2 * norm
    if config.biases:
        block += queries + 2 * keys + config.hidden_size
        block += inner * (2 if config.activation == "swiglu" else 1) + config.hidden_size
    if config.qk_norm:
        block += 2 * queries // config.num_attention_heads
    embedding = config.vocab_size * config.hidden_size
    total = embedding * (1 if config.tie_embeddings else 2) + config.num_layers * block
    if config.positions == "learned":
        total += config.sequence_length * config.hidden_size
    if config.norm_position == "pre":
        total += norm
    return total


def flops_per_token(config: ModelConfig, sequence_length: int | None = None, causal: bool = True) -> float:
    """Floating-point operations of one training token: forward and backward (twice the forward), no recomputation.

    A multiply-add is two. Counted: every matrix product, the head among them, and the two products of attention over the
    (sequence_length + 1) / 2 keys that a token sees on average when `causal`, over all of them when not.
    """
    length = sequence_length or config.sequence_length
    keys_seen = (length + 1) / 2 if causal else length
    matrices = config.num_layers * _matrix_parameters_per_block(config) + config.vocab_size * config.hidden_size
    attention = config.num_layers * 2 * _inner_widths(config)[0] * keys_seen
    return 3 * 2 * (matrices + attention)
