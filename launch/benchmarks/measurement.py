"""What all benchmarks measure in the same way: wall time, CPU time, their spread, and the processor."""

import dataclasses
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")  # the fastest first: what decides the speed of bf16 products


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time that one run took."""

    wall: float
    """Seconds on the clock."""
    cpu: float
    """Seconds of computing, summed over all threads, of user and system. Other work on the machine changes it less than the wall time."""


def timed(run: Callable[[], object]) -> Timing:
    """Run a function and return its time: that of this process, and of the child processes that it starts and waits for."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return Timing(time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and greatest of several measured values."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def describe_machine(threads: str) -> str:
    """Return the processor, its instruction set for matrix products, and its load, in one line. `threads`: those of a contender."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        f"{processor(cpuinfo.read_text() if cpuinfo.is_file() else '')}, {os.cpu_count()} cores, {threads}, "
        f"load {os.getloadavg()[0]:.1f} at the end, Python {platform.python_version()}"
    )


def processor(cpuinfo: str) -> str:
    """Return the name of the processor, given the text of /proc/cpuinfo.

    Family and model are part of it, because a virtual machine may hide the rest of the name.
    """
    lines = cpuinfo.splitlines()
    facts: dict[str, str] = {}
    for name, _, fact in (line.partition(":") for line in lines):
        facts.setdefault(name.strip(), fact.strip())  # those of the first core
    flags = facts.get("flags", facts.get("Features", "")).split()
    number = f" (family {facts['cpu family']}, model {facts['model']})" if {"cpu family", "model"} <= facts.keys() else ""
    best = next((name for name in _INSTRUCTION_SETS if name in flags), "an unknown instruction set")
    return f"{facts.get('model name', platform.machine())}{number} with {best}"
