"""Quantization methods: round to nearest, or GPTQ, where later columns compensate the errors of earlier ones."""

import torch
from torch import Tensor

from model.compression.grids import Grid, nearest, round_to
from model.compression.statistics import InputStatistics
from model.compression.sweep import Changed, sweep


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

    Frantar et al. 2022, arXiv 2210.17323. The scales are those of rounding, computed before the sweep: with `act_order`, which takes
    the columns with the largest inputs first, a group still consists of neighbours. `damping` is the share of the Hessian's mean diagonal
    that is added to it. Falls back to rounding, with a note, if the Hessian cannot be inverted or rounding has the smaller output error.
    """
    rounded = round_to(weight, grid, scale_dtype)
    plain = rounded.weight()
    step = rounded.step.T.contiguous()
    zero_point = None if rounded.zero_point is None else rounded.zero_point.T.float()
    size = grid.group_size or weight.shape[1]

    def change(column: int, batch: Tensor, diagonal: Tensor) -> Tensor:
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
