"""Norms of whole matrices, on which the learning rate of a matrix depends in LAMB and LARS."""

from collections.abc import Mapping, Sequence

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
    squares: dict[str, Tensor] = {}
    for tensor, direction in zip(tensors, directions, strict=True):
        for piece in pieces.of(tensor):
            if len(piece.shard_slice.shape) >= 2 and not piece.is_replica:
                both = torch.stack([sum_of_squares(whole.view(-1)[piece.values]) for whole in (tensor, direction)])
                squares[piece.shard_slice.name] = squares.get(piece.shard_slice.name, 0) + both
    return norms_of_all_ranks(pieces, names, squares)


def norms_of_all_ranks(pieces: Pieces, names: Sequence[str], squares: Mapping[str, Tensor]) -> Norms:
    """Return two norms of each whole matrix of `names`, given two sums of squares [2] over this rank's slices, by name, if it has any.

    All ranks of the stage call this together, with the same names.
    """
    if not names:
        return {}
    # float64: the two copies of a tied embedding are in stages that divide it differently, and must have the same ratio.
    none = torch.zeros(2, dtype=torch.float64, device=pieces.device)
    table = torch.stack([squares.get(name, none).to(pieces.device) for name in names])
    return dict(zip(names, map(tuple, pieces.sum(table).sqrt().tolist()), strict=True))


def sum_of_squares(values: Tensor) -> Tensor:
    """Return the sum of the squares of a vector as a scalar in float64."""
    return torch.stack([torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in values.split(_CHUNK)]).square().sum()
