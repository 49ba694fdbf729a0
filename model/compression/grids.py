"""The numbers that a quantized weight can take, and weights stored as codes.

Scales, zero points and codes equal those that compressed-tensors computes from the same smallest and largest entries.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Byte = Literal["int8", "fp8"]
"""Types to which activations, keys and values are rounded while a network runs; both are symmetric."""

_FIXED = {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}  # bits and group size of the kinds for which both are fixed
_CODES = {"int": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"fp8": 448.0, "nvfp4": 6.0, "mxfp4": 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of numbers: codes times a scale, with one scale per group of entries in a row, or one per row.

    E4M3: Micikevicius et al. 2022, arXiv 2209.05433. E2M1 and powers of two: OCP Microscaling Formats (MX) Specification v1.0.
    Raises ValueError for bits, groups or a zero point that the kind does not support.
    """

    kind: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    """int: integers. fp8: E4M3. nvfp4: E2M1 with an E4M3 scale per 16 entries and a float32 scale per matrix. mxfp4: E2M1 with a power of
    two per 32 entries."""
    bits: int = 4
    """Bits per code."""
    group_size: int | None = 128
    """Entries of a row that share a scale; None: the whole row."""
    symmetric: bool = True
    """True if code 0 stands for zero; false if each group also stores the code that stands for zero."""

    def __post_init__(self) -> None:
        if self.kind in _FIXED:
            bits, group_size = _FIXED[self.kind]
            if (self.bits, self.group_size, self.symmetric) != (bits, group_size, True):
                shared = "one scale per row" if group_size is None else f"one scale per {group_size} entries"
                raise ValueError(
                    f"{self.kind} has {bits} bits, {shared}, and is symmetric (got {self.bits} bits, {str(self).partition(', ')[2]})"
                )
        elif not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; integers need 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be at least 1, or None for the whole row")

    def __str__(self) -> str:
        width = f"int{self.bits}" if self.kind == "int" else self.kind
        per = "one scale per row" if self.group_size is None else f"one scale per {self.group_size}"
        return f"{width}, {per}{'' if self.symmetric else ', asymmetric'}"

    def num_groups(self, in_size: int) -> int:
        """Number of groups in a row of `in_size` entries. Raises ValueError if the groups do not divide the row."""
        if self.group_size is None:
            return 1
        if in_size % self.group_size:
            sizes = [size for size in (16, 32, 64, 96, 128, 256) if in_size % size == 0]
            others = f"{', '.join(map(str, sizes))} or none (one scale for the row)" if sizes else "only none (one scale for the row)"
            raise ValueError(f"group_size {self.group_size} does not divide a row of {in_size} entries; allowed: {others}")
        return in_size // self.group_size

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest number that a scale multiplies."""
        if self.kind == "int":
            return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        return -_LARGEST[self.kind], _LARGEST[self.kind]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight [out, in] as codes on a grid."""

    grid: Grid
    codes: Tensor
    """[out, in]: int8 for int; float8_e4m3fn for fp8; for E2M1 its 4 bits, 0 ... 15, as uint8."""
    scale: Tensor
    """[out, groups], in its stored type: float8_e4m3fn for nvfp4; the exponent plus 127 as uint8 for mxfp4."""
    zero_point: Tensor | None = None
    """[out, groups] int8, in the range of the codes; None if the grid is symmetric."""
    global_scale: Tensor | None = None
    """[1] float32, only for nvfp4: the factor by which the scales were multiplied."""

    @property
    def step(self) -> Tensor:
        """Factor of the codes.  [out, groups] float32"""
        if self.grid.kind == "mxfp4":
            return self.scale.view(torch.float8_e8m0fnu).float()
        step = self.scale.float()
        return step if self.global_scale is None else step / self.global_scale

    def weight(self) -> Tensor:
        """The weight that a reader of the codes computes with.  [out, in] float32"""
        if self.grid.kind in ("nvfp4", "mxfp4"):
            values = torch.tensor((*_E2M1, *(-value for value in _E2M1)), device=self.codes.device)[self.codes.int()]
        else:
            values = self.codes.float()
        values = _grouped(values, self.step)
        if self.zero_point is not None:
            values = values - self.zero_point.float()[..., None]
        return (values * self.step[..., None]).flatten(1)

    def with_codes_of(self, weight: Tensor) -> "Quantized":
        """Return a Quantized with the same scales and the codes nearest to `weight`.  [out, in]"""
        zero_point = None if self.zero_point is None else self.zero_point[..., None]
        values = _values(_grouped(weight, self.step), self.step[..., None], zero_point, self.grid).flatten(1)
        if self.grid.kind in ("int", "fp8"):
            codes = values.to(_CODES[self.grid.kind])
        else:
            codes = (torch.bucketize(values.abs(), values.new_tensor(_E2M1)) + 8 * values.signbit()).to(torch.uint8)
        return dataclasses.replace(self, codes=codes)


