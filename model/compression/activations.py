"""What a network rounds while it runs, laid over it from outside: the inputs of linear layers, and the keys and values that it keeps."""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from model.cache import KeyValueCache
from model.compression.grids import Byte, codes_of, fake_quantized_rows
from model.compression.packed import CacheScheme, Scheme
from model.transformer import Block, Transformer
from model.walk import Step


def round_activations(network: Transformer, schemes: Mapping[str, Scheme], kv_cache: CacheScheme | None = None) -> None:
    """In a whole network, as schemes, by the names of weights, and that of its cache say."""
    numbers = itertools.count()
    for name, module in network.named_children():
        _round(module, name, next(numbers) if isinstance(module, Block) else None, schemes, kv_cache)


def rounding(schemes: Mapping[str, Scheme], kv_cache: CacheScheme | None = None) -> Callable[[Step], None]:
    """The same in each step of a walk, as model.walk.outputs asks for it."""
    return lambda step: _round(step.module, step.name, step.block, schemes, kv_cache)


def _round(module: nn.Module, name: str, block: int | None, schemes: Mapping[str, Scheme], kv_cache: CacheScheme | None) -> None:
    """In one layer of the list; `block` is its number among the blocks."""
    for own, linear in module.named_modules():
        scheme = schemes.get(f"{name}.{own}.weight")
        if scheme is not None and scheme.activations != "none":
            linear.register_forward_pre_hook(_inputs_as(scheme.activations))
    if kv_cache is not None and block is not None:
        module.attention.append_to_cache = _remembering(module.attention.layer_number, kv_cache.kind, kv_cache.scales[block])


def _inputs_as(kind: Byte) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    """Each token by a scale of its own."""
    return lambda module, inputs: (fake_quantized_rows(inputs[0], kind),)


def _remembering(layer_number: int, kind: Byte, scales: tuple[float, float]) -> Callable[..., tuple[Tensor, ...]]:
    """Attention.append_to_cache, with a cache that keeps codes: what it gives back queries look at, the newest tokens' too."""

    def append_to_cache(key: Tensor, value: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, ...]:
        # Tensors: by a number a GPU might multiply the inverse, and find another code.
        steps = [torch.tensor(scale, device=key.device) for scale in scales]
        codes = codes_of(key, kind, steps[0]), codes_of(value, kind, steps[1])
        if cache is not None:
            codes = cache.append(layer_number, *codes)
        return tuple(some.to(key.dtype) * step for some, step in zip(codes, steps, strict=True))

    return append_to_cache
