"""How far a step moved each matrix, measured on the slices that a rank has of it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from launch.training.optimizers.pieces import Piece, Pieces
from launch.training.optimizers.trust_ratio import Norms, norms_of_all_ranks, sum_of_squares


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

    def take(self, pieces: Pieces) -> Norms:
        """Return the norms of each whole matrix and of its change, and forget them. All ranks of a stage call this together.

        They add their sums of squares in one all-reduce of two float64 a matrix.
        """
        squares, self._squares = self._squares, {}
        return norms_of_all_ranks(pieces, [name for name, shape in pieces.shapes.items() if len(shape) >= 2], squares)
