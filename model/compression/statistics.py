"""Statistics of the inputs of a block's linear layers over all calibration tokens; calibrated methods see no other data."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model.attention import AttentionWeights
from model.cache import KeyValueCache
from model.config import ModelConfig
from model.layers import Stream
from model.transformer import Block, first_uses
from model.walk import Step

_ROWS = 512  # rows of a second moment that are updated at a time


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs [tokens, in] of linear layers, over all calibration tokens."""

    tokens: int
    """Number of tokens."""
    second_moment: Tensor
    """Sum of x x^T: half the Hessian of the layer's squared output error.  [in, in] float32"""
    magnitude: Tensor
    """Mean of |x|.  [in] float32"""
    largest: Tensor
    """Largest |x|.  [in] float32"""

    @property
    def norms(self) -> Tensor:
        """Norm of each input over the tokens, ||x||_2.  [in]"""
        return self.second_moment.diagonal().sqrt()

    def divided_by(self, scales: Tensor) -> "InputStatistics":
        """Return the statistics of the inputs divided by their scales.  scales [in] > 0"""
        moment = self.second_moment / scales / scales[:, None]
        return InputStatistics(self.tokens, moment, self.magnitude / scales, self.largest / scales)


def output_error(change: Tensor, weight: Tensor, statistics: InputStatistics) -> float:
    """Return ||change X|| / ||weight X|| (Frobenius norms), the relative error of a layer's outputs.  [out, in], [out, in]"""
    squared = lambda matrix: ((matrix @ statistics.second_moment) * matrix).sum(dtype=torch.float64).clamp(min=0).item()  # noqa: E731
    whole = squared(weight)
    return (squared(change) / whole) ** 0.5 if whole else 0.0


@dataclasses.dataclass(frozen=True)
class Group:
    """Linear layers of a block that read the same input."""

    linears: tuple[str, ...]
    """Names of the layers in the block."""
    producer: str | None
    """Norm or linear layer that produces the inputs entry by entry, so that its weights can absorb positive scales; None: none."""


def groups_of(block: Block) -> list[Group]:
    """Return the groups of a block in the order in which the block runs them."""
    groups = _attention_groups("attention", block.attention, "attention_norm" if block.norm_first else None)
    if block.cross_attention is not None:
        groups += _attention_groups("cross_attention", block.cross_attention, "cross_attention_norm" if block.norm_first else None)
    inner, is_gated = block.feed_forward, block.feed_forward.gate is not None
    groups.append(
        Group(
            ("feed_forward.gate", "feed_forward.up") if is_gated else ("feed_forward.up",),
            "feed_forward_norm" if block.norm_first else None,
        )
    )
    groups.append(Group(("feed_forward.down",), "feed_forward.up" if is_gated or inner.activation == "relu" else None))
    return groups


def _attention_groups(name: str, attention: AttentionWeights, norm: str | None) -> list[Group]:
    own_heads = attention.query.weight.shape[0] == attention.value.weight.shape[0]  # false if several heads share a value
    output = Group((f"{name}.output",), f"{name}.value" if own_heads else None)
    if name == "cross_attention":
        return [Group((f"{name}.query",), norm), Group((f"{name}.key", f"{name}.value"), None), output]
    return [Group((f"{name}.query", f"{name}.key", f"{name}.value"), norm), output]


class Gatherer:
    """Collects statistics of the inputs of a block's groups while samples pass through the block.

    with Gatherer(block) as gatherer:
        for sample in samples:
            gatherer.counted = ...   # which tokens count
            step(sample)
    """

    def __init__(self, block: Block) -> None:
        self._groups = groups_of(block)
        self._block = block
        self._sums: dict[str, Sums] = {}
        self._hooks: list = []
        self.counted: Tensor | None = None
        """[batch, seq] True for tokens that count; None: all."""
        self.counted_in_source: Tensor | None = None
        """The same for the source tokens, which the keys and values of cross-attention read."""

    def __enter__(self) -> "Gatherer":
        for group in self._groups:
            first = self._block.get_submodule(group.linears[0])
            self._hooks.append(first.register_forward_pre_hook(self._watch(group.linears[0])))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        """Return a hook that adds the inputs of the group whose first linear layer has this name."""

        def add_inputs(module: nn.Module, inputs: tuple[Tensor]) -> None:
            """Add the inputs of the tokens that count."""
            counted = self.counted_in_source if name == "cross_attention.key" else self.counted
            x = inputs[0]
            rows = x.flatten(0, -2) if counted is None else x[counted]
            self._sums.setdefault(name, Sums(x.shape[-1], x.device)).add(rows.float())

        return add_inputs

    def sums(self) -> Iterator[tuple[Group, "Sums"]]:
        """Yield each group with its sums; each is freed when the next one is taken."""
        for group in self._groups:
            yield group, self._take_sums(group.linears[0])

    def _take_sums(self, name: str) -> "Sums":
        if name in self._sums:
            return self._sums.pop(name)
        weight = self._block.get_parameter(f"{name}.weight")  # no token counted
        return Sums(weight.shape[1], weight.device)


