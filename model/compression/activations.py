"""Rounding of activations while a network runs: the inputs of linear layers, and the keys and values of the cache."""

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
    """Round activations in a whole network from now on. `schemes`: weight name -> scheme; `kv_cache`: scheme of keys and values."""
    numbers = itertools.count()
    for name, module in network.named_children():
        _round(module, name, next(numbers) if isinstance(module, Block) else None, schemes, kv_cache)


def rounding(schemes: Mapping[str, Scheme], kv_cache: CacheScheme | None = None) -> Callable[[Step], None]:
    """Return a function that rounds activations in each step of a walk, as model.walk.outputs takes it."""
    return lambda step: _round(step.module, step.name, step.block, schemes, kv_cache)


def _round(module: nn.Module, name: str, block: int | None, schemes: Mapping[str, Scheme], kv_cache: CacheScheme | None) -> None:
    """Round activations in one layer of the list; `block` is its index among the blocks."""
    for inner, linear in module.named_modules():
        scheme = schemes.get(f"{name}.{inner}.weight")
        if scheme is not None and scheme.activations != "none":
            linear.register_forward_pre_hook(_round_inputs(scheme.activations))
    if kv_cache is not None and block is not None:
        assert isinstance(module, Block)
        append = _append_rounded(module.attention.layer_number, kv_cache.kind, kv_cache.scales[block])
        object.__setattr__(module.attention, "append_to_cache", append)  # in place of the method


def _round_inputs(kind: Byte) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    """Return a hook that rounds each token with its own scale."""
    return lambda module, inputs: (fake_quantized_rows(inputs[0], kind),)


def _append_rounded(layer_number: int, kind: Byte, scales: tuple[float, float]) -> Callable[..., tuple[Tensor, ...]]:
    """Return an Attention.append_to_cache whose cache stores codes. Queries attend to rounded keys and values, also to the new ones."""

    def append_to_cache(key: Tensor, value: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, ...]:
        """Return the rounded keys and values of the cache and of the new tokens.  2 x [batch, kv_heads, seq, head]"""
        # Tensors, not numbers: for a number a GPU may multiply by the inverse and get another code.
        steps = [torch.tensor(scale, device=key.device) for scale in scales]
        codes = codes_of(key, kind, steps[0]), codes_of(value, kind, steps[1])
        if cache is not None:
            codes = cache.append(layer_number, *codes)
        return tuple(code.to(key.dtype) * step for code, step in zip(codes, steps, strict=True))

    return append_to_cache
