"""What a network rounds while it runs, laid over it from outside: the inputs of linear layers, and the keys and values that are kept."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from model.compression.grids import fake_quantized, fake_quantized_rows
from model.compression.packed import Activations, CacheScheme, Scheme
from model.layers import Block
from model.transformer import Transformer
from model.walk import Step


def round_activations(network: Transformer, schemes: Mapping[str, Scheme], cache: CacheScheme | None = None) -> None:
    """Round in a whole network what schemes, by the names of weights, and a cache say."""
    _round_inputs(network, {name.removesuffix(".weight"): scheme.activations for name, scheme in schemes.items()})
    for number, block in enumerate(network.blocks() if cache else ()):
        _round_kept(block, cache, number)


def rounding(schemes: Mapping[str, Scheme], cache: CacheScheme | None = None) -> Callable[[Step], None]:
    """The same for each step of a walk, as model.walk.outputs asks for it."""

    def prepare(step: Step) -> None:
        here = [name for name in step.parameters if name in schemes]
        _round_inputs(step.module, {name.removeprefix(f"{step.name}.").removesuffix(".weight"): schemes[name].activations for name in here})
        if cache is not None and step.block is not None:
            _round_kept(step.module, cache, step.block)

    return prepare


def _round_inputs(module: nn.Module, kinds: Mapping[str, Activations]) -> None:
    """Of linear layers, by their names in a module: each token by a scale of its own."""
    for name, kind in kinds.items():
        if kind != "none":
            module.get_submodule(name).register_forward_pre_hook(_rounded_to(kind))


def _rounded_to(kind: Activations) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda module, inputs: (fake_quantized_rows(inputs[0], kind),)  # type: ignore[arg-type]


def _round_kept(block: Block, cache: CacheScheme, number: int) -> None:
    """Attention reads keys and values as a cache of codes gives them back, the newest token's too."""
    scales = cache.scales[number]
    block.attention.kept_as = lambda *kept: tuple(  # type: ignore[assignment]
        fake_quantized(x, cache.kind, torch.tensor(scale, device=x.device)) for x, scale in zip(kept, scales, strict=True)
    )
