"""Tests of rounding to nearest, GPTQ, and the scales that reduce the error of rounding."""

import pytest
import torch
from torch import Tensor

from model.compression.grids import Grid
from model.compression.quantization import gptq, rtn
from model.compression.scaling import awq_scales, smoothquant_scales
from model.compression.statistics import InputStatistics, output_error

GRIDS = [
    Grid("int", 4, 64),
    Grid("int", 3, 64, symmetric=False),
    Grid("int", 2, None),
    Grid("int", 8, None),
    Grid("fp8", 8, None),
    Grid("nvfp4", 4, 16),
    Grid("mxfp4", 4, 32),
]


def statistics_of(inputs: Tensor) -> InputStatistics:
    return InputStatistics(len(inputs), inputs.T @ inputs, inputs.abs().mean(dim=0), inputs.abs().amax(dim=0))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Return correlated inputs; a few columns are ten times as large as the others.  [tokens, in]"""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(600, 24, generator=generator) @ torch.randn(24, 192, generator=generator)
    inputs = mixed / 5 + torch.randn(600, 192, generator=generator)
    inputs[:, ::40] *= 10
    return inputs


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_has_less_output_error_than_rounding(inputs, weight, grid, act_order):
    statistics = statistics_of(inputs)
    rounded, swept = rtn(weight, grid), gptq(weight, statistics, grid, act_order=act_order)
    assert swept.notes == ()
    assert torch.equal(swept.weight, swept.quantized.weight())
    assert torch.equal(swept.quantized.scale.float(), rounded.quantized.scale.float())
    error = output_error(swept.weight - weight, weight, statistics)
    assert error < 0.9 * output_error(rounded.weight - weight, weight, statistics)
    assert error == pytest.approx(float((inputs @ (swept.weight - weight).T).norm() / (inputs @ weight.T).norm()), rel=1e-3)


def test_gptq_falls_back_to_rounding_if_its_error_is_larger(weight):
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(1, 192, generator=generator)
    inputs = torch.randn(400, 1, generator=generator) @ direction + 1e-4 * torch.randn(400, 192, generator=generator)
    statistics, grid = statistics_of(inputs), Grid("int", 2, None)
    outcomes = set()
    for row in weight[:8, None]:
        swept, rounded = gptq(row, statistics, grid, damping=50.0), rtn(row, grid).weight
        assert output_error(swept.weight - row, row, statistics) <= output_error(rounded - row, row, statistics) * (1 + 1e-5)
        outcomes.add(swept.notes)
    assert outcomes == {(), ("rounding's output error is smaller than GPTQ's: rounded to nearest",)}


def test_gptq_of_independent_inputs_equals_rounding(weight):
    statistics = statistics_of(torch.diag(torch.rand(192) + 0.5))
    grid = Grid("int", 4, 64)
    assert torch.equal(gptq(weight, statistics, grid).weight, rtn(weight, grid).weight)


def test_gptq_falls_back_to_rounding_if_the_hessian_is_singular(weight):
    not_a_number = torch.full((192, 192), float("nan"))
    changed = gptq(weight, InputStatistics(1, not_a_number, not_a_number[0], not_a_number[0]), Grid("int", 4, 64))
    assert torch.equal(changed.weight, rtn(weight, Grid("int", 4, 64)).weight)
    assert "rounded to nearest" in changed.notes[0]


def test_scales_keep_the_product_and_reduce_the_rounding_error(inputs, weight):
    statistics, grid = statistics_of(inputs), Grid("int", 4, 64)
    whole = inputs @ weight.T
    for scales in (smoothquant_scales([weight, weight[:8]], statistics), awq_scales([weight, weight[:8]], statistics, grid)):
        assert torch.allclose((inputs / scales) @ (weight * scales).T, whole, rtol=1e-4, atol=1e-3)
    error = lambda scales: (inputs / scales @ rtn(weight * scales, grid).weight.T - whole).norm()  # noqa: E731
    assert error(awq_scales([weight], statistics, grid)) < 0.9 * error(torch.ones(192))
    divided = statistics.divided_by(smoothquant_scales([weight], statistics))
    columns = weight.abs().amax(dim=0) * smoothquant_scales([weight], statistics)
    assert torch.allclose(divided.largest, columns, rtol=1e-4)  # strength 0.5: inputs and weights have equal ranges


def test_scales_are_positive_if_inputs_or_weights_are_zero(inputs, weight):
    zero_inputs = inputs.clone()
    zero_inputs[:, 5:9] = 0
    zero_columns = weight.clone()
    zero_columns[:, 7:11] = 0
    for scales in (
        smoothquant_scales([zero_columns], statistics_of(zero_inputs)),
        awq_scales([zero_columns], statistics_of(zero_inputs), Grid("int", 4, 64)),
        awq_scales([zero_columns], statistics_of(0 * inputs), Grid("int", 4, 64)),
    ):
        assert (scales > 0).all()
        assert scales.isfinite().all()
    assert (smoothquant_scales([zero_columns], statistics_of(zero_inputs))[5:11] == 1).all()
