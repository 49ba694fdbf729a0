"""What must be in place before torch is imported, and the order of the files."""

import collections
import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts its background jobs so, and a process passes it on to those that it starts. They must hear the Ctrl-C of the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers and the ranks that they start share a few cores. A thread of torch that waits for another one uses a core: with two threads
    # in each process, a step of a tiny model took 20 times the processor time of one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST_FIRST = (
    "launch/training/test_equality.py",
    "launch/compressing/test_scripts.py",
    "launch/test_slurm.py",
    "launch/ranks/test_hosts.py",
    "launch/compressing/test_llama_engine.py",
    "launch/test_mistakes.py",
    "launch/training/test_resume.py",
    "launch/test_doors.py",
    "launch/ranks/test_launchers.py",
    "launch/training/test_preflight.py",
    "launch/compressing/test_vllm.py",
    "data/preparation/test_crash.py",
    "launch/checkpoints/test_convert.py",
    "launch/training/test_blends.py",
    "launch/benchmarks/test_preparation_benchmark.py",
    "launch/evaluation/test_compare.py",
    "launch/training/test_muon.py",
    "data/test_prepare.py",
    "data/sampling/test_order.py",
)
"""The files that take longest, in an order in which no worker is left with a long one at the end."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of the most tests


def pytest_collection_modifyitems(items):
    """Begin with the longest files. The others follow by their number of tests."""
    files = [item.nodeid.partition("::")[0].removeprefix("tests/") for item in items]
    num_tests = collections.Counter(files)
    place = {
        file: (LONGEST_FIRST.index(file) if file in LONGEST_FIRST else len(LONGEST_FIRST), -num_tests[file], file) for file in num_tests
    }
    items[:] = [item for _, item in sorted(zip(files, items, strict=True), key=lambda pair: place[pair[0]])]