class Sums:
    """Sums over the inputs of one group; they can be added over ranks.

    Each sample is summed in float32 and added in float64, so that the total does not depend on which rank had which sample.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.second_moment = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.magnitude = torch.zeros(size, dtype=torch.float64, device=device)
        self.largest = torch.zeros(size, dtype=torch.float32, device=device)

    def add(self, rows: Tensor) -> None:
        """Add inputs.  [tokens, in]"""
        self.tokens += len(rows)
        for columns, part in zip(rows.T.split(_ROWS), self.second_moment.split(_ROWS), strict=True):
            part += columns @ rows  # in parts, because a float64 product of the whole would take too much memory
        self.magnitude += rows.abs().sum(dim=0)
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))

    def statistics(self) -> InputStatistics:
        """Return the statistics of all inputs that were added."""
        count = int(self.tokens)
        return InputStatistics(count, self.second_moment.float(), (self.magnitude / max(1, count)).float(), self.largest)


@contextlib.contextmanager
def counted_tokens(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list whose only entry is True for the tokens of the current sample that are not padding.  [batch, seq]"""
    counted: list[Tensor] = []

    def update(module: nn.Module, inputs: tuple[Stream]) -> None:
        """Set the entry before a sample passes through the layer."""
        counted[:] = [inputs[0].segments != 0]

    hook = layer.register_forward_pre_hook(update)
    try:
        yield counted
    finally:
        hook.remove()


class LargestKeysAndValues:
    """Finds the largest rotated key and the largest value of each block of a decoder.

    with largest.watching(step):   # each layer of a walk
        for sample in samples:
            step(sample)
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.sizes = torch.zeros(num_blocks, 2, device=device)
        """Largest |key| and |value| of each block, [blocks, 2]; with several ranks, take the largest over all."""

    @contextlib.contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Measure the tokens, without padding, that pass through the step in this context."""
        if step.block is None:
            yield
            return
        assert isinstance(step.module, Block)
        attention, sizes = step.module.attention, self.sizes[step.block]
        append_to_cache = attention.append_to_cache
        with counted_tokens(step.module) as counted:

            def measure(key: Tensor, value: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
                """Append to the cache as before, and keep the largest sizes."""
                if counted[0].any():
                    largest = [x.transpose(1, 2)[counted[0]].abs().max() for x in (key, value)]
                    torch.maximum(sizes, torch.stack(largest), out=sizes)
                return append_to_cache(key, value, cache)

            object.__setattr__(attention, "append_to_cache", measure)  # in place of the method
            try:
                yield
            finally:
                object.__delattr__(attention, "append_to_cache")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer in a block."""

    block: int
    """Index of the block, from 0."""
    linear: str
    """Name of the layer in the block."""
    shape: tuple[int, int]
    """[out, in]"""

    def __str__(self) -> str:
        return f"{self.block}.{self.linear}"


def matrices(config: ModelConfig) -> dict[str, Matrix]:
    """Return the matrices of all blocks by parameter name, in the order in which they run."""
    by_name: dict[str, Matrix] = {}
    for name, layer in first_uses(config):
        if layer.module is Block:
            with torch.device("meta"):
                block = layer.module(*layer.arguments)
            number = len({matrix.block for matrix in by_name.values()})
            for linear in (linear for group in groups_of(block) for linear in group.linears):
                rows, columns = block.get_parameter(f"{linear}.weight").shape
                by_name[f"{name}.{linear}.weight"] = Matrix(number, linear, (rows, columns))
    return by_name
