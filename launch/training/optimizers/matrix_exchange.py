"""Slices of matrices to whole matrices and back: each matrix of a pipeline stage is assembled on one rank, its owner.

What a rank sends in a step, on average over the G ranks of a stage whose matrices have N values (4 bytes each in float32, 2 in bf16):

- ZeRO-1, -2 and -3: 2 N (G - 1) / G^2 values, less than 2 N / G: each value travels to its owner and back.
- ZeRO-0 with T tensor-parallel ranks: N (G + T - 2) / (G T) values, with G = 4 and T = 1 already 3 N / G: each data rank needs all
  updates. It is half of what the all-reduce of these gradients sends. If each rank orthogonalised every matrix itself, nothing would
  travel, but the work of a rank would be G times as much, and with few tokens a rank this work is not small beside that of a step.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from launch.checkpoints.state import ShardSlice
from launch.training.optimizers.pieces import Pieces

_STACK_VALUES = 1 << 24
"""Largest stack of several matrices, in values. Small matrices are faster together; a large one keeps a device busy by itself."""

Stack = tuple[list[str], Tensor]
"""Matrices of one shape: their names, and their values [n, rows, columns]."""


def owners(shapes: Mapping[str, tuple[int, ...]], num_places: int) -> dict[str, int]:
    """Return the place that orthogonalises each matrix: the heaviest first, each to the place with the least work so far.

    It depends on the arguments only, so every rank computes the same. Work is that of Newton-Schulz: min(A, B)^2 x max(A, B).
    """
    work = {name: min(shape) ** 2 * max(shape) for name, shape in shapes.items()}
    loads, owner = [0] * num_places, {}
    for name in sorted(shapes, key=lambda name: (-work[name], name)):
        owner[name] = min(range(num_places), key=loads.__getitem__)
        loads[owner[name]] += work[name]
    return owner


class _Transfer(NamedTuple):
    """A slice on its way between the place that holds it and the owner of its matrix, in either direction."""

    holder: int
    owner: int
    shard_slice: ShardSlice


class _Route(NamedTuple):
    """The slices that this rank sends to each place, and those that it receives from each, both in an order that all ranks know."""

    sent: list[list[ShardSlice]]
    received: list[list[ShardSlice]]


class MatrixExchange:
    """The exchanges of some matrices, planned once: `gather` brings them to their owners, `scatter` returns values in the same slices."""

    def __init__(self, pieces: Pieces, names: Iterable[str]):
        """Plan the exchanges of the matrices `names`, which are the same on every rank of the pipeline stage."""
        self._pieces = pieces
        shapes = {name: pieces.shapes[name] for name in names}
        self._is_empty = not shapes
        owner = owners(shapes, pieces.num_places)
        everywhere = [
            _Transfer(piece.place, owner[piece.shard_slice.name], piece.shard_slice)
            for piece in pieces.all
            if piece.shard_slice.name in owner
        ]
        chosen: dict[ShardSlice, _Transfer] = {}
        for one in everywhere:  # of equal slices the owner uses its own, which does not travel, or that of the lowest place
            if one.shard_slice not in chosen or one.holder == one.owner:
                chosen[one.shard_slice] = one
        self._to_owners = self._route((one.holder, one.owner, one.shard_slice) for one in chosen.values())
        self._to_holders = self._route((one.owner, one.holder, one.shard_slice) for one in everywhere)
        self._stacks = _stacked({name: shape for name, shape in shapes.items() if owner[name] == pieces.place})

    def gather(self, slices: Mapping[str, Tensor], like: Tensor) -> list[Stack]:
        """Return the whole matrices of this rank, given its slice [count] of each matrix by name. `like` has their type and device."""
        stacks = [(names, like.new_empty(len(names), *shape)) for names, shape in self._stacks]
        _assemble(_by_name(stacks), self._exchange(self._to_owners, lambda one: slices[one.name], like))
        return stacks

    def scatter(self, stacks: Iterable[Stack], like: Tensor) -> dict[str, Tensor]:
        """Return this rank's slice [count] of each matrix by name, given the whole matrices that this rank owns."""
        whole = _by_name(stacks)
        return {one.name: values for one, values in self._exchange(self._to_holders, lambda one: one.take_from(whole[one.name]), like)}

    def _exchange(self, route: _Route, values_of: Callable[[ShardSlice], Tensor], like: Tensor) -> list[tuple[ShardSlice, Tensor]]:
        """Send this rank's slices; return those that it receives, with their values."""
        sent = [[values_of(one) for one in some] for some in route.sent]
        if self._pieces.num_places == 1:
            return list(zip(route.received[0], sent[0], strict=True))
        if self._is_empty:
            return []
        counts = [[one.count for one in some] for some in route.received]
        messages = self._pieces.exchange([torch.cat([like.new_empty(0), *some]) for some in sent], [sum(some) for some in counts])
        return [
            (one, values)
            for some, message, sizes in zip(route.received, messages, counts, strict=True)
            for one, values in zip(some, message.split(sizes), strict=True)
        ]

    def _route(self, transfers: Iterable[tuple[int, int, ShardSlice]]) -> _Route:
        """Return this rank's part of transfers (from, to, slice)."""
        places = range(self._pieces.num_places)
        route = _Route([[] for _ in places], [[] for _ in places])
        for origin, destination, shard_slice in transfers:
            if origin == self._pieces.place:
                route.sent[destination].append(shard_slice)
            if destination == self._pieces.place:
                route.received[origin].append(shard_slice)
        return route


def _stacked(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[list[str], tuple[int, ...]]]:
    """Return the names of matrices in groups of equal shape, with that shape."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault(shape, []).append(name)
    stacks: list[tuple[list[str], tuple[int, ...]]] = []
    for (rows, columns), names in alike.items():
        size = max(1, _STACK_VALUES // (rows * columns))
        stacks += [(names[first : first + size], (rows, columns)) for first in range(0, len(names), size)]
    return stacks


def _by_name(stacks: Iterable[Stack]) -> dict[str, Tensor]:
    return {name: matrix for names, matrices in stacks for name, matrix in zip(names, matrices, strict=True)}


def _assemble(whole: Mapping[str, Tensor], parts: Iterable[tuple[ShardSlice, Tensor]]) -> None:
    """Write slices into whole matrices. A region of columns, which tensor parallelism has, is assembled apart and then copied."""
    regions: dict = {}
    for shard_slice, values in parts:
        key = shard_slice.name, shard_slice.region
        if key not in regions:
            region = shard_slice.region_of(whole[shard_slice.name])
            regions[key] = region, region.reshape(-1)
        regions[key][1][shard_slice.start : shard_slice.start + shard_slice.count] = values
    for region, flat in regions.values():
        if not region.is_contiguous():
            region.copy_(flat.view(region.shape))
