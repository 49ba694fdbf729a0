"""Runs on two hosts that are connected by ssh: every launcher, a network that fails during a run, and wrong network settings."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from launch.checkpoints import checkpoint
from launch.ranks.stopping import SAVED_AND_UNFINISHED
from tests.launch.hosts import Host, Hosts, two_hosts
from tests.launch.ranks.test_launchers import need
from tests.launch.training.test_resume import curves
from tests.ranks import REPOSITORY, clean_environment, finish, start_ranks

pytestmark = pytest.mark.slow

DOOR = "launch/pretrain.py"
PORT = 29500
PATIENCE_SECONDS = 10
"""Seconds that a rank waits for the others during training (--communication_timeout)."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def hosts(both):
    """The two hosts; processes that a test leaves running in them are ended after it."""
    yield both
    both.mend()
    both.end_all()


@pytest.fixture
def options(tiny):
    return [*tiny, "--deepspeed", "ds_configs/zero3.json", "--precision", "float32"]


@pytest.fixture
def many_steps(options):
    """Options of a run that is long enough to be interrupted."""
    options += ["--train_steps", "240", "--checkpoint.interval", "20", "--log.validation_interval", "60", "--log.sample_interval", "0"]
    return [*options, "--communication_timeout", str(PATIENCE_SECONDS)]


def environment(**more: str) -> dict[str, str]:
    found = clean_environment(**more)
    del found["GLOO_SOCKET_IFNAME"]  # launch/ranks/rendezvous.py sets it
    return found


def of_one_machine(options: list[str], folder: Path) -> dict:
    """Curves of a run with the same options on two ranks of this machine."""
    finish(start_ranks(2, REPOSITORY / DOOR, *options, "--output", str(folder), OMP_NUM_THREADS="1"))
    return curves(folder)


