"""Structured pruning: the result is an ordinary network with smaller sizes, the same in every block.

The order of the steps:
1. `influences` or `losses_without_each_block` chooses blocks, and `remove_blocks` removes them.
2. `remove_inputs` of feed_forward.down and attention.output chooses neurons and groups of heads, and sets their columns to zero.
3. `Channels` collects the sums from which the channels of the hidden width are chosen.
4. `reduce_widths` removes the neurons, the groups of heads and the channels.
Every sum is float64 and additive over samples and ranks.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.compression.quantization import Changed
from model.compression.statistics import InputStatistics, counted_tokens
from model.config import ModelConfig, count_parameters
from model.huggingface import architecture
from model.layers import LayerNorm, RMSNorm, Stream
from model.transformer import Block, Layer, first_uses, select_outputs
from model.walk import Step, walk

# The meaning of each axis of a weight; a bias has the first axis of its weight. Layers with their own weight are listed by class.
_AXES: dict[str, tuple[str | None, ...]] = {
    "query": ("queries", "hidden"),
    "key": ("keys", "hidden"),
    "value": ("keys", "hidden"),
    "output": ("hidden", "queries"),
    "gate": ("neurons", "hidden"),
    "up": ("neurons", "hidden"),
    "down": ("hidden", "neurons"),
    "pooler": ("hidden", "hidden"),
    "classes": (None, "hidden"),
    "dense": ("hidden", "hidden"),
    "norm": ("hidden",),
    "attention_norm": ("hidden",),
    "cross_attention_norm": ("hidden",),
    "feed_forward_norm": ("hidden",),
    "query_norm": (None,),
    "key_norm": (None,),
    "TokenEmbedding": (None, "hidden"),
    "TokenTypes": (None, "hidden"),
    "LearnedPositions": (None, "hidden"),
    "Head": (None, "hidden"),
    "RelativePositions": (None, None),
    "HeadBias": (None,),
}


def sizes_for(
    config: ModelConfig,
    parameters: float | None = None,
    intermediate_size: int | None = None,
    num_key_value_heads: int | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_decoder_layers: int | None = None,
) -> ModelConfig:
    """Return the configuration of the smaller network: of the given sizes or, for a share `parameters`, a smaller feed-forward.

    Heads keep their width, and key/value heads keep their number of query heads. Raises ValueError if a size is not below that of the
    network or below 1, if the share cannot be reached, or if no Hugging Face architecture can express the network.
    """
    given = {
        "intermediate_size": intermediate_size,
        "num_key_value_heads": num_key_value_heads,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_decoder_layers": num_decoder_layers,
    }
    sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
    complaints = [
        f"{name} {size} is not possible: this model has {getattr(config, name)}, and at least 1 must be left."
        for name, size in sizes.items()
        if not 1 <= size <= (getattr(config, name) or 0)
    ]
    if parameters is not None and not 0 < parameters < 1:
        complaints.append(f"parameters is {parameters:g}; it is the share of the parameters to keep, above 0 and below 1.")
    if parameters is not None and intermediate_size is not None:
        complaints.append("parameters sets intermediate_size; give only one of them.")
    depends_on_width = config.positions == "sinusoidal" or (config.positions == "relative" and config.tie_embeddings)
    if hidden_size not in (None, config.hidden_size) and depends_on_width:
        complaints.append(f'hidden_size cannot be changed with model.positions "{config.positions}", whose tables or scales depend on it.')
    if num_key_value_heads not in (None, config.num_key_value_heads) and config.positions in ("relative", "alibi"):
        complaints.append(
            f'num_key_value_heads cannot be changed with model.positions "{config.positions}", which depend on the index of a head.'
        )
    if complaints:
        raise ValueError("\n".join(complaints))
    if num_key_value_heads is not None:
        sizes["num_attention_heads"] = num_key_value_heads * (config.num_attention_heads // config.num_key_value_heads)
    smaller = dataclasses.replace(config, **sizes)
    if parameters is not None:
        smaller = _with_fewer_neurons(smaller, parameters, count_parameters(config))
    if smaller == config:
        raise ValueError("Nothing would be removed. Give parameters (the share to keep) or a size below that of the model.")
    architecture(smaller)
    return smaller


def _with_fewer_neurons(config: ModelConfig, share: float, whole: int) -> ModelConfig:
    """Return the configuration with the largest feed-forward width that keeps at most this share of `whole` parameters."""
    # The width is a multiple of a power of two: kernels need it, and groups of 32 codes if 32 is at most a sixteenth of the width.
    multiple = 2 ** max(5 if config.intermediate_size >= 512 else 3, (config.intermediate_size // 64).bit_length() - 1)
    with_neurons = lambda number: dataclasses.replace(config, intermediate_size=number)  # noqa: E731
    least = count_parameters(with_neurons(multiple))
    num_more = int(share * whole - least) // (count_parameters(with_neurons(2 * multiple)) - least)
    if num_more < 0:
        raise ValueError(
            f"parameters {share:g} cannot be reached with the feed-forward width alone: intermediate_size {multiple} "
            f"leaves {least / whole:.3f} of them. Also give hidden_size, num_key_value_heads or num_layers."
        )
    return with_neurons(min(config.intermediate_size, multiple * (1 + num_more)))


def remove_inputs(weight: Tensor, statistics: InputStatistics, keep: int, unit: int = 1, damping: float = 0.01) -> Changed:
    """Set all columns of a weight to zero except the `keep` most important units of `unit` neighbours each.  [out, in]

    The importance of a unit is the norm of its contribution to the outputs, ||W_u X_u||. The kept columns compensate the removed ones by
    least squares (Hassibi and Stork 1992, "optimal brain surgeon", for a set of columns at once).
    """
    moment = statistics.second_moment.double()
    by_unit = weight.double().unflatten(1, (-1, unit))
    own = torch.stack([moment[start : start + unit, start : start + unit] for start in range(0, len(moment), unit)])
    added = torch.einsum("oui,uij,ouj->u", by_unit, own, by_unit)
    units = added.topk(keep).indices.sort().values
    kept = _members(units, unit)
    removed = torch.ones(len(moment), dtype=torch.bool, device=weight.device).index_fill(0, kept, False)
    ridge = damping * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(moment[kept][:, kept] + ridge * torch.eye(len(kept), dtype=moment.dtype, device=moment.device))
    compensation = torch.cholesky_solve(moment[kept][:, removed] @ weight[:, removed].double().T, factor).T
    changed = torch.zeros_like(weight)
    changed[:, kept] = (weight[:, kept].double() + compensation).to(weight.dtype)
    return Changed(changed, damping=damping)


class Channels:
    """Sums over tokens at the norms of a network, from which the channels of the hidden width to keep are chosen.

    with channels.watching(step):   # each layer before the head
        for sample in samples:
            step(sample)
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """Name of a norm -> sums of |outputs| and of squared inputs (minus their mean if the norm subtracts it).  [2, hidden] float64"""

    @contextlib.contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Add the tokens, without padding, that pass through the step in this context."""
        with counted_tokens(step.module) as counted:

            def add(sums: Tensor, module: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
                """Add the inputs and outputs of one norm to its sums."""
                x = inputs[0][counted[0]]
                x = x - x.mean(dim=-1, keepdim=True) if isinstance(module, LayerNorm) else x
                sums += torch.stack((outputs[counted[0]].abs().sum(dim=0), x.square().sum(dim=0)))

            hooks = []
            for name, module in step.module.named_modules():
                if isinstance(module, LayerNorm | RMSNorm) and _AXES[name.split(".")[-1]] == ("hidden",):
                    zeros = torch.zeros(2, len(module.weight), dtype=torch.float64, device=module.weight.device)
                    hooks.append(module.register_forward_hook(functools.partial(add, self.sums.setdefault(f"{step.name}.{name}", zeros))))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def kept(self, hidden_size: int) -> Tensor:
        """Return the channels with the largest mean output of all norms (Muralidharan et al. 2024, arXiv 2407.14679).  -> [hidden_size]"""
        return torch.stack([sums[0] for sums in self.sums.values()]).sum(dim=0).topk(hidden_size).indices.sort().values

    def gain(self, norm: str, kept: Tensor) -> float:
        """Return the factor for a norm's weight that compensates the change of the root mean square from all channels to the kept ones."""
        squares = self.sums[norm][1]
        return (squares[kept].mean() / squares.mean()).sqrt().item() if squares.any() else 1.0


