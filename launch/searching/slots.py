"""The shares of a machine that a worker gives to its runs, and the processes of these runs."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from launch.searching.search import Work

Item = TypeVar("Item")

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None)  # loaded before any fork
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""Folder with an entry for each GPU, by NVIDIA's driver."""


def share_of(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """Return part `index` of `count` nearly equal parts of a list. With fewer items than parts, several parts have the same item."""
    first, last = (number * len(items) // count for number in (index, index + 1))
    return list(items[first:last] or items[first : first + 1])


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. (torch would take seconds to tell.)"""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(len(list(_NVIDIA_GPUS.iterdir())))] if _NVIDIA_GPUS.is_dir() else []


class Slot:
    """A share of this machine's cores and GPUs, and the run that uses it."""

    def __init__(self, index: int, count: int):
        self._cores = share_of(sorted(os.sched_getaffinity(0)), index, count)
        self._gpus = share_of(visible_gpus(), index, count)
        self.work: Work | None = None
        self._process: subprocess.Popen | None = None
        self._started, self._step_before = 0.0, 0

    def start(self, work: Work, command: Sequence[str]) -> None:
        """Start a run. It is asked to save and stop if this process ends."""
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus)} if self._gpus else {}
        parent = os.getpid()

        def prepare() -> None:
            """Ask the kernel to send SIGTERM if the parent ends, and use the cores of this slot."""
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it ended before the line above
                os._exit(1)
            os.sched_setaffinity(0, self._cores)

        self._step_before, self._started = work.run.newest_step, time.monotonic()
        with open(work.run.output, "a") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare,
                start_new_session=True,  # Ctrl-C reaches only this process, which then asks the runs to stop
            )
        self.work = work

    def poll(self) -> int | None:
        """Return the exit status of the run; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self) -> int:
        """Return the exit status of the run when it has ended."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Ask the run to save and stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def release(self) -> tuple[Work, float, bool]:
        """Free the slot. Return its work, the seconds that the run took, and whether it has a new checkpoint."""
        work = self.work
        assert work is not None
        self.work = self._process = None
        return work, time.monotonic() - self._started, work.run.newest_step > self._step_before
