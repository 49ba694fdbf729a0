"""Structured pruning: what is left is an ordinary network with smaller sizes, the same ones in every block.

In order: blocks go by `influences` or by `losses_without_each_block`, then `shallower`. Feed-forward neurons and groups of heads go one
weight at a time, by `without_inputs` of feed_forward.down and of attention.output: the columns that go become zero. Channels of the
hidden width go by the sums of `Channels`. `narrower` then cuts all of them out. Every sum is float64 and additive over samples and ranks.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.compression.statistics import InputStatistics, counting
from model.compression.sweep import Changed
from model.config import ModelConfig, count_parameters
from model.huggingface import architecture
from model.layers import LayerNorm, RMSNorm, Stream
from model.transformer import Block, Layer, first_uses, select_outputs
from model.walk import Step, walk

# What each axis of a weight counts; a bias has its weight's first. Layers with a weight of their own stand under their class.
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
    """The smaller network: with the sizes that are given, and, for the share `parameters`, so narrow a feed-forward that it is reached.

    Heads keep their width, and key/value heads the number of query heads that read them. Raises ValueError where a size is not below
    the network's or nothing is left, where the share cannot be reached, and where no Hugging Face architecture has such a network.
    """
    given = {
        "intermediate_size": intermediate_size,
        "num_key_value_heads": num_key_value_heads,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_decoder_layers": num_decoder_layers,
    }
    sizes = {name: size for name, size in given.items() if size is not None}
    complaints = [
        f"{name} {size} is not possible: this model has {getattr(config, name)}, of which 1 or more are left."
        for name, size in sizes.items()
        if not 1 <= size <= (getattr(config, name) or 0)
    ]
    if parameters is not None and not 0 < parameters < 1:
        complaints.append(f"parameters is {parameters:g}; it is the share of the parameters that is left, above 0 and below 1.")
    if parameters is not None and intermediate_size is not None:
        complaints.append("parameters chooses intermediate_size: give one of them.")
    depends_on_width = config.positions == "sinusoidal" or (config.positions == "relative" and config.tie_embeddings)
    if hidden_size not in (None, config.hidden_size) and depends_on_width:
        complaints.append(f'hidden_size cannot be changed beside model.positions "{config.positions}": waves or scales depend on it.')
    if num_key_value_heads not in (None, config.num_key_value_heads) and config.positions in ("relative", "alibi"):
        complaints.append(f'num_key_value_heads cannot be changed beside model.positions "{config.positions}": they number the heads.')
    if complaints:
        raise ValueError("\n".join(complaints))
    if num_key_value_heads is not None:
        sizes["num_attention_heads"] = num_key_value_heads * (config.num_attention_heads // config.num_key_value_heads)
    smaller = dataclasses.replace(config, **sizes)
    if parameters is not None:
        smaller = _with_fewer_neurons(smaller, parameters, count_parameters(config))
    if smaller == config:
        raise ValueError("Nothing would be removed: give parameters, the share that is left, or a size below the model's.")
    architecture(smaller)
    return smaller


def _with_fewer_neurons(config: ModelConfig, share: float, whole: int) -> ModelConfig:
    # Round widths, for kernels, and for groups of 32 codes where they are no more than a sixteenth of it.
    multiple = 2 ** max(5 if config.intermediate_size >= 512 else 3, (config.intermediate_size // 64).bit_length() - 1)
    with_neurons = lambda number: dataclasses.replace(config, intermediate_size=number)  # noqa: E731
    least = count_parameters(with_neurons(multiple))
    further = int(share * whole - least) // (count_parameters(with_neurons(2 * multiple)) - least)
    if further < 0:
        raise ValueError(
            f"parameters {share:g} cannot be reached by the feed-forward's width: at intermediate_size {multiple} "
            f"{least / whole:.3f} of them are left. Give hidden_size, num_key_value_heads or num_layers beside it."
        )
    return with_neurons(min(config.intermediate_size, multiple * (1 + further)))


def without_inputs(weight: Tensor, statistics: InputStatistics, keep: int, unit: int = 1, damping: float = 0.01) -> Changed:
    """The weight [out, in] with zero columns but for the `keep` units of its inputs, `unit` neighbours each, that count most.

    A unit counts as much as what it adds to the outputs, ||W_u X_u||. The columns that stay take over what can be had of the others
    from their inputs, by least squares (Hassibi and Stork 1992, "optimal brain surgeon", a set of columns at once).
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
    taken_over = torch.cholesky_solve(moment[kept][:, removed] @ weight[:, removed].double().T, factor).T
    changed = torch.zeros_like(weight)
    changed[:, kept] = (weight[:, kept].double() + taken_over).to(weight.dtype)
    return Changed(changed, damping=damping)


