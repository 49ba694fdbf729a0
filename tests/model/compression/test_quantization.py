"""Rounding, GPTQ, and the factors that make rounding cost less."""

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
    """That depend on each other; a few are ten times as large as the others.  [tokens, in]"""
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
def test_gptq_changes_the_outputs_less_than_rounding(inputs, weight, grid, act_order):
    statistics = statistics_of(inputs)
    rounded, swept = rtn(weight, grid), gptq(weight, statistics, grid, act_order=act_order)
    assert swept.notes == ()
    assert torch.equal(swept.weight, swept.quantized.weight())
    assert torch.equal(swept.quantized.scale.float(), rounded.quantized.scale.float())
    error = output_error(swept.weight - weight, weight, statistics)
    assert error < 0.9 * output_error(rounded.weight - weight, weight, statistics)
    assert error == pytest.approx(float((inputs @ (swept.weight - weight).T).norm() / (inputs @ weight.T).norm()), rel=1e-3)


def test_gptq_keeps_rounding_and_says_so_where_the_sweep_ends_with_a_larger_error(weight):
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


def test_gptq_of_independent_inputs_is_rounding(weight):
    statistics = statistics_of(torch.diag(torch.rand(192) + 0.5))
    grid = Grid("int", 4, 64)
    assert torch.equal(gptq(weight, statistics, grid).weight, rtn(weight, grid).weight)


def test_gptq_rounds_and_says_so_where_the_hessian_cannot_be_inverted(weight):
    nowhere = torch.full((192, 192), float("nan"))
    changed = gptq(weight, InputStatistics(1, nowhere, nowhere[0], nowhere[0]), Grid("int", 4, 64))
    assert torch.equal(changed.weight, rtn(weight, Grid("int", 4, 64)).weight)
    assert "rounded to nearest" in changed.notes[0]


def test_scales_leave_the_product_and_make_what_is_rounded_cost_less(inputs, weight):
    statistics, grid = statistics_of(inputs), Grid("int", 4, 64)
    whole = inputs @ weight.T
    for scales in (smoothquant_scales([weight, weight[:8]], statistics), awq_scales([weight, weight[:8]], statistics, grid)):
        assert torch.allclose((inputs / scales) @ (weight * scales).T, whole, rtol=1e-4, atol=1e-3)
    error = lambda scales: (inputs / scales @ rtn(weight * scales, grid).weight.T - whole).norm()  # noqa: E731
    assert error(awq_scales([weight], statistics, grid)) < 0.9 * error(torch.ones(192))
    divided = statistics.divided_by(smoothquant_scales([weight], statistics))
    columns = weight.abs().amax(dim=0) * smoothquant_scales([weight], statistics)
    assert torch.allclose(divided.largest, columns, rtol=1e-4)  # strength 0.5: both sides are equally hard to round


def test_scales_can_divide_and_multiply_where_inputs_or_weights_are_always_zero(inputs, weight):
    silent = inputs.clone()
    silent[:, 5:9] = 0
    bare = weight.clone()
    bare[:, 7:11] = 0
    for scales in (
        smoothquant_scales([bare], statistics_of(silent)),
        awq_scales([bare], statistics_of(silent), Grid("int", 4, 64)),
        awq_scales([bare], statistics_of(0 * inputs), Grid("int", 4, 64)),
    ):
        assert (scales > 0).all()
        assert scales.isfinite().all()
    assert (smoothquant_scales([bare], statistics_of(silent))[5:11] == 1).all()
