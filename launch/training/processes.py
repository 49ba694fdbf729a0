"""Which process this is, on which device, with how many threads."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import random
import socket

import torch

from data.command_line import UserError


@dataclasses.dataclass(frozen=True)
class Process:
    """One rank of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def free_port() -> int:
    """A port of this machine that nothing listens on, below those that outgoing connections are given."""
    for port in random.SystemRandom().sample(range(15000, 30000), 50):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise OSError("No free port between 15000 and 30000.")


def find_process() -> Process:
    """Read rank and world from what the launcher set (deepspeed, torchrun); alone, become rank 0 of 1 and say so to torch.

    Raises UserError where a launcher set only a part, or started several processes without saying which is which.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
        raise UserError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks without saying which is which ({', '.join(missing)} not set). "
            "Start torchrun or deepspeed in one task a node."
        )
    if "RANK" in os.environ and missing:
        raise UserError(f"RANK is set but {', '.join(missing)} not. Start with deepspeed or torchrun, or unset RANK.")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world_size = int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return Process(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")), local_world_size)


def share_the_cores(process: Process) -> None:
    """Give each local rank its part of the cores, where a person's OMP_NUM_THREADS does not say otherwise.

    Left alone, every rank starts a thread a core: two ranks on two cores ran ten times slower. torchrun sets 1 by itself.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if "OMP_NUM_THREADS" not in os.environ or by_torchrun:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // process.local_world_size))


def keep_freed_memory() -> None:
    """On a CPU under glibc: do not give large freed tensors back to the kernel.

    By default each one is a fresh mapping whose pages fault one by one: an eighth of a training step here. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def device_name() -> str:
    """ "cuda" or "cpu": what DS_ACCELERATOR asks for, else a GPU where there is one. DeepSpeed is told the same."""
    return os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
