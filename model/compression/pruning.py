"""Pruning methods, which set weights to zero: magnitude pruning, Wanda and SparseGPT."""

import dataclasses
import re

import torch
from torch import Tensor

from model.compression.quantization import BATCH, Changed, sweep
from model.compression.statistics import InputStatistics


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The share of weights that become zero, and its pattern."""

    fraction: float
    """Share of all weights."""
    pattern: tuple[int, int] | None = None
    """(zeros, each): number of zeros in every `each` neighbours of a row; None: no pattern."""

    @classmethod
    def parse(cls, text: str) -> "Sparsity":
        """Parse "0.5", or "2:4" for 2 zeros in every 4 neighbours. Raises ValueError for anything else."""
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            zeros, each = map(int, match.groups())
            if 0 < zeros < each and BATCH % each == 0:
                return cls(zeros / each, (zeros, each))
        elif re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
            return cls(float(text))
        raise ValueError(
            f"sparsity {text!r} is neither a fraction above 0 and below 1, such as 0.5, nor zeros:neighbours, such as 2:4, "
            f"with fewer zeros than neighbours and these a power of two up to {BATCH}"
        )

    def __str__(self) -> str:
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"{self.fraction:g}"

    def check(self, in_size: int) -> None:
        """Raise ValueError if the pattern does not divide a row of `in_size` entries."""
        if self.pattern and in_size % self.pattern[1]:
            raise ValueError(f"sparsity {self}: a row of {in_size} entries is not a multiple of {self.pattern[1]}")


def magnitude(weight: Tensor, sparsity: Sparsity) -> Changed:
    """Set the smallest weights of the matrix, or of each pattern, to zero.  [out, in]"""
    return Changed(weight.masked_fill(_mask(weight.abs(), sparsity, by_row=False), 0))


def wanda(weight: Tensor, statistics: InputStatistics, sparsity: Sparsity) -> Changed:
    """Set the weights with the smallest |weight| ||input|| of each row, or of each pattern, to zero.  [out, in]

    Sun et al. 2023, arXiv 2306.11695, equation 1.
    """
    return Changed(weight.masked_fill(_mask(weight.abs() * statistics.norms, sparsity, by_row=True), 0))


def sparsegpt(weight: Tensor, statistics: InputStatistics, sparsity: Sparsity, damping: float = 0.01) -> Changed:
    """Set the weights that cost least to zero; the weights to their right compensate.  [out, in]

    Frantar and Alistarh 2023, arXiv 2301.00774. Each batch of columns, or each pattern, has the same share of zeros.
    `damping` is the share of the Hessian's mean diagonal that is added to it. Falls back to Wanda, with a note, if the Hessian cannot be
    inverted.
    """
    sparsity.check(weight.shape[1])
    each = sparsity.pattern[1] if sparsity.pattern else BATCH
    mask = torch.empty(0)

    def change(column: int, batch: Tensor, diagonal: Tensor) -> Tensor:
        """Return the column with its pruned weights set to zero; the first column of a batch or pattern chooses them for all."""
        nonlocal mask
        if column % each == 0:
            costs = (batch[:each] / diagonal[:each, None]).square()
            if sparsity.pattern:
                mask = _lowest(costs.T, sparsity.pattern[0]).T
            else:  # this share keeps the total exact
                before, after = (round(sparsity.fraction * end * len(weight)) for end in (column, column + len(costs)))
                mask = _lowest(costs.reshape(1, -1), after - before).view_as(costs)
        return batch[0].masked_fill(mask[column % each], 0)

    swept = sweep(weight, statistics.second_moment, damping, change)
    if swept is None:
        note = "the Hessian could not be inverted even with a thousand times the damping: pruned by Wanda"
        return dataclasses.replace(wanda(weight, statistics, sparsity), notes=(note,))
    return Changed(swept[0], damping=swept[1])


def _mask(scores: Tensor, sparsity: Sparsity, by_row: bool) -> Tensor:
    """Return True for weights that become zero.  [out, in] -> same"""
    if sparsity.pattern:
        sparsity.check(scores.shape[1])
        zeros, each = sparsity.pattern
        return _lowest(scores.reshape(-1, each), zeros).view_as(scores)
    rows = scores if by_row else scores.reshape(1, -1)
    return _lowest(rows, round(sparsity.fraction * rows.shape[1])).view_as(scores)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Return True for the `count` lowest entries of each row.  [rows, entries] -> same"""
    indices = scores.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)
