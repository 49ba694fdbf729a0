"""The shares of a machine's cores and GPUs that the runs of a worker get."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.searching.slots import share_of, visible_gpus
from tests.ranks import clean_environment


@pytest.mark.parametrize(("items", "count", "shares"), [(8, 2, [4, 4]), (8, 3, [2, 3, 3]), (2, 4, [1, 1, 1, 1]), (0, 2, [0, 0])])
def test_shares_are_nearly_equal_and_use_every_item(items, count, shares):
    found = [share_of(range(items), index, count) for index in range(count)]
    assert [len(share) for share in found] == shares
    assert sorted({item for share in found for item in share}) == list(range(items))


def test_gpus_are_those_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-12ab")
    assert visible_gpus() == ["3", "GPU-12ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_run_has_its_share_and_stops_when_its_worker_is_killed(tmp_path):
    """The run writes its cores and GPUs, and then whether SIGTERM came."""
    run = tmp_path / "run.py"
    run.write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('stopped').touch(), os._exit(0)))\n"
        "pathlib.Path('share.tmp').write_text(f\"{len(os.sched_getaffinity(0))} {os.environ['CUDA_VISIBLE_DEVICES']}\")\n"
        "os.rename('share.tmp', 'share')\n"
        "time.sleep(60)\n"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, sys, time, types\n"
        "from launch.searching.slots import Slot\n"
        "run = types.SimpleNamespace(newest_step=0, output=pathlib.Path('out'))\n"
        "Slot(1, 2).start(types.SimpleNamespace(run=run), [sys.executable, 'run.py'])\n"
        "time.sleep(60)\n"
    )
    environment = clean_environment(CUDA_VISIBLE_DEVICES="4,5,6,7")
    process = subprocess.Popen([sys.executable, "worker.py"], cwd=tmp_path, env=environment)
    await_file(tmp_path / "share")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cores = len(share_of(sorted(os.sched_getaffinity(0)), 1, 2))
    assert (tmp_path / "share").read_text() == f"{cores} 6,7"
    await_file(tmp_path / "stopped")


def await_file(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} is missing"
        time.sleep(0.02)