def round_to(weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Round to nearest, on a grid from the smallest to the largest entry of each group.  [out, in] float32

    `scale_dtype` is the stored type of the scales of int and fp8. Raises ValueError if the groups do not divide the rows.
    """
    least, most = weight.unflatten(1, (grid.num_groups(weight.shape[1]), -1)).aminmax(dim=2)
    least, most = least.clamp(max=0), most.clamp(min=0)
    largest = torch.maximum(-least, most)
    low, high = grid.range
    zero_point = global_scale = None
    if grid.kind == "mxfp4":
        scale = _power_of_two(largest)
    elif grid.kind == "nvfp4":
        # the largest scale becomes the largest number of E4M3
        global_scale = _LARGEST["fp8"] * high / largest.max().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
        global_scale = torch.where(global_scale.isfinite(), global_scale, 1.0)
        scale = _stored((global_scale * (largest / high)).clamp(max=_LARGEST["fp8"]), torch.float8_e4m3fn)
    elif grid.symmetric:
        scale = scale_of(largest, grid, scale_dtype)
    else:
        scale = _stored((most - least) / (high - low), scale_dtype)
        zero_point = (low - least / scale.float()).clamp(low, high).round().to(torch.int8)
    return Quantized(grid, torch.empty(0), scale, zero_point, global_scale).with_codes_of(weight)


def nearest(weight: Tensor, step: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Return each entry rounded to the grid. All tensors have one shape or are broadcast to it."""
    values = _values(weight, step, zero_point, grid)
    return (values if zero_point is None else values - zero_point) * step


def scale_of(largest: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return the scale of a symmetric grid for numbers up to `largest` in size, in its stored type.  [...] -> same"""
    low, high = grid.range
    return _stored(largest / ((high - low) / 2), dtype)


def grid_of(kind: Byte) -> Grid:
    """Return the grid of activations, keys or values: symmetric, one scale per row."""
    return Grid("int" if kind == "int8" else "fp8", 8, None)


def fake_quantized_rows(x: Tensor, kind: Byte) -> Tensor:
    """Round the activations of each token on a symmetric grid whose range is the token's largest activation.  [..., in] -> same

    compressed-tensors calls this dynamic quantization by token. All numbers have the type of x.
    """
    grid = grid_of(kind)
    return nearest(x, scale_of(x.abs().amax(dim=-1, keepdim=True), grid, x.dtype), None, grid)


def codes_of(x: Tensor, kind: Byte, scale: Tensor) -> Tensor:
    """Return the codes, int8 or float8_e4m3fn, whose product with the scale is nearest to each entry.  [...] -> same"""
    grid = grid_of(kind)
    return _values(x, scale, None, grid).to(_CODES[grid.kind])


def _values(weight: Tensor, step: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Return the numbers on the grid that the step multiplies after the zero point is subtracted, in the type of the weight."""
    values = weight / step
    if zero_point is not None:
        values = values + zero_point
    values = values.clamp(*grid.range)
    if grid.kind == "int":
        return values.round()
    if grid.kind == "fp8":
        return values.to(torch.float8_e4m3fn).to(weight.dtype)
    size = values.abs()
    spacing = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (values / spacing).round() * spacing


def _grouped(weight: Tensor, step: Tensor) -> Tensor:
    return weight.unflatten(1, (step.shape[1], -1))


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale.to(dtype)
    return torch.where(scale.float() == 0, torch.finfo(dtype).eps, scale.float()).to(dtype)


def _power_of_two(largest: Tensor) -> Tensor:
    """Return E8M0 scales, uint8. The largest entry is 3.5 to 7 steps (4 to 8 in section 6.3 of the specification), which clips less."""
    mantissa, exponent = largest.frexp()  # 0.5 <= mantissa < 1
    return (127 + exponent - 1 + (mantissa >= 0.875) - 2).clamp(0, 254).to(torch.uint8)
