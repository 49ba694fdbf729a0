"""Tests of grids: codes, scales and rounded weights equal those of compressed-tensors and those computed by hand."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam

from model.compression.grids import Grid, fake_quantized_rows, nearest, round_to

FP8, NVFP4, MXFP4 = Grid("fp8", 8, None), Grid("nvfp4", 4, 16), Grid("mxfp4", 4, 32)
GRIDS = [
    Grid("int", 4, 32),
    Grid("int", 4, 32, symmetric=False),
    Grid("int", 3, None),
    Grid("int", 8, None),
    Grid("int", 8, 64, symmetric=False),
    FP8,
    NVFP4,
    MXFP4,
]


def _weight() -> torch.Tensor:
    """Return a weight whose rows differ much in size, with one group of zeros and one group of positive entries."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 128, generator=generator) * torch.logspace(-3, 1, 24)[:, None]
    weight[3, 32:64] = 0
    weight[5, :32] = weight[5, :32].abs()
    return weight


def _their_arguments(grid: Grid) -> QuantizationArgs:
    if grid.kind == "nvfp4":
        return QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
    if grid.kind == "mxfp4":
        return QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    sizes = {"strategy": "channel"} if grid.group_size is None else {"strategy": "group", "group_size": grid.group_size}
    return QuantizationArgs(num_bits=grid.bits, type="int" if grid.kind == "int" else "float", symmetric=grid.symmetric, **sizes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_equals_compressed_tensors_bit_for_bit(grid):
    weight, arguments = _weight(), _their_arguments(grid)
    groups = weight.unflatten(1, (grid.num_groups(128), -1))
    whole = generate_gparam(weight.min(), weight.max()) if grid.kind == "nvfp4" else None
    scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), arguments, global_scale=whole)
    theirs = fake_quantize(weight, scale, zero_point, arguments, global_scale=whole)
    ours = round_to(weight, grid)
    assert torch.equal(ours.weight(), torch.nan_to_num(theirs))
    if ours.zero_point is not None:
        nonzero = groups.abs().amax(2) > 0  # for groups of zeros theirs is 0 / 0
        assert torch.equal(ours.zero_point[nonzero], zero_point[nonzero])
    if grid.kind in ("int", "fp8"):
        assert torch.equal(ours.scale, scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weight_on_the_grid_keeps_its_values_and_codes(grid):
    rounded = round_to(_weight(), grid, torch.bfloat16)
    again = rounded.with_codes_of(rounded.weight())
    assert torch.equal(again.weight(), rounded.weight())
    assert torch.equal(again.codes.float(), rounded.codes.float())
    by_column = [
        nearest(column, rounded.step[:, n * rounded.step.shape[1] // 128], _column(rounded.zero_point, n), grid)
        for n, column in enumerate(_weight().T)
    ]
    assert torch.equal(torch.stack(by_column, dim=1), rounded.weight())


def _column(zero_point: torch.Tensor | None, number: int) -> torch.Tensor | None:
    return None if zero_point is None else zero_point[:, number * zero_point.shape[1] // 128].float()


def test_codes_by_hand():
    four_bits = round_to(torch.tensor([[7.5, -7.5, 1.4, 0.6, -0.4, 0.0, 3.0, -15.0]]), Grid("int", 4, 4))
    assert four_bits.scale.tolist() == [[1.0, 2.0]]
    assert four_bits.codes.tolist() == [[7, -8, 1, 1, 0, 0, 2, -8]]  # 7.5 is clipped to 7, the largest code; ties go to even codes
    shifted = round_to(torch.tensor([[0.0, 1.0, 2.0, 15.0]]), Grid("int", 4, None, symmetric=False))
    assert (shifted.codes.tolist(), shifted.zero_point.tolist(), shifted.scale.tolist()) == ([[-8, -7, -6, 7]], [[-8]], [[1.0]])
    powers = torch.zeros(1, 32)
    powers[0, :4] = torch.tensor([6.0, -6.0, 0.5, 1.25])
    assert round_to(powers, MXFP4).codes[0, :4].tolist() == [7, 15, 1, 2]  # a tie goes to the even code
    assert round_to(powers, MXFP4).scale.tolist() == [[127]]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_activations_are_rounded_per_token_as_in_compressed_tensors(kind):
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)) * 7
    x[1, 2] = 0
    arguments = QuantizationArgs(num_bits=8, type="int" if kind == "int8" else "float", strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(1, 1))
    assert torch.equal(fake_quantized_rows(x, kind), fake_quantize(x, scale, zero_point, arguments))


def test_invalid_grid_is_refused_with_the_allowed_values():
    with pytest.raises(ValueError, match=r"group_size 128 does not divide a row of 96 entries; allowed: 16, 32, 96 or none"):
        round_to(torch.ones(2, 96), Grid("int", 4, 128))
    with pytest.raises(ValueError, match="nvfp4 has 4 bits, one scale per 16 entries"):
        Grid("nvfp4", 4, 128)
    with pytest.raises(ValueError, match="bits is 1; integers need 2 to 8"):
        Grid("int", 1)
