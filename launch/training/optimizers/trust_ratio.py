"""Norms of whole matrices, on which the learning rate of a matrix depends in LAMB and LARS."""

from collections.abc import Sequence

import torch
from torch import Tensor

from launch.training.optimizers.pieces import Pieces

_CHUNK = 1 << 20
"""Values that are converted to float64 at a time: torch makes a copy of them."""
Norms = dict[str, tuple[float, float]]
"""Norms of the weights and of a direction of each matrix, by the parameter's name."""


def norms_of_matrices(pieces: Pieces, tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Norms:
    """Return the norms of each matrix of which any rank of the stage has a part in `tensors`. All these ranks call this together.

    directions: values of the shape of each of `tensors`. The ranks add their sums of squares in one all-reduce of two float64 a
    matrix. Vectors (biases, norms) are left out: they have no trust ratio.
    """
    names = [name for name in pieces.names_in(tensors) if len(pieces.shapes[name]) >= 2]
    if not names:
        return {}
    row = {name: index for index, name in enumerate(names)}
    # float64: the two copies of a tied embedding are in stages that divide it differently, and must have the same ratio.
    squares = torch.zeros(len(names), 2, dtype=torch.float64, device=tensors[0].device)
    for tensor, direction in zip(tensors, directions, strict=True):
        for piece in pieces.of(tensor):
            if piece.shard_slice.name in row and not piece.is_replica:
                for column, whole in enumerate((tensor, direction)):
                    squares[row[piece.shard_slice.name], column] += sum_of_squares(whole.view(-1)[piece.values])
    return dict(zip(names, map(tuple, pieces.sum(squares).sqrt().tolist()), strict=True))


def sum_of_squares(values: Tensor) -> Tensor:
    """Return the sum of the squares of a vector as a scalar in float64."""
    return torch.stack([torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in values.split(_CHUNK)]).square().sum()