def deepspeed(hosts: Hosts, folder: Path, *options: str) -> subprocess.Popen:
    """Run `deepspeed --hostfile` on alpha: it starts a rank on each host with pdsh and ssh. The output of each rank is in folder/logs."""
    (folder / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
    start = ["deepspeed", "--hostfile", str(folder / "hostfile"), "--enable_each_rank_log", str(folder / "logs"), DOOR]
    # Without these options ssh, and so the launcher, waits for ever for a host that does not answer.
    alive = "-oServerAliveInterval=3 -oServerAliveCountMax=3"
    return hosts.alpha.start(*start, *options, environment=environment(PDSH_SSH_ARGS_APPEND=alive))


def logs(folder: Path) -> list[str]:
    """Output of each rank in the newest start."""
    return [max((folder / "logs").glob(f"*_rank{rank}.log"), key=os.path.getmtime).read_text() for rank in (0, 1)]


def wait_for_all(hosts: Hosts, processes: list[subprocess.Popen], timeout_seconds: float = 120) -> list[tuple[int, str]]:
    """Exit status and output of each process. Fails, with all outputs, if they have not ended in time."""
    too_late = threading.Timer(timeout_seconds, hosts.end_all)  # pipes end when their processes are killed
    too_late.start()
    with ThreadPoolExecutor(len(processes)) as readers:
        outputs = list(readers.map(lambda process: process.communicate()[0], processes))
    in_time = too_late.is_alive()
    too_late.cancel()
    assert in_time, f"not done after {timeout_seconds} s:\n" + "\n---\n".join(outputs)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def wait_for_launcher(hosts: Hosts, launcher: subprocess.Popen, folder: Path) -> tuple[int, str]:
    """Exit status of the launcher, and the output of it and of the ranks."""
    [(status, output)] = wait_for_all(hosts, [launcher])
    return status, "\n---\n".join([output, *logs(folder)])


def run_on_both(hosts: Hosts, options: list[str], address: str = "10.77.0.1", port: int = PORT) -> list[tuple[int, str]]:
    """Exit status and output of one rank on each host, started as torchrun would."""
    whole = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    ranks = [
        host.start(sys.executable, DOOR, *options, environment=environment(RANK=str(rank), **whole))
        for rank, host in enumerate((hosts.alpha, hosts.beta))
    ]
    return wait_for_all(hosts, ranks)


@contextlib.contextmanager
def mounted(host: Host, place: Path, *what: str) -> Iterator[None]:
    """Mount another file system at a path, on one host only."""
    host.run("mount", *what, str(place))
    try:
        yield
    finally:
        host.run("umount", str(place))


def wait_until(condition, seconds: float, message: str) -> float:
    """Wait until a condition is true; return the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, message
        time.sleep(0.05)
    return time.monotonic() - start


def test_every_launcher_on_two_hosts_gives_the_numbers_of_one_machine(hosts, options, tmp_path):
    need("mpirun")
    expected = of_one_machine(options, tmp_path / "one_machine")
    torchrun = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1"]
    static = [[*torchrun, "--node_rank", node, "--master_addr", hosts.alpha.address] for node in "01"]
    # The name and not the address: on a host whose name is 127.0.1.1, torchrun does not know that 10.77.0.1 is its own address.
    c10d = [[*torchrun, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"alpha:{PORT}", "--rdzv_id", "a-run"]] * 2
    exported = ["-x", f"MASTER_ADDR={hosts.alpha.address}", "-x", "PYTHONPATH", "-x", "HF_HUB_OFFLINE"]
    mpirun = ["mpirun", "--allow-run-as-root", "-n", "2", "--host", "alpha:1,beta:1", *exported, sys.executable]
    for name, commands in {"static": static, "c10d": c10d, "mpirun": [mpirun]}.items():
        run = tmp_path / name
        both = zip((hosts.alpha, hosts.beta), commands, strict=False)
        started = [host.start(*command, DOOR, *options, "--output", str(run), environment=environment()) for host, command in both]
        for status, output in wait_for_all(hosts, started):
            assert status == 0, output
        assert curves(run) == expected, name
    for status, output in run_on_both(hosts, [*options, "--output", str(tmp_path / "by_name")], address="alpha"):
        assert status == 0, output
    assert curves(tmp_path / "by_name") == expected  # on alpha that name is 127.0.1.1
    status, output = wait_for_launcher(hosts, deepspeed(hosts, tmp_path, *options), tmp_path)
    assert status == 0, output
    assert curves(tmp_path / "run") == expected
    assert hosts.running() == []


def test_lost_network_ends_both_hosts_with_a_message_and_resumes(hosts, many_steps, tmp_path):
    expected = of_one_machine(many_steps, tmp_path / "one_machine")
    launcher = deepspeed(hosts, tmp_path, *many_steps)
    root = tmp_path / "run" / "checkpoints"
    wait_until(lambda: launcher.poll() is not None or len(checkpoint.published(root)) >= 2, 120, "no checkpoint")
    assert launcher.poll() is None, wait_for_launcher(hosts, launcher, tmp_path)
    hosts.cut()
    results = [
        wait_until(lambda rank=rank: "lost the other ranks" in logs(tmp_path)[rank], PATIENCE_SECONDS + 10, logs(tmp_path)[rank])
        for rank in (0, 1)
    ]
    ended_after = wait_until(lambda: launcher.poll() is not None and not hosts.running(), 30, str(hosts.running()))
    newest = checkpoint.published(root)[0].name
    for rank, (host, log) in enumerate(zip(("alpha", "beta"), logs(tmp_path), strict=True)):
        message = next(line for line in log.splitlines() if "lost the other ranks" in line)
        print(f"{sum(results[: rank + 1]):.1f} s after the cut: {message}")
        assert f"ank {rank} on {host}" in message
        assert f"{PATIENCE_SECONDS} s" in message
        assert newest in message
        assert "Traceback" not in log
    print(
        f"{sum(results) + ended_after:.1f} s after the cut the launcher ended with status {launcher.returncode}; nothing was left running"
    )
    assert launcher.returncode not in (0, 2, SAVED_AND_UNFINISHED)
    hosts.mend()
    status, output = wait_for_launcher(hosts, deepspeed(hosts, tmp_path, *many_steps), tmp_path)
    assert status == 0, output
    assert f"Resuming from step {int(newest.removeprefix('step_'))} of 240" in output
    assert curves(tmp_path / "run") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_saves_and_ends_all_processes(number, hosts, many_steps, tmp_path):
    launcher = deepspeed(hosts, tmp_path, *many_steps)
    root = tmp_path / "run" / "checkpoints"
    wait_until(lambda: launcher.poll() is not None or checkpoint.published(root), 120, "no checkpoint")
    assert launcher.poll() is None, wait_for_launcher(hosts, launcher, tmp_path)
    psutil.Process(launcher.pid).children()[0].send_signal(number)
    status, output = wait_for_launcher(hosts, launcher, tmp_path)
    wait_until(lambda: not hosts.running(), 30, str(hosts.running()))
    assert status == 1, output  # of DeepSpeed's launcher, which does not pass on the status of its ranks
    saved = checkpoint.step_of(checkpoint.published(root)[0])
    assert f"after step {saved}; a checkpoint was saved" in output
    assert saved % 20


def test_stop_signal_to_one_rank_gives_the_launcher_status_85(hosts, many_steps, tmp_path):
    launcher = deepspeed(hosts, tmp_path, *many_steps)
    root = tmp_path / "run" / "checkpoints"
    wait_until(lambda: launcher.poll() is not None or checkpoint.published(root), 120, "no checkpoint")
    rank = next(process for process in hosts.beta.processes() if process.cmdline()[2:3] == [DOOR])
    rank.send_signal(signal.SIGTERM)
    status, output = wait_for_launcher(hosts, launcher, tmp_path)
    assert status == SAVED_AND_UNFINISHED, output
    wait_until(lambda: not hosts.running(), 10, str(hosts.running()))


def test_address_of_the_wrong_host_gives_a_message_within_30_seconds(hosts, options):
    start = time.monotonic()
    alpha, beta = run_on_both(hosts, options, address="10.77.0.2")
    assert time.monotonic() - start < 30 + 25  # Python and torch are imported first
    for (_, output), host in ((alpha, "alpha"), (beta, "beta")):
        print(output)
        assert f"10.77.0.2:{PORT}" in output
        assert host in output
        assert "Traceback" not in output
    assert alpha[0] == 2
    assert beta[0] in (1, 2)


def test_unknown_host_name_gives_a_message(hosts, options):
    start = time.monotonic()
    for (status, output), host in zip(run_on_both(hosts, options, address="gamma"), ("alpha", "beta"), strict=True):
        print(output)
        assert status == 2
        assert f'MASTER_ADDR "gamma" (port {PORT})' in output
        assert f"cannot be resolved on {host}" in output
    assert time.monotonic() - start < 30 + 25  # Python and torch are imported first


HOLDERS = {
    "socket": "import socket, time; held = socket.create_server(('', 29500)); print('held', flush=True); time.sleep(600)",
    "store": "import torch.distributed as dist, time; held = dist.TCPStore('10.77.0.1', 29500, None, True, wait_for_workers=False); "
    "print('held', flush=True); time.sleep(600)",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_port_in_use_gives_a_message(holder, hosts, options):
    process = hosts.alpha.start(sys.executable, "-c", HOLDERS[holder], environment=environment())
    assert "held\n" in iter(process.stdout.readline, "")  # after torch's warnings
    start = time.monotonic()
    alpha, beta = run_on_both(hosts, options)
    assert time.monotonic() - start < 30 + 25  # Python and torch are imported first
    print(alpha[1], beta[1], sep="\n")
    assert alpha[0] == 2
    assert f"Port {PORT} of alpha is in use" in alpha[1]
    assert beta[0] in (1, 2)
    assert f"10.77.0.1:{PORT}" in beta[1]
    assert "Traceback" not in alpha[1] + beta[1]


def test_output_that_one_host_cannot_write_is_refused_before_training(hosts, options, tmp_path):
    with mounted(hosts.beta, tmp_path, "-t", "tmpfs", "-o", "ro", "none"):
        results = run_on_both(hosts, options)
    print(results[0][1], results[1][1], sep="\n")
    assert [status for status, _ in results] == [2, 2]
    assert f"Rank 1 on beta: output {tmp_path / 'run'}: {tmp_path} is not writable." in results[0][1]
    assert "Traceback" not in results[0][1] + results[1][1]


def test_output_that_the_hosts_do_not_share_is_refused_before_training(hosts, options, tmp_path):
    with mounted(hosts.beta, tmp_path, "-t", "tmpfs", "none"):
        results = run_on_both(hosts, options)
    assert [status for status, _ in results] == [2, 2]
    assert f"Rank 1 on beta writes to another {tmp_path} than rank 0: the output must be on a disk that all nodes share." in results[0][1]


def test_different_data_on_the_second_host_is_refused_before_training(hosts, options, prepared, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"another corpus, document {number}: " + "lorem ipsum dolor sit amet " * number)
    other = tmp_path / "other"
    prepare(PrepareSettings(input=(str(tmp_path / "text"),), output=str(other), tokenizer=str(prepared / "tokenizer.model"), workers=1))
    with mounted(hosts.beta, prepared, "--bind", str(other)):
        results = run_on_both(hosts, options)
    print(results[0][1], results[1][1], sep="\n")
    assert [status for status, _ in results] == [2, 2]
    assert f"Rank 1 on beta differs from rank 0 on alpha: the data: {prepared} is " in results[0][1]
    assert not (tmp_path / "run").exists()
