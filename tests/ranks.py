"""Start ranks of a script and collect what each one answered. The only place where tests start processes of a run."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from launch.training.processes import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
_ANSWER = "answer of this rank: "


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without what an outer launcher may have set."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
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


def start_ranks(world_size: int, script: Path, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """One process a rank, as torchrun would start them; standard output and error of each are one pipe of text."""
    shared = clean_environment(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **environment)
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(processes: list[subprocess.Popen], timeout_seconds: float = 300) -> list[str]:
    """What each rank printed. Fails with all outputs where one did not end with status 0; no process outlives the call."""
    with ThreadPoolExecutor(len(processes)) as readers:  # all are read at once: a full pipe would stop its writer
        reading = [readers.submit(process.communicate) for process in processes]
        wait(reading, timeout_seconds)
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        for rank in late:
            processes[rank].send_signal(signal.SIGABRT)  # faulthandler prints where it stood
        outputs = [output.result()[0] for output in reading]
    assert not late, f"ranks {late} were not done after {timeout_seconds} s:\n" + "\n---\n".join(outputs)
    for process in processes:
        assert process.returncode == 0, f"status {process.returncode}:\n" + "\n---\n".join(outputs)
    return outputs


def answers_of_ranks(world_size: int, script: Path, *arguments: str, timeout_seconds: float = 300, **environment: str) -> list:
    """What each rank's script gave to `answer`; libraries may print what they like before and behind it."""
    outputs = finish(start_ranks(world_size, script, *arguments, **environment), timeout_seconds)
    found = [[line for line in output.splitlines() if line.startswith(_ANSWER)] for output in outputs]
    assert all(len(lines) == 1 for lines in found), "\n---\n".join(outputs)
    return [json.loads(lines[0].removeprefix(_ANSWER)) for lines in found]


def answer(value: object) -> None:
    """Called once in a rank's script, at its end: the value reaches `answers_of_ranks`."""
    sys.stderr.flush()
    print("\n" + _ANSWER + json.dumps(value), flush=True)