class Channels:
    """Sums over tokens at a network's norms, which choose channels of the hidden width.

    with channels.watching(step):   # each layer before the head
        for passed in samples:
            step(passed)
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """Norm by name -> of |its outputs|, and of its inputs' squares, about their mean where it takes that away.  [2, hidden] float64"""

    @contextlib.contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Tokens that pass through the step count, padding does not."""
        with counting(step.module) as counted:

            def see(sums: Tensor, module: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
                x = inputs[0][counted[0]]
                x = x - x.mean(dim=-1, keepdim=True) if isinstance(module, LayerNorm) else x
                sums += torch.stack((outputs[counted[0]].abs().sum(dim=0), x.square().sum(dim=0)))

            hooks = []
            for name, module in step.module.named_modules():
                if isinstance(module, LayerNorm | RMSNorm) and _AXES[name.split(".")[-1]] == ("hidden",):
                    zeros = torch.zeros(2, len(module.weight), dtype=torch.float64, device=module.weight.device)
                    hooks.append(module.register_forward_hook(functools.partial(see, self.sums.setdefault(f"{step.name}.{name}", zeros))))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def kept(self, hidden_size: int) -> Tensor:
        """Those with the largest mean output of all norms (Muralidharan et al. 2024, arXiv 2407.14679), in order.  -> [hidden_size]"""
        return torch.stack([sums[0] for sums in self.sums.values()]).sum(dim=0).topk(hidden_size).indices.sort().values

    def gain(self, norm: str, kept: Tensor) -> float:
        """What makes up for a norm's dividing by the root mean square of these channels instead of all."""
        squares = self.sums[norm][1]
        return (squares[kept].mean() / squares.mean()).sqrt().item() if squares.any() else 1.0


def influences(config: ModelConfig, state: Mapping[str, Tensor], samples: Sequence[Stream], device: torch.device | str = "cpu") -> Tensor:
    """Each block's influence, 1 - cos(hidden before it, hidden behind it), summed over tokens.  -> [blocks]

    Men et al. 2024, "ShortGPT", arXiv 2403.03853, equation 1. A sample is the tuple that the list's first layer takes.
    """
    sums = torch.zeros(config.total_blocks, dtype=torch.float64, device=device)
    passed = list(samples)
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            break
        for number, before in enumerate(passed):
            passed[number] = behind = step(before)
            if step.block is not None:
                likeness = F.cosine_similarity(before[0], behind[0], dim=-1)
                sums[step.block] += (1 - likeness.double())[before[1] != 0].sum()
    return sums


def losses_without_each_block(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    samples: Sequence[Stream],
    loss: Callable[[Tensor | tuple[Tensor, Tensor], int], Tensor],
    device: torch.device | str = "cpu",
) -> Tensor:
    """The summed loss of the whole network, then of it without block 0, without block 1, ...  -> [1 + blocks]

    `loss` takes the network's outputs and the sample's number. One walk: behind each block one more variant is under way, so it
    costs some blocks^2 / 2 blocks' forward passes, and keeps the samples' hidden states once for each block.
    """
    variants: list[list[Stream]] = [list(samples)]
    behind: list[Step] = []
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            behind.append(step)
            continue
        without_it = [list(variants[0])] if step.block is not None else []
        for variant in variants:
            for number, passed in enumerate(variant):
                variant[number] = step(passed)
        variants += without_it
    sums = torch.zeros(len(variants), dtype=torch.float64, device=device)
    for place, variant in enumerate(variants):
        for number, passed in enumerate(variant):
            for step in behind:
                passed = step(passed)
            sums[place] += loss(select_outputs(config, passed), number).double()
    return sums


