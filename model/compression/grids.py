"""What numbers a quantized weight may take, and weights that are stored as such.

Scales, zero points and codes are those that compressed-tensors computes from the same smallest and largest entries.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Byte = Literal["int8", "fp8"]
"""What is rounded while a network runs becomes one of these, symmetric."""

_FIXED = {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}  # bits and group size of the kinds that have but one of each
_CODES = {"int": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"fp8": 448.0, "nvfp4": 6.0, "mxfp4": 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Codes times a scale; a scale for each group of a row's entries, or one for the row.

    E4M3: Micikevicius et al. 2022, arXiv 2209.05433. E2M1 and powers of two: OCP Microscaling Formats (MX) Specification v1.0.
    Raises ValueError for bits, groups or a zero point that the kind has not.
    """

    kind: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    """Integers; E4M3; E2M1 with an E4M3 scale each 16 entries and a float32 one for the matrix; E2M1 with a power of two each 32."""
    bits: int = 4
    group_size: int | None = 128
    """Entries of a row that share a scale; None: the whole row."""
    symmetric: bool = True
    """Zero is a code's middle; else each group has the code of its zero beside its scale."""

    def __post_init__(self) -> None:
        if self.kind in _FIXED:
            bits, group_size = _FIXED[self.kind]
            if (self.bits, self.group_size, self.symmetric) != (bits, group_size, True):
                shared = "a scale for each row" if group_size is None else f"a scale for each {group_size} entries"
                raise ValueError(
                    f"{self.kind} has {bits} bits, {shared} and is symmetric: bits={bits}, group_size={group_size}, symmetric=True; "
                    f"given are bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
                )
        elif not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; integers have 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it is at least 1, or None for the whole row")

    def num_groups(self, in_size: int) -> int:
        """In a row of so many entries. Raises ValueError where they are no whole groups."""
        if self.group_size is None:
            return 1
        if in_size % self.group_size:
            sizes = [size for size in (16, 32, 64, 96, 128, 256) if in_size % size == 0]
            others = f"{', '.join(map(str, sizes))} or none (one scale for the row)" if sizes else "only none (one scale for the row)"
            raise ValueError(f"group_size {self.group_size} does not divide a row of {in_size} entries; what would do: {others}")
        return in_size // self.group_size

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest of what a scale multiplies."""
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
    """[out, groups], in the type that it is stored in: of nvfp4 float8_e4m3fn, of mxfp4 the exponent plus 127 as uint8."""
    zero_point: Tensor | None = None
    """[out, groups] int8, in the codes' own range; None where the grid is symmetric."""
    global_scale: Tensor | None = None
    """[1] float32, nvfp4 alone: what the scales were multiplied by."""

    @property
    def step(self) -> Tensor:
        """What codes are multiplied by.  [out, groups] float32"""
        if self.grid.kind == "mxfp4":
            return self.scale.view(torch.float8_e8m0fnu).float()
        step = self.scale.float()
        return step if self.global_scale is None else step / self.global_scale

    def weight(self) -> Tensor:
        """[out, in] float32: what whoever loads it computes with."""
        if self.grid.kind in ("nvfp4", "mxfp4"):
            values = torch.tensor((*_E2M1, *(-value for value in _E2M1)), device=self.codes.device)[self.codes.int()]
        else:
            values = self.codes.float()
        values = _grouped(values, self.step)
        if self.zero_point is not None:
            values = values - self.zero_point.float()[..., None]
        return (values * self.step[..., None]).flatten(1)

    def holding(self, weight: Tensor) -> "Quantized":
        """With these scales, the codes nearest to this weight.  [out, in]"""
        zero_point = None if self.zero_point is None else self.zero_point[..., None]
        values = _values(_grouped(weight, self.step), self.step[..., None], zero_point, self.grid).flatten(1)
        if self.grid.kind in ("int", "fp8"):
            codes = values.to(_CODES[self.grid.kind])
        else:
            codes = (torch.bucketize(values.abs(), values.new_tensor(_E2M1)) + 8 * values.signbit()).to(torch.uint8)
        return dataclasses.replace(self, codes=codes)


def round_to(weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Round to nearest; the smallest and the largest of each group are what the grid spans.  [out, in] float32

    `scale_dtype`: what the scales of int and fp8 are stored in. Raises ValueError where the groups do not divide the rows.
    """
    least, most = weight.unflatten(1, (grid.num_groups(weight.shape[1]), -1)).aminmax(dim=2)
    least, most = least.clamp(max=0), most.clamp(min=0)
    largest = torch.maximum(-least, most)
    low, high = grid.range
    zero_point = global_scale = None
    if grid.kind == "mxfp4":
        scale = _power_of_two(largest)
    elif grid.kind == "nvfp4":
        # of all scales, the largest becomes E4M3's largest
        global_scale = _LARGEST["fp8"] * high / largest.max().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
        global_scale = torch.where(global_scale.isfinite(), global_scale, 1.0)
        scale = _stored((global_scale * (largest / high)).clamp(max=_LARGEST["fp8"]), torch.float8_e4m3fn)
    elif grid.symmetric:
        scale = scale_of(largest, grid, scale_dtype)
    else:
        scale = _stored((most - least) / (high - low), scale_dtype)
        zero_point = (low - least / scale.float()).clamp(low, high).round().to(torch.int8)
    return Quantized(grid, torch.empty(0), scale, zero_point, global_scale).holding(weight)


def nearest(weight: Tensor, step: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """What each entry becomes once it is stored. All are of one shape, or spread to it."""
    values = _values(weight, step, zero_point, grid)
    return (values if zero_point is None else values - zero_point) * step


def scale_of(largest: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Of a symmetric grid that numbers up to `largest` in size span, in the type that it is stored in.  [...] -> same"""
    low, high = grid.range
    return _stored(largest / ((high - low) / 2), dtype)


def grid_of(kind: Byte) -> Grid:
    return Grid("int" if kind == "int8" else "fp8", 8, None)


def fake_quantized_rows(x: Tensor, kind: Byte) -> Tensor:
    """Each token's activations rounded on a symmetric grid that its own largest spans.  [..., in] -> same

    What compressed-tensors calls dynamic quantization by token; computed in the type of x.
    """
    grid = grid_of(kind)
    return nearest(x, scale_of(x.abs().amax(dim=-1, keepdim=True), grid, x.dtype), None, grid)


def codes_of(x: Tensor, kind: Byte, scale: Tensor) -> Tensor:
    """The codes, int8 or float8_e4m3fn, that times the scale come nearest to each entry.  [...] -> same"""
    grid = grid_of(kind)
    return _values(x, scale, None, grid).to(_CODES[grid.kind])


def _values(weight: Tensor, step: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """What is multiplied by the step, after the zero point is taken away: of the type of the weight, on the grid."""
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
    """E8M0, as uint8. The largest lies at 4 to 7 steps, not at 4 to 8 as in section 6.3 of the specification: less of it is cut off."""
    mantissa, exponent = largest.frexp()  # 0.5 <= mantissa < 1
    return (127 + exponent - 1 + (mantissa >= 0.875) - 2).clamp(0, 254).to(torch.uint8)
