"""How the ranks of a run join one process group for DeepSpeed."""

import logging
import warnings
from datetime import timedelta

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from torch.distributed import distributed_c10d

from launch.ranks.collectives import join_process_group
from launch.ranks.processes import Process, device_index, device_name


def initialize_communication(process: Process, store: dist.Store, timeout_seconds: float) -> None:
    """Create the process group over the store through which the ranks connected. A rank waits `timeout_seconds` for the others.

    It also turns off what DeepSpeed would print, compile or import without need.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed|torch.distributed")
    warnings.filterwarnings("ignore", message="c10d::broadcast_")  # of tied weights, while a pipeline is built
    if device_name() == "cpu":
        # Otherwise the first start on a CPU compiles a C++ helper for two minutes. If it is killed meanwhile, its lock file blocks all
        # later starts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Every ZeRO optimizer imports DeepSpeed's Muon, which no run uses. Its decorator would import torch's compiler: one second per start.
    compiler.compile = lambda: compiler.dummy_decorator
    if device_name() == "cuda":
        torch.cuda.set_device(device_index(process))
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed creates its groups of ranks without a timeout and has no option for one; torch's default is 10 or 30 minutes.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    backend = join_process_group(store, process, device_name(), timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
