"""Quantization methods, round to nearest and GPTQ, and the sweep over columns that GPTQ shares with SparseGPT.

The sweep changes one column of a weight at a time; the columns to its right compensate the error. Frantar et al. 2022, arXiv 2210.17323,
algorithm 1; Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from model.compression.grids import Grid, Quantized, nearest, round_to
from model.compression.statistics import InputStatistics

BATCH = 128
"""Number of columns that get each error at once; later columns get the errors of a whole batch in one product."""

Change = Callable[[int, Tensor, Tensor], Tensor]
"""(index of a column, this and the later columns of its batch [columns, out], the factor's diagonal for them [columns])
-> new values of the column [out]"""


@dataclasses.dataclass(frozen=True)
class Changed:
    """The result of a method for one weight."""

    weight: Tensor
    """[out, in] float32"""
    quantized: Quantized | None = None
    """The weight as codes; None if the method does not quantize."""
    damping: float | None = None
    """Share of the Hessian's mean diagonal that was added to it; None if nothing was inverted."""
    notes: tuple[str, ...] = ()
    """Deviations from the requested method."""


def rtn(weight: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> Changed:
    """Round each weight to its nearest code.  [out, in]"""
    rounded = round_to(weight, grid, scale_dtype)
    return Changed(rounded.weight(), rounded)


def gptq(
    weight: Tensor,
    statistics: InputStatistics,
    grid: Grid,
    scale_dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
    act_order: bool = False,
) -> Changed:
    """Round each column to its nearest codes; the columns after it compensate its error.  [out, in]

    Frantar et al. 2022, arXiv 2210.17323. The scales are those of rounding to nearest, computed before the sweep. With `act_order`, the
    columns with the largest inputs come first; a group still consists of neighbours. `damping` is the share of the Hessian's mean diagonal
    that is added to it. Falls back to rounding, with a note, if the Hessian cannot be inverted or rounding has the smaller output error.
    """
    rounded = round_to(weight, grid, scale_dtype)
    plain = rounded.weight()
    step = rounded.step.T.contiguous()
    zero_point = None if rounded.zero_point is None else rounded.zero_point.T.float()
    size = grid.group_size or weight.shape[1]

    def change(column: int, batch: Tensor, diagonal: Tensor) -> Tensor:
        """Return the column rounded to its grid."""
        group = column // size
        return nearest(batch[0], step[group], None if zero_point is None else zero_point[group], grid)

    order = statistics.second_moment.diagonal().argsort(descending=True) if act_order else None
    swept = sweep(weight, statistics.second_moment, damping, change, order)
    if swept is None:
        note = "the Hessian could not be inverted even with a thousand times the damping: rounded to nearest"
        return Changed(plain, rounded, notes=(note,))
    quantized = rounded.with_codes_of(swept[0])
    changed = quantized.weight()
    # The difference of the two squared errors, of changes A and B: tr(A H A^T) - tr(B H B^T) = tr((A - B) H (A + B)^T).
    worse = ((changed - plain) @ statistics.second_moment * (changed + plain - 2 * weight)).sum(dtype=torch.float64)
    if worse > 0:
        return Changed(plain, rounded, swept[1], ("rounding's output error is smaller than GPTQ's: rounded to nearest",))
    return Changed(changed, quantized, swept[1])


def sweep(
    weight: Tensor, second_moment: Tensor, damping: float, change: Change, order: Tensor | None = None
) -> tuple[Tensor, float] | None:
    """Return the changed weight [out, in] and the damping used; None if a thousand times the damping did not make the Hessian invertible.

    Columns of inputs that were always zero become zero. `order` [in] is the order of the columns.
    """
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    columns = order.tolist()
    for attempt in range(4):
        tried_damping = damping * 10**attempt
        factor = _inverse_factor(second_moment, tried_damping, order)
        if factor is None:
            continue
        values = weight.T.index_select(0, order)  # the entries of a column are contiguous
        values[second_moment.diagonal()[order] == 0] = 0
        _sweep(values, factor, columns, change)
        if values.isfinite().all():
            swept = torch.empty_like(values)
            swept[order] = values
            return swept.T.contiguous(), tried_damping
    return None


def _sweep(values: Tensor, factor: Tensor, columns: list[int], change: Change) -> None:
    """Change the columns of the weight in place; `values` is its transpose, in the order of `columns`.  [in, out]"""
    for start in range(0, len(values), BATCH):
        batch = values[start : start + BATCH]
        end = start + len(batch)
        within = factor[start:end, start:end]
        diagonal = within.diagonal()
        errors = torch.empty_like(batch)
        for i in range(len(batch)):
            changed = change(columns[start + i], batch[i:], diagonal[i:])
            torch.div(batch[i] - changed, diagonal[i], out=errors[i])
            batch[i] = changed
            batch[i + 1 :].addmm_(within[i, i + 1 :, None], errors[i : i + 1], alpha=-1)
        values[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)


def _inverse_factor(second_moment: Tensor, damping: float, order: Tensor) -> Tensor | None:
    """Return the upper triangle U with U^T U = (H + damping mean(diag H))^-1, H in this order; None if H is not positive.  [in, in]

    In reversed order, the inverted lower Cholesky factor of H is the upper factor of its inverse, which saves one inversion.
    """
    backwards = order.flip(0)
    hessian = second_moment[backwards[:, None], backwards]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean()
    diagonal[dead] = mean
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(hessian)
    del hessian, diagonal
    if failed or not lower.diagonal().isfinite().all():
        return None
    _invert(lower)
    return lower.flip((0, 1))


def _invert(lower: Tensor) -> None:
    """Invert a lower triangle in place, by halves: solving for the unit matrix would need two more matrices of its size.  [n, n]"""
    half = len(lower) // 2
    if half < BATCH:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False))
        return
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    below.copy_(-torch.linalg.solve_triangular(second, below @ first, upper=False))
    _invert(second)