def influences(config: ModelConfig, state: Mapping[str, Tensor], samples: Sequence[Stream], device: torch.device | str = "cpu") -> Tensor:
    """Return the influence of each block, 1 - cos(hidden before it, hidden after it), summed over tokens.  -> [blocks]

    Men et al. 2024, "ShortGPT", arXiv 2403.03853, equation 1. A sample is the input of the first layer of the list.
    """
    sums = torch.zeros(config.total_blocks, dtype=torch.float64, device=device)
    streams = list(samples)
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            break
        for number, before in enumerate(streams):
            streams[number] = after = step(before)
            if step.block is not None:
                similarity = F.cosine_similarity(before.hidden, after.hidden, dim=-1)
                sums[step.block] += (1 - similarity.double())[before.segments != 0].sum()
    return sums


def losses_without_each_block(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    samples: Sequence[Stream],
    loss: Callable[[Tensor | tuple[Tensor, Tensor], int], Tensor],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the summed loss of the whole network, then without block 0, without block 1, ...  -> [1 + blocks]

    `loss` takes the network's outputs and the index of the sample. It takes one walk, which carries one more variant after each block:
    the cost is that of about blocks^2 / 2 blocks' forward passes, and the hidden states of the samples are kept once per block.
    """
    variants: list[list[Stream]] = [list(samples)]
    last_steps: list[Step] = []
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            last_steps.append(step)
            continue
        without_block = [list(variants[0])] if step.block is not None else []
        for variant in variants:
            for number, stream in enumerate(variant):
                variant[number] = step(stream)
        variants += without_block
    sums = torch.zeros(len(variants), dtype=torch.float64, device=device)
    for index, variant in enumerate(variants):
        for number, stream in enumerate(variant):
            for step in last_steps:
                stream = step(stream)
            sums[index] += loss(select_outputs(config, stream), number).double()
    return sums


def remove_blocks(config: ModelConfig, state: Mapping[str, Tensor], smaller: ModelConfig, importance: Tensor) -> Mapping[str, Tensor]:
    """Remove the least important blocks of each stack from `state`, so that it fits `smaller`.  importance [blocks]

    The configurations differ only in their numbers of blocks. Tensors are read when they are used.
    """
    encoder, decoder = importance[: config.num_layers], importance[config.num_layers :]
    kept = set(encoder.topk(smaller.num_layers).indices.tolist())
    kept |= {config.num_layers + block for block in decoder.topk(smaller.num_decoder_layers or 0).indices.tolist()}
    kept_names, blocks = [], 0
    for name, layer in first_uses(config):
        if layer.module is not Block or blocks in kept:
            kept_names.append(name)
        blocks += layer.module is Block
    names: dict[str, str] = {}
    for (name, layer), old in zip(first_uses(smaller), kept_names, strict=True):
        names |= {f"{name}.{own}": f"{old}.{own}" for own in _parameters(layer)}
    return _LazyState({new: functools.partial(state.__getitem__, old) for new, old in names.items()})


def reduce_widths(
    config: ModelConfig, state: Mapping[str, Tensor], smaller: ModelConfig, channels: Channels | None = None
) -> Mapping[str, Tensor]:
    """Reduce `state` to the widths of `smaller`; `channels` chooses the hidden channels if their number is reduced.

    In a block, the neurons and groups of heads with the smallest columns of feed_forward.down and attention.output are removed: after
    `remove_inputs` these are zero. Tensors are read when they are used, and the choices of a block are made then.
    """
    has_fewer_channels = smaller.hidden_size < config.hidden_size
    assert channels is not None or not has_fewer_channels, "the kept channels are unknown"
    hidden = channels.kept(smaller.hidden_size).cpu() if channels is not None and has_fewer_channels else None
    group = config.num_attention_heads // config.num_key_value_heads * config.head_size

    @functools.cache
    def largest_units(weight: str, unit: int, number: int) -> Tensor:
        """Return the indices of the units of `unit` columns with the largest norms, in order.  -> [number]"""
        squares = state[weight].float().square().sum(dim=0).unflatten(0, (-1, unit)).sum(dim=1)
        return squares.topk(number).indices.sort().values

    def kept_indices(kind: str | None, name: str) -> Tensor | None:
        """Return the indices to keep along a parameter's axis of this kind; None: all."""
        if kind == "hidden":
            return hidden
        if kind == "neurons" and smaller.intermediate_size < config.intermediate_size:
            return largest_units(f"{name.rsplit('.', 2)[0]}.down.weight", 1, smaller.intermediate_size)
        if kind in ("queries", "keys") and smaller.num_key_value_heads < config.num_key_value_heads:
            groups = largest_units(f"{name.rsplit('.', 2)[0]}.output.weight", group, smaller.num_key_value_heads)
            return _members(groups, group if kind == "queries" else config.head_size)
        return None

    def cut(name: str, kinds: tuple[str | None, ...]) -> Tensor:
        """Return a parameter cut along all its axes, whose kinds are given."""
        tensor = state[name]
        for axis, kind in enumerate(kinds[: tensor.ndim]):
            indices = kept_indices(kind, name)
            tensor = tensor if indices is None else tensor.index_select(axis, indices.to(tensor.device))
        norm, _, own = name.rpartition(".")
        if hidden is not None and channels is not None and kinds == ("hidden",) and own == "weight":
            tensor = tensor * channels.gain(norm, hidden)
        return tensor

    readers: dict[str, Callable[[], Tensor]] = {}
    for layer_name, layer in first_uses(config):
        for own in _parameters(layer):
            kind = own.split(".")[-2] if "." in own else layer.module.__name__
            readers[f"{layer_name}.{own}"] = functools.partial(cut, f"{layer_name}.{own}", _AXES[kind])
    return _LazyState(readers)


def _parameters(layer: Layer) -> list[str]:
    """Return the names of a layer's parameters within the layer."""
    with torch.device("meta"):
        return [name for name, _ in layer.module(*layer.arguments).named_parameters()]


def _members(units: Tensor, unit: int) -> Tensor:
    """Return the indices of all members of these units of `unit` neighbours.  [units] -> [units * unit]"""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()


class _LazyState(Mapping[str, Tensor]):
    """Tensors that are computed when they are accessed."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
