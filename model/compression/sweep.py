"""The sweep over a weight's columns that GPTQ and SparseGPT share: change a column, let those to its right make up for it.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1; Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from model.compression.grids import Quantized

BATCH = 128
"""Columns within which errors are passed on at once; those behind get them together."""

Change = Callable[[int, Tensor, Tensor], Tensor]
"""(a column's number, it and those behind it in its batch [columns, out], the factor's diagonal there [columns]) -> its new values [out]"""


@dataclasses.dataclass(frozen=True)
class Changed:
    """What a method made of a weight."""

    weight: Tensor
    """[out, in] float32"""
    quantized: Quantized | None = None
    damping: float | None = None
    """Share of the Hessian's mean diagonal that was added to it; None where nothing was inverted."""
    notes: tuple[str, ...] = ()
    """What went another way than was asked."""


def sweep(
    weight: Tensor, second_moment: Tensor, damping: float, change: Change, order: Tensor | None = None
) -> tuple[Tensor, float] | None:
    """The changed weight [out, in] and the damping that it took; None where none up to a thousandfold made the Hessian invertible.

    Columns of inputs that were always zero become zero. `order` [in]: the columns as they are to be taken.
    """
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    columns = order.tolist()
    for attempt in range(4):
        taken = damping * 10**attempt
        factor = _inverse_factor(second_moment, taken, order)
        if factor is None:
            continue
        values = weight.T.index_select(0, order)  # a column lies together
        values[second_moment.diagonal()[order] == 0] = 0
        _sweep(values, factor, columns, change)
        if values.isfinite().all():
            swept = torch.empty_like(values)
            swept[order] = values
            return swept.T.contiguous(), taken
    return None


def _sweep(values: Tensor, factor: Tensor, columns: list[int], change: Change) -> None:
    """values [in, out], in place"""
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
    """The upper triangle U with U^T U = (H + damping mean(diag H))^-1, H in this order; None where H is not positive.  [in, in]

    With all reversed the lower Cholesky factor of H is the upper one of its inverse, inverted: one inversion less.
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
    """A lower triangle, in place, by halves: solving for the unit matrix would take two more of its size.  [n, n]"""
    half = len(lower) // 2
    if half < BATCH:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False))
        return
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    below.copy_(-torch.linalg.solve_triangular(second, below @ first, upper=False))
    _invert(second)
