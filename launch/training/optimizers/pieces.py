"""Which rank of a pipeline stage holds which part of each parameter, and what these ranks exchange in an optimizer step.

An optimizer that needs whole parameters (their norms, or the matrices themselves) gets a Pieces object from the engine. The optimizer
updates flat tensors, each of which holds slices of many parameters, and padding that belongs to none.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.command_line import UserError
from launch.checkpoints.state import ShardSlice
from launch.ranks.layout import Layout
from launch.training.stopwatch import Stopwatch


class Piece(NamedTuple):
    """A slice of a parameter in the memory of one rank."""

    shard_slice: ShardSlice
    tensor: int
    """Index, in the list that Pieces is built with, of the tensor in which that rank has the slice."""
    offset: int
    """Index of the slice's first value in that tensor, flattened."""
    place: int
    """Index of the rank among the ranks of its pipeline stage."""
    is_replica: bool
    """True if a lower place holds the same values. Pieces that are not replicas cover each parameter exactly once; they alone are
    counted and sent. Replicas receive."""

    @property
    def values(self) -> slice:
        """The slice's values in that tensor, flattened."""
        return slice(self.offset, self.offset + self.shard_slice.count)


class Pieces:
    """The pieces of all ranks of one pipeline stage, which together hold every parameter of it. All ranks have the same list."""

    def __init__(self, tensors: Sequence[Tensor], held: list[Piece], layout: Layout, rank: int, device: torch.device):
        """Exchange lists with the other ranks; every rank of the run calls this at the same time.

        `tensors` are those that the optimizer updates; tensors with the same index hold slices of the same parameters on all ranks.
        `held` are this rank's pieces. `device` is one whose tensors the process group can exchange.
        """
        self.place = layout.stage_place(rank)
        self.num_places = layout.zero_size * layout.tensor_parallel_size
        self._group = _stage_group(layout, rank)
        self.device = device
        self._index = {tensor: index for index, tensor in enumerate(tensors)}  # tensors are compared by identity
        lists: list = [held]
        if self.num_places > 1:
            lists = [None] * self.num_places
            dist.all_gather_object(lists, held, group=self._group)
        self.all: list[Piece] = [piece for one in lists for piece in one]
        """The pieces of every place, in the order of places."""
        self.shapes = {
            piece.shard_slice.name: piece.shard_slice.shape for piece in sorted(self.all, key=lambda piece: piece.shard_slice.name)
        }
        """Whole shape of every parameter of the stage, by name, in alphabetical order."""
        self._held: dict[int, list[Piece]] = {}
        for piece in held:
            self._held.setdefault(piece.tensor, []).append(piece)
        self._names = _names_by_tensor(self.all)
        self.bytes_exchanged = 0
        """Bytes that this rank has given to exchanges since the start; its own share of an all-to-all does not travel or count."""
        self.is_reported = False
        """True in a step after which the engine asks the optimizer for its report; the engine sets it before each step."""
        self.watch = Stopwatch(device)
        """Time of the exchanges; the engine replaces it in each step."""

    def of(self, tensor: Tensor) -> list[Piece]:
        """Return this rank's pieces in a tensor that the optimizer updates."""
        return self._held.get(self._index[tensor], [])

    def names_in(self, tensors: Iterable[Tensor]) -> list[str]:
        """Return, in alphabetical order, the parameters of which any rank holds a piece in these tensors: the same list on every rank.

        In one call of its step, an optimizer is given all tensors (ZeRO-0, BF16_Optimizer), those of one parameter group (ZeRO-1, -2),
        or one sub-group (ZeRO-3).
        """
        return sorted({name for tensor in tensors for name in self._names.get(self._index[tensor], ())})

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all places, on the device of `values`."""
        if self.num_places == 1:
            return values
        with self.watch.measure("exchange"):
            summed = values.to(self.device, copy=True)
            dist.all_reduce(summed, group=self._group)
            self.bytes_exchanged += summed.nbytes
            return summed.to(values.device)

    def exchange(self, sent: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Give sent[place] [values] to every place. Return what every place gave to this one: counts[place] values, on the same device."""
        if self.num_places == 1:
            return list(sent)
        with self.watch.measure("exchange"):
            out = torch.cat(list(sent)).to(self.device)
            received = out.new_empty(sum(counts))
            dist.all_to_all_single(received, out, list(counts), [len(one) for one in sent], group=self._group)
            self.bytes_exchanged += out.nbytes - sent[self.place].nbytes
            return list(received.to(sent[0].device).split(list(counts)))


def _stage_group(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """Return the group of the ranks of this rank's pipeline stage; None is the group of all ranks."""
    if layout.pipeline_stages == 1:
        return None
    created = [(members, dist.new_group(members)) for members in layout.stage_groups()]  # every rank must create every group
    return next(group for members, group in created if rank in members)


def _names_by_tensor(pieces: list[Piece]) -> dict[int, set[str]]:
    """Return the names of the parameters of which some rank has a piece in each tensor.

    Raises UserError if a parameter is not in the same tensor on all ranks: then they would not exchange it in the same call.
    """
    tensor_of = {piece.shard_slice.name: piece.tensor for piece in pieces}
    for piece in pieces:
        if tensor_of[name := piece.shard_slice.name] != piece.tensor:
            raise UserError(
                f"zero_optimization.sub_group_size divides parameters differently on tensor-parallel ranks, which share {name} unevenly. "
                "optimizer.name lamb, lars and muon need the same sub-groups on all ranks. Use a larger sub_group_size or a smaller "
                "tensor_parallel_size."
            )
    names: dict[int, set[str]] = {}
    for name, tensor in tensor_of.items():
        names.setdefault(tensor, set()).add(name)
    return names
