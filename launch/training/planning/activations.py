"""Bytes that one block keeps for its backward pass, counted: the block itself runs on tensors that have a shape and no memory.

Autograd reports every tensor that it keeps. Each storage counts once, whoever else keeps it; weights and tables do not count. Kernels
that have no implementation without memory are replaced by a stand-in that keeps the same tensors.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from model.attention import LONGEST_PLAIN_ATTENTION
from model.config import ModelConfig, Part
from model.layers import Stream
from model.transformer import Block

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of weights and activations by the value of the setting `precision`."""


def block_bytes(
    model: ModelConfig,
    sequences: int,
    tokens: int,
    device: Literal["cpu", "cuda"] = "cuda",
    precision: str = "bf16",
    tensor_parallel_size: int = 1,
    part: Part | None = None,
) -> float:
    """Return the bytes that a block keeps for `sequences` of `tokens` tokens, on each rank of a tensor-parallel group.

    A rank of the group has its share of the heads and of the feed-forward, and whole inputs (Shoeybi et al. 2019, arXiv 1909.08053,
    section 3). `part` is the stack of an encoder-decoder that the block is in (default: that of the architecture).
    """
    if part is None:
        part = "decoder" if model.architecture != "encoder" else "encoder"
    one, two = (_counted(model, number, tokens, device, precision, tensor_parallel_size, part) for number in (1, 2))
    return one + (sequences - 1) * (two - one)  # masks and tables are shared by all sequences


def block_input_bytes(model: ModelConfig, sequences: int, tokens: int, precision: str = "bf16") -> int:
    """Return the bytes of a block's input, which is all that a block with recompute keeps."""
    return sequences * tokens * model.hidden_size * DTYPES[precision].itemsize


@functools.lru_cache(maxsize=4096)
def _counted(model: ModelConfig, sequences: int, tokens: int, device: str, precision: str, tensor_parallel_size: int, part: Part) -> int:
    """Return the bytes of the distinct storages that autograd keeps in one forward pass of a block."""
    split = _share(dataclasses.replace(model, sequence_length=max(tokens, model.sequence_length)), tensor_parallel_size)
    dtype = DTYPES[precision]
    with torch.device("meta"):
        block = Block(split, 0, 0, part=part).to(dtype)
        buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in block.named_buffers()}
        stream = _stream(split, sequences, tokens, dtype, part)
    own = {_key(tensor) for tensor in (*block.parameters(), *buffers.values())}
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no two have the same key

    def keep(tensor: Tensor) -> Tensor:
        """Note a tensor that autograd keeps."""
        if _key(tensor) not in own:
            kept[_key(tensor)] = tensor
        return tensor

    with _StandIns(device), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(block, buffers, (stream,))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _share(model: ModelConfig, size: int) -> ModelConfig:
    """Return the model whose blocks are the part of the blocks that one of `size` tensor-parallel ranks has."""
    if size == 1:
        return model
    return dataclasses.replace(
        model,
        num_attention_heads=max(1, model.num_attention_heads // size),
        num_key_value_heads=max(1, model.num_key_value_heads // size),
        intermediate_size=max(1, model.intermediate_size // size),
    )


def _stream(model: ModelConfig, sequences: int, tokens: int, dtype: torch.dtype, part: Part) -> Stream:
    """Return the input of a block as the layers before it leave it."""
    hidden = torch.empty(sequences, tokens, model.hidden_size, dtype=dtype, requires_grad=True)
    segments = torch.empty(sequences, tokens, dtype=torch.int32)
    stream = Stream(hidden, segments)
    if part == "decoder" and model.architecture == "encoder_decoder":
        stream = stream._replace(encoding=torch.empty_like(hidden, requires_grad=True), source_segments=segments)
    if model.positions == "relative":
        stream = stream._replace(relative_table=torch.empty(32, model.num_attention_heads, dtype=dtype, requires_grad=True))
    return stream


class _Kernel(torch.autograd.Function):
    """A fused kernel: it keeps its inputs, its result if the backward pass needs it, and a few float32 numbers for each row."""

    @staticmethod
    def forward(context: Any, keeps_result: bool, numbers: Sequence[int], *inputs: Tensor | None) -> Tensor:  # type: ignore[override]
        """Return a tensor like the first input. `numbers` is the shape of the float32 numbers."""
        assert inputs[0] is not None
        result = torch.empty_like(inputs[0])
        statistics = torch.empty(numbers, dtype=torch.float32, device=result.device)
        context.save_for_backward(*inputs, result if keeps_result else None, statistics)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Raise an error: only what the forward pass keeps is counted."""
        raise NotImplementedError


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **others: object
) -> Tensor:
    """Keep what fused attention keeps: queries, keys, values, the mask, the result, and the logarithm of each softmax denominator."""
    return _Kernel.apply(True, query.shape[:3], query, key, value, attn_mask)


def _attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **others: object
) -> Tensor:
    """Keep what attention keeps on a CPU, where short sequences take the plain products (model/attention.py)."""
    if max(query.shape[2], key.shape[2]) > LONGEST_PLAIN_ATTENTION and not dropout_p:
        return _attention(query, key, value, attn_mask)
    if query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.dropout((query * 0.5 @ key.transpose(2, 3)).softmax(dim=-1), dropout_p) @ value


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _Kernel.apply(False, (*input.shape[:-1], 2), input, weight, bias)


def _rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _Kernel.apply(False, input.shape[:-1], input, weight)


def _rms_norm_on_cpu(input: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the norm from its parts in float32, as torch does on a CPU."""
    wide = input.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(input.dtype)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keep one byte for each number, as the kernel of a GPU does; torch on a CPU keeps a number of the same type."""
    return torch.native_dropout(input, p, True)[0] if p and training else input


_STAND_INS: dict[str, dict[Callable, Callable]] = {
    "cpu": {F.scaled_dot_product_attention: _attention_on_cpu, F.layer_norm: _layer_norm, F.rms_norm: _rms_norm_on_cpu},
    "cuda": {F.scaled_dot_product_attention: _attention, F.layer_norm: _layer_norm, F.rms_norm: _rms_norm, F.dropout: _dropout},
}


class _StandIns(TorchFunctionMode):
    """Replaces kernels by their stand-ins for a device, in the calls that model/ makes."""

    def __init__(self, device: str):
        super().__init__()
        self.stand_ins = _STAND_INS[device]

    def __torch_function__(self, function: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        return self.stand_ins.get(function, function)(*args, **(kwargs or {}))
