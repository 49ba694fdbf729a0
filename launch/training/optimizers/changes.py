"""How far a step moved each matrix, measured on the slices that a rank has of it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from launch.training.optimizers.pieces import Piece, Pieces
from launch.training.optimizers.trust_ratio import sum_of_squares


class Changes:
    """Norms of matrices and of their changes in a step that is reported. In other steps nothing is measured."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}  # by name: [2], of this rank's slice

    @contextlib.contextmanager
    def measured(self, pieces: Pieces, piece: Piece, weight: Tensor) -> Iterator[None]:
        """Measure what happens in this context to `weight`, the slice `piece` of a parameter."""
        if not pieces.is_reported or piece.is_replica or len(piece.shard_slice.shape) < 2:
            yield
            return
        before = weight.clone()
        yield
        self._squares[piece.shard_slice.name] = torch.stack([sum_of_squares(before), sum_of_squares(weight - before)])

    def take(self, pieces: Pieces) -> dict[str, tuple[float, float]]:
        """Return the norms of each whole matrix and of its change, and forget them. All ranks of a stage call this together.

        They add their sums of squares in one all-reduce of two float64 a matrix.
        """
        names = [name for name, shape in pieces.shapes.items() if len(shape) >= 2]
        if not names:
            return {}
        squares = torch.zeros(len(names), 2, dtype=torch.float64, device=pieces.device)
        for row, name in enumerate(names):
            if name in self._squares:
                squares[row] = self._squares[name]
        self._squares = {}
        return dict(zip(names, map(tuple, pieces.sum(squares).sqrt().tolist()), strict=True))