def shallower(config: ModelConfig, state: Mapping[str, Tensor], smaller: ModelConfig, importance: Tensor) -> Mapping[str, Tensor]:
    """`state` without blocks: as many as `smaller` has fewer, of each stack the least important.  importance [blocks]

    Both configurations differ in their numbers of blocks alone. Tensors are read when they are asked for.
    """
    encoder, decoder = importance[: config.num_layers], importance[config.num_layers :]
    kept = set(encoder.topk(smaller.num_layers).indices.tolist())
    kept |= {config.num_layers + block for block in decoder.topk(smaller.num_decoder_layers or 0).indices.tolist()}
    staying, blocks = [], 0
    for name, layer in first_uses(config):
        if layer.module is not Block or blocks in kept:
            staying.append(name)
        blocks += layer.module is Block
    names = {}
    for (name, layer), old in zip(first_uses(smaller), staying, strict=True):
        names |= {f"{name}.{own}": f"{old}.{own}" for own in _parameters(layer)}
    return _Read({new: functools.partial(state.__getitem__, old) for new, old in names.items()})


def narrower(
    config: ModelConfig, state: Mapping[str, Tensor], smaller: ModelConfig, channels: Channels | None = None
) -> Mapping[str, Tensor]:
    """`state` cut down to the widths of `smaller`; `channels` says of which hidden ones where these get fewer.

    Of a block's neurons and groups of heads go those whose columns of feed_forward.down and of attention.output are least: zero,
    behind `without_inputs`. Tensors are read when they are asked for, and a block's choices are made then.
    """
    is_narrower = smaller.hidden_size < config.hidden_size
    assert channels is not None or not is_narrower, "which channels stay is not known"
    hidden = channels.kept(smaller.hidden_size).cpu() if channels is not None and is_narrower else None
    group = config.num_attention_heads // config.num_key_value_heads * config.head_size

    @functools.cache
    def units(weight: str, unit: int, number: int) -> Tensor:
        squares = state[weight].float().square().sum(dim=0).unflatten(0, (-1, unit)).sum(dim=1)
        return squares.topk(number).indices.sort().values

    def axis(kind: str | None, name: str) -> Tensor | None:
        """Which indices stay, of a parameter's axis of this kind; None: all."""
        if kind == "hidden":
            return hidden
        if kind == "neurons" and smaller.intermediate_size < config.intermediate_size:
            return units(f"{name.rsplit('.', 2)[0]}.down.weight", 1, smaller.intermediate_size)
        if kind in ("queries", "keys") and smaller.num_key_value_heads < config.num_key_value_heads:
            groups = units(f"{name.rsplit('.', 2)[0]}.output.weight", group, smaller.num_key_value_heads)
            return _members(groups, group if kind == "queries" else config.head_size)
        return None

    def read(name: str, kinds: tuple[str | None, ...]) -> Tensor:
        tensor = state[name]
        for place, kind in enumerate(kinds[: tensor.ndim]):
            indices = axis(kind, name)
            tensor = tensor if indices is None else tensor.index_select(place, indices.to(tensor.device))
        norm, _, own = name.rpartition(".")
        if hidden is not None and kinds == ("hidden",) and own == "weight":
            tensor = tensor * channels.gain(norm, hidden)
        return tensor

    made = {}
    for layer_name, layer in first_uses(config):
        for own in _parameters(layer):
            of = own.split(".")[-2] if "." in own else layer.module.__name__
            made[f"{layer_name}.{own}"] = functools.partial(read, f"{layer_name}.{own}", _AXES[of])
    return _Read(made)


def _parameters(layer: Layer) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in layer.module(*layer.arguments).named_parameters()]


def _members(units: Tensor, unit: int) -> Tensor:
    """The indices in each of these runs of `unit` neighbours.  [units] -> [units * unit]"""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()


class _Read(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for."""

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]):
        self._made = made

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
