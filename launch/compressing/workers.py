"""The ranks that compress together: each reads its share of the samples and changes its share of the matrices."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.command_line import UserError
from launch.ranks import processes, rendezvous
from launch.ranks.launchers import without_local_rank
from launch.ranks.processes import Process

Thing = TypeVar("Thing")

_PATIENCE = timedelta(hours=2)  # for the rank that has the largest matrix, or writes to a slow disk


@dataclasses.dataclass(frozen=True)
class Workers:
    """One object stands for all ranks: every verb is called by every rank."""

    process: Process
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.process.is_first

    def share(self, things: Sequence[Thing]) -> list[Thing]:
        """This rank's part of a list."""
        return list(things[self.process.rank :: self.process.world_size])

    def has(self, number: int) -> bool:
        """Whether the thing of that number is this rank's."""
        return number % self.process.world_size == self.process.rank

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each the sum over the ranks, in place."""
        if self.process.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def take_largest(self, tensor: Tensor) -> None:
        """The largest over the ranks, in place."""
        if self.process.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def tell(self, thing: Thing | None, number: int = 0) -> Thing:
        """What the rank that has this number says, on every rank."""
        box = [thing]
        if self.process.world_size > 1:
            dist.broadcast_object_list(box, src=number % self.process.world_size)
        return box[0]  # type: ignore[return-value]

    def by_first(self, act: Callable[[], Thing]) -> Thing:
        """What it gives on the first rank, on every rank; where it raises UserError there, every rank does."""
        box: tuple[Thing | None, UserError | None] = None, None
        if self.is_first:
            try:
                box = act(), None
            except UserError as error:
                box = None, error
        found, mistake = self.tell(box)
        if mistake is not None:
            raise mistake
        return found  # type: ignore[return-value]

    def part(self) -> None:
        """End what ranks do together: from here on each is alone, and transformers would find no others either."""
        if self.process.world_size > 1:
            dist.destroy_process_group()

    def gather(self, thing: Thing) -> list[Thing]:
        """What every rank says, in their order."""
        if self.process.world_size == 1:
            return [thing]
        things: list = [None] * self.process.world_size
        dist.all_gather_object(things, thing)
        return things


def find_workers(arguments: Sequence[str], rendezvous_seconds: float = 60) -> Workers:
    """Alone, or the ranks that deepspeed, torchrun, srun or mpirun has started. Raises RankError and RanksMissing as training does."""
    process = processes.find_process()
    processes.share_the_cores(process)
    if (name := processes.device_name()) == "cuda":
        device = torch.device("cuda", processes.device_number(process))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if process.world_size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        store = rendezvous.meet(process, rendezvous_seconds, without_local_rank(arguments))
        store.set_timeout(_PATIENCE)
        backend = "nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world_size, timeout=_PATIENCE)
    return Workers(process, device)
