"""Tests of quantization-aware training: the trained network equals the network with rounded weights."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from model.compression.fake_quantization import fake_quantize
from model.compression.grids import Grid, fake_quantized_rows
from model.compression.quantization import rtn
from model.config import ModelConfig
from model.layers import Linear, Stream
from model.transformer import Block


@pytest.fixture(scope="module")
def block() -> Block:
    return Block(ModelConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, biases=True), 0, 0)


def linears(block: Block) -> list[Linear]:
    return [module for module in block.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [Grid("int", 4, 16), Grid("int", 3, None, symmetric=False), Grid("int", 8, None)], ids=str)
def test_rounded_trained_weights_give_the_network_that_was_trained(block, grid, dtype):
    trained = copy.deepcopy(block).to(dtype)
    exported = copy.deepcopy(trained)
    fake_quantize(trained, grid)
    for linear in linears(exported):
        linear.weight.data = rtn(linear.weight.float(), grid, dtype).weight.to(dtype)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    stream = Stream(hidden, torch.ones(2, 5, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(trained(stream).hidden, exported(stream).hidden)
        assert not torch.equal(trained(stream).hidden, copy.deepcopy(block).to(dtype)(stream).hidden)


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_gradients_pass_the_rounding_unchanged(block, activations):
    grid = Grid("int", 4, 16, symmetric=False)
    ours, plain = copy.deepcopy(block), copy.deepcopy(block)
    fake_quantize(ours, grid, activations)
    for linear in linears(plain):
        linear.forward = functools.partial(straight_through, linear, grid, activations)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for network in (ours, plain):
        x = hidden.clone().requires_grad_()
        (network(Stream(x, torch.ones(2, 5, dtype=torch.long))).hidden ** 2).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in network.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def straight_through(linear: Linear, grid: Grid, activations: str, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a linear layer by the usual straight-through trick: the rounding difference is a constant."""
    weight = linear.weight + (rtn(linear.weight.detach(), grid).weight - linear.weight.detach())
    return F.linear(x if activations == "none" else x + (fake_quantized_rows(x, "int8") - x).detach(), weight, linear.bias)
