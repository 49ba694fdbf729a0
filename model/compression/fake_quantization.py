"""Quantization-aware training: linear layers compute with rounded numbers; gradients ignore the rounding."""

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from model.compression.grids import Grid, fake_quantized_rows, round_to
from model.layers import Linear

Activations = Literal["none", "int8"]


def fake_quantize(block: nn.Module, grid: Grid, activations: Activations = "none") -> None:
    """Make the linear layers of a block compute with weights rounded to the grid and, with `activations`, with inputs rounded per token.

    The scales have the weights' type, so that rounding the trained weights in that type gives the numbers that were trained with.
    Gradients pass the rounding unchanged: the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432.
    """
    for module in block.modules():
        if isinstance(module, Linear):
            object.__setattr__(module, "forward", functools.partial(_rounded_linear, module, grid, activations))  # in place of the method


def _rounded_linear(linear: Linear, grid: Grid, activations: Activations, x: Tensor) -> Tensor:
    """Return the outputs of a linear layer, computed with rounded numbers.  [..., in] -> [..., out]"""
    product = _RoundedProduct.apply(x, linear.weight, grid, activations)
    return product if linear.bias is None else product + linear.bias


class _RoundedProduct(torch.autograd.Function):
    """The product round(x) round(W)^T with its gradients.  [..., in], [out, in] -> [..., out]

    It saves x and W and rounds them again in the backward pass: rounded copies of all weights would stay in memory under ZeRO-3.
    """

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, grid: Grid, activations: Activations) -> Tensor:  # type: ignore[override]
        """Return the product, and save x and W for the backward pass."""
        context.save_for_backward(x, weight)
        context.grid, context.activations = grid, activations
        return _rounded_inputs(x, activations) @ _rounded_weight(weight, grid).T

    @staticmethod
    def backward(context, gradient: Tensor):  # type: ignore[override]
        """Return the gradients of x and W: those of the product of the rounded numbers (straight-through estimator)."""
        x, weight = context.saved_tensors
        weight_gradient = gradient.flatten(0, -2).T @ _rounded_inputs(x, context.activations).flatten(0, -2)
        return gradient @ _rounded_weight(weight, context.grid), weight_gradient, None, None


def _rounded_weight(weight: Tensor, grid: Grid) -> Tensor:
    return round_to(weight.float(), grid, weight.dtype).weight().to(weight.dtype)


def _rounded_inputs(x: Tensor, activations: Activations) -> Tensor:
    return x if activations == "none" else fake_quantized_rows(x, activations)
