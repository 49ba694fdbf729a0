"""Rank, device and threads of this process."""

import ctypes
import dataclasses
import os
import platform
import re
from pathlib import Path

import torch

from data.command_line import RankError
from launch.ranks.launchers import free_port


@dataclasses.dataclass(frozen=True)
class Process:
    """One rank of a run: its index among all ranks and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __str__(self) -> str:
        return f"Rank {self.rank} on {host_name()}"

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def spans_nodes(self) -> bool:
        """True if the run has ranks on other machines too."""
        return self.local_world_size < self.world_size


def host_name() -> str:
    """Name of this machine: its SLURM node name, or else its host name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


# Variables for rank, world size, local rank and local world size. Other launchers (torchrun, deepspeed) set torch's names.
_NAMES = {
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
_TORCH_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def find_process() -> Process:
    """Read rank, world size and rendezvous address from the launcher's environment, and set torch's variables. Alone: rank 0 of 1.

    Supports deepspeed, torchrun, mpirun, mpiexec and srun, the innermost first: torchrun may run in a task of srun. Raises RankError
    if a variable is missing or invalid.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # SLURM sets most variables in a batch script too, which is not a rank. Those of a step and the local ones are set for ranks only.
    launcher = next((name for name, variables in _NAMES.items() if variables[1] in os.environ and variables[2] in os.environ), None)
    if "RANK" in os.environ:
        launcher = "the launcher"
    elif launcher is None:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return Process(0, 1, 0, 1)
    else:
        _set_torch_names(launcher)
    if missing := [name for name in _TORCH_NAMES if not os.environ.get(name)]:
        hint = " Add -x MASTER_ADDR=HOST with the host of rank 0." if launcher in ("mpirun", "mpiexec") else ""
        raise RankError(
            f"{launcher} set RANK but not {', '.join(missing)}.{hint} Start with deepspeed, torchrun, srun or mpirun, or unset RANK."
        )
    world_size = _number("WORLD_SIZE", at_least=1)
    rank = _number("RANK", below=world_size)
    local_world_size = next((_number(name, at_least=1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), world_size)
    local_rank = _number("LOCAL_RANK", below=local_world_size) if os.environ.get("LOCAL_RANK") else 0
    os.environ["LOCAL_RANK"] = str(local_rank)  # where it is not set, DeepSpeed asks MPI
    _number("MASTER_PORT", at_least=1, below=65536)
    return Process(rank, world_size, local_rank, local_world_size)


def _set_torch_names(launcher: str) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the launcher's variables, and MASTER_ADDR and MASTER_PORT if known."""
    rank, world_size, local_rank, local_world_size = _NAMES[launcher]
    found = {"WORLD_SIZE": os.environ[world_size], "LOCAL_RANK": os.environ[local_rank], "RANK": os.environ.get(rank, "")}
    if launcher == "srun":
        counts = _expand_counts(os.environ.get(local_world_size, found["WORLD_SIZE"]))
        found["LOCAL_WORLD_SIZE"] = str(counts[int(os.environ.get("SLURM_NODEID", "0")) % len(counts)])
        job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        # Steps that run at the same time have different ports.
        rendezvous = {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": str(20000 + (job + 1009 * step) % 10000)}
    else:
        found["LOCAL_WORLD_SIZE"] = os.environ.get(local_world_size, "")
        on_one_node = found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]
        # The ranks of one mpirun on one machine have one parent process. On several machines, MPI does not tell where rank 0 is.
        local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getppid() % 10000)}
        rendezvous = local if on_one_node else {"MASTER_PORT": "29500"}
    os.environ |= {name: value for name, value in found.items() if value}
    for name, value in rendezvous.items():
        os.environ.setdefault(name, value)


def _number(name: str, at_least: int = 0, below: int | None = None) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < at_least or (below is not None and int(text) >= below):
        limit = "" if below is None else f" and below {below}"
        raise RankError(f'{name} is "{text}"; the launcher must set a whole number, at least {at_least}{limit}.')
    return int(text)


def _expand_counts(counts: str) -> list[int]:
    """Number of tasks on each node, from SLURM's short form: "2(x3),1" -> [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: "n[01-04,7],m1" -> "n01"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0] if first else "")


def share_cores(process: Process) -> None:
    """Set this process's number of threads to its part of the machine's cores, unless the user set OMP_NUM_THREADS.

    By default every rank starts one thread per core: two ranks on two cores ran ten times slower. torchrun sets 1, which is replaced.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if "OMP_NUM_THREADS" not in os.environ or by_torchrun:
        cores = len(os.sched_getaffinity(0)) // process.local_world_size
        if os.environ.get("SLURM_STEP_NUM_TASKS") == str(process.world_size):  # srun may have bound this task to its cores
            cores = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
        torch.set_num_threads(max(1, cores))


KEEP_FREED_MEMORY = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**31 - 1}"
"""Value of GLIBC_TUNABLES with which glibc does the same as keep_freed_memory, in a process that does not run our code."""


def keep_freed_memory() -> None:
    """With glibc, keep the memory of large freed tensors in this process.

    By default it is returned to the kernel, and each new tensor is a fresh mapping whose pages fault one by one: an eighth of a training
    step on a CPU. See mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes. getrusage would include that of its parent process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def device_name() -> str:
    """Return "cuda" or "cpu": the value of DS_ACCELERATOR, else "cuda" if torch finds a GPU. Sets DS_ACCELERATOR for DeepSpeed.

    Raises RankError if SLURM gave GPUs that torch does not find, because a run that trains on the CPU for a week costs more.
    """
    seen, given = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "DS_ACCELERATOR" not in os.environ and not seen and "SLURM_JOB_ID" in os.environ and given not in ("", "-1", "NoDevFiles"):
        raise RankError(
            f"SLURM gave this task on {host_name()} GPU {given} (CUDA_VISIBLE_DEVICES), but torch {torch.__version__} finds none: a driver "
            "is missing, or this is a CPU build of torch. Set DS_ACCELERATOR=cpu to train on the CPU."
        )
    return os.environ.setdefault("DS_ACCELERATOR", "cuda" if seen else "cpu")


def device_index(process: Process) -> int:
    """Index of this rank's GPU among those that it can use. Sets LOCAL_RANK, which DeepSpeed reads, to the same index.

    Raises RankError if there are fewer GPUs than ranks.
    """
    seen = torch.cuda.device_count()
    by_srun = os.environ.get("SLURM_STEP_NUM_TASKS") == str(process.world_size)
    bound = seen == 1 and by_srun  # srun --gpus-per-task and similar options give each task one GPU of its own
    if not bound and process.local_rank >= seen:
        raise RankError(
            f"{process} has local rank {process.local_rank} of {process.local_world_size}, but its machine has {seen} GPU(s): fewer "
            f"devices than ranks. Start {max(seen, 1)} rank(s) per node, or request more GPUs."
        )
    index = 0 if bound else process.local_rank
    os.environ["LOCAL_RANK"] = str(index)
    return index
