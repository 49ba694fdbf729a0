"""The ranks that compress a model together: each reads its share of the samples and changes its share of the matrices."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from launch.ranks import processes
from launch.ranks.collectives import Ranks, join_process_group
from launch.ranks.launchers import without_local_rank
from launch.ranks.rendezvous import connect

Item = TypeVar("Item")

_TIMEOUT = timedelta(hours=2)  # a rank may have a much larger matrix than the others, or write to a slow disk


class Workers(Ranks):
    """The ranks of a compression. Every method is called by every rank, in the same order."""

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's part of a list: every world_size-th item."""
        return list(items[self.process.rank :: self.process.world_size])

    def owner_of(self, index: int) -> int:
        """Rank whose share has the item with this index."""
        return index % self.process.world_size

    def owns(self, index: int) -> bool:
        """True if this rank's share has the item with this index."""
        return self.owner_of(index) == self.process.rank

    def leave_group(self) -> None:
        """Leave the process group. After this each rank works alone, and transformers finds no other ranks either."""
        if self.process.world_size > 1:
            dist.destroy_process_group()


def find_workers(arguments: Sequence[str], rendezvous_seconds: float = 60) -> Workers:
    """Return this process alone, or the ranks that deepspeed, torchrun, srun or mpirun started, once all of them are connected.

    Raises RankError and RanksMissing as launch.ranks.rendezvous.connect does.
    """
    process = processes.find_process()
    processes.share_cores(process)
    if (name := processes.device_name()) == "cuda":
        device = torch.device("cuda", processes.device_index(process))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if process.world_size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        join_process_group(connect(process, rendezvous_seconds, without_local_rank(arguments)), process, name, _TIMEOUT)
    return Workers(process, device)
