"""Start ranks of a script and collect what each one answered. The only place where tests start processes of a run."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from launch.ranks.launchers import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
_ANSWER = "answer of this rank: "


_ENVIRONMENT = dict(os.environ)  # before any test: one that starts a run in this process sets DS_ACCELERATOR for all later ones


def clean_environment(**more: str) -> dict[str, str]:
    """The environment in which the tests were started, without what an outer launcher may have set."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in _ENVIRONMENT.items() if name not in launcher}
    binaries = os.path.dirname(sys.executable)
    return (
        kept
        | {
            "PATH": f"{binaries}:{kept.get('PATH', '')}",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "PYTHONFAULTHANDLER": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        | more
    )


_ON_CPU = {"DS_ACCELERATOR": "cpu"}  # whose numbers the tests hold; on a GPU runs tests/launch/test_gpu.py


class ForkedRank:
    """A script run by a fork of tests/fork_server.py, with as much of subprocess.Popen as the tests use."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]):
        output, prints = os.pipe()
        told, tells = os.pipe()
        socket.send_fds(_fork_server()[0], [json.dumps([arguments, environment]).encode()], [prints, tells])
        os.close(prints)
        os.close(tells)
        self.args, self.returncode = arguments, None
        self.stdout = os.fdopen(output, encoding="utf-8")
        self._told, self._listening = os.fdopen(told, "rb", buffering=0), threading.Lock()
        self.pid = self._next_number()

    def _next_number(self) -> int:
        return struct.unpack("i", self._told.read(4))[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        with self._listening:
            if self.returncode is None:
                self.returncode = self._next_number()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        read: list[str] = []
        reader = threading.Thread(target=lambda: read.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if not read:
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        return read[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _fork_server() -> tuple[socket.socket, subprocess.Popen]:
    """Started at the first use; ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        environment = clean_environment(**_ON_CPU)
        return ours, subprocess.Popen([sys.executable, "-m", "tests.fork_server"], env=environment, cwd=REPOSITORY, stdin=theirs)


def start_ranks(world_size: int, script: Path, *arguments: str, **environment: str) -> list[ForkedRank]:
    """One process a rank, as torchrun would start them; standard output and error of each are one pipe of text."""
    return [ForkedRank([str(script), *arguments], each) for each in _environments(world_size, environment)]


def _environments(world_size: int, more: dict[str, str]) -> list[dict[str, str]]:
    shared = clean_environment(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **_ON_CPU | more)
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def finish(processes: Sequence[ForkedRank | subprocess.Popen], timeout_seconds: float = 300) -> list[str]:
    """What each rank printed. Fails with all outputs where one did not end with status 0; no process outlives the call."""
    with ThreadPoolExecutor(len(processes)) as readers:  # all are read at once: a full pipe would stop its writer
        reading = [readers.submit(process.communicate) for process in processes]
        try:
            wait(reading, timeout_seconds)
        except BaseException:  # Ctrl-C: the readers end when the ranks do
            for process in processes:
                process.kill()
            raise
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        for rank in late:
            processes[rank].send_signal(signal.SIGABRT)  # faulthandler prints where it stood
        outputs = [output.result()[0] for output in reading]
    assert not late, f"ranks {late} were not done after {timeout_seconds} s:\n" + "\n---\n".join(outputs)
    for process in processes:
        assert process.returncode == 0, f"status {process.returncode}:\n" + "\n---\n".join(outputs)
    return outputs


def answers_of_ranks(world_size: int, script: Path, *arguments: str, timeout_seconds: float = 300, **environment: str) -> list:
    """What each rank's script gave to `answer`; libraries may print what they like before and behind it.

    Each rank is a fresh Python, as under a launcher, with an order of its sets of its own: forks would hide where ranks part over it.
    """
    command = [sys.executable, str(script), *arguments]
    processes = [
        subprocess.Popen(command, env=each, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for each in _environments(world_size, environment)
    ]
    outputs = finish(processes, timeout_seconds)
    found = [[line for line in output.splitlines() if line.startswith(_ANSWER)] for output in outputs]
    assert all(len(lines) == 1 for lines in found), "\n---\n".join(outputs)
    return [json.loads(lines[0].removeprefix(_ANSWER)) for lines in found]


def answer(value: object) -> None:
    """Called once in a rank's script, at its end: the value reaches the test."""
    sys.stderr.flush()
    print("\n" + _ANSWER + json.dumps(value), flush=True)
