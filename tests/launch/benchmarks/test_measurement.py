"""Benchmarks measure all contenders in the same way."""

import platform
import subprocess
import sys
import time

import pytest

from launch.benchmarks import training_step, training_step_contenders
from launch.benchmarks.measurement import Spread, processor, timed
from launch.benchmarks.settings import TrainingStepSettings
from launch.ranks import processes

BUSY = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"


def test_waiting_takes_wall_time_and_no_cpu_time():
    timing = timed(lambda: time.sleep(0.2))
    assert timing.wall >= 0.2 and timing.cpu < 0.1


def test_cpu_time_includes_this_process_and_its_children():
    assert timed(lambda: exec(BUSY)).cpu >= 0.2
    assert timed(lambda: subprocess.run([sys.executable, "-c", BUSY], check=True)).cpu >= 0.2


def test_spread_has_median_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(2.5, 1.0, 9.0)


def test_processor_is_named_with_its_instruction_set():
    """The first core counts, and the fastest instruction set for bf16 products is named."""
    cpuinfo = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"
    assert processor(cpuinfo + cpuinfo.replace("Xeon", "other")) == "Xeon (family 6, model 207) with amx_bf16"
    assert processor("processor\t: 0\nFeatures\t: fp asimd\n").endswith(" with asimd")
    assert processor("").endswith(" with an unknown instruction set")


def test_every_contender_of_the_training_step_keeps_freed_memory(monkeypatch, capsys):
    """Each is started through `measure`, which sets memory and threads before the contender is built."""
    calls = []
    monkeypatch.setattr(processes, "keep_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(processes, "share_cores", lambda process: calls.append("threads"))
    tables = dict.fromkeys(training_step.CONTENDERS, lambda settings: lambda: calls.append("step"))
    monkeypatch.setattr(training_step_contenders, "TABLE", tables)
    for name in training_step.CONTENDERS:
        calls.clear()
        training_step_contenders.measure(name, TrainingStepSettings(steps=1))
        assert calls == ["threads", "memory", "step", "step", "step"]
    assert capsys.readouterr().out.count('"wall"') == len(training_step.CONTENDERS)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_tunables_of_glibc_keep_freed_memory_as_our_function_does():
    """Freeing and taking 64 MB again faults no page, in a process that only has the environment variable."""
    program = (
        "import resource; bytes(2 ** 26); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): bytearray(2 ** 26)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = []
    for environment in ({}, {"GLIBC_TUNABLES": processes.KEEP_FREED_MEMORY}):
        faults.append(int(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout))
    assert faults[1] < faults[0] / 2
