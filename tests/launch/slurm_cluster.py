"""A real SLURM of several nodes on this machine: its own munged, slurmctld and slurmds, all files in one temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from launch.ranks.launchers import free_port
from tests.ranks import REPOSITORY, clean_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A requeued job waits until credentials have expired: 120 s by default, and for anything below 5.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=5
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=hasty Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """A running SLURM: the commands of a user on the login node, and faults of nodes."""

    def __init__(self, folder: Path, num_nodes: int):
        self.folder = folder
        self.environment = {name: value for name, value in clean_environment(OMP_NUM_THREADS="1").items() if not name.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{self.environment['PATH']}:{SYSTEM_PATH}"}
        self.slurmds: dict[str, subprocess.Popen] = {}
        self.others: list[subprocess.Popen] = []
        self.num_nodes = num_nodes

    def start(self) -> None:
        folder, names = self.folder, [f"n{number}" for number in range(1, self.num_nodes + 1)]
        self._write_configuration(names)
        munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("key-file", "pid-file", "log-file", "seed-file")]
        self.others.append(self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge))
        await_(lambda: (folder / "munge.socket").exists(), 10, "munged")
        self.others.append(self._start("slurmctld", "-D"))
        for name in names:
            self.start_node(name)
        await_(
            lambda: len(self.command("sinfo", "-h", "-N", "-p", "main", "-t", "idle", ok=False).splitlines()) == self.num_nodes,
            30,
            "idle nodes",
            lambda: self.log("slurmctld.log"),
        )

    def _write_configuration(self, names: list[str]) -> None:
        host = socket.gethostname().partition(".")[0]
        about = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 Gres=gpu:2"
        nodes = [f"NodeName={name} Port={free_port()} {about}" for name in names]
        text = CONFIGURATION.format(host=host, port=free_port(), folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu File=/dev/tty[0-1]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for name in ("state", *(f"spool.{name}" for name in names)):
            (self.folder / name).mkdir()

    def _start(self, *words: str) -> subprocess.Popen:
        with open(self.folder / f"{words[0]}.out", "ab") as out:
            return subprocess.Popen(words, env=self.environment, stdout=out, stderr=out, cwd=self.folder)

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")[-3000:]

    def command(self, *words: str, cwd: Path | None = None, ok: bool = True, **environment: str) -> str:
        done = subprocess.run(words, env=self.environment | environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not ok, f"{words}: {done.stdout}{done.stderr}"
        return (done.stdout + done.stderr).strip()

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """Submit a batch job and return its id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, **environment)

    def about(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job: JobState, Restarts, Reason, ..."""
        shown = self.command("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def await_end(self, job: str, seconds: float = 300) -> str:
        """Wait until a job has ended and return its state: COMPLETED, FAILED, CANCELLED ..."""

        def over() -> bool:
            return self.about(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

        await_(over, seconds, f"job {job}", lambda: str(self.about(job)) + job_log(self.about(job)))
        return self.about(job)["JobState"]

    def processes_of(self, node: str | None = None) -> Iterator[int]:
        """Yield the processes of jobs (of one node), found by their environment."""
        marks = [f"SLURM_CONF={self.folder}/slurm.conf", *([f"SLURMD_NODENAME={node}"] if node else [])]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_text(errors="replace").split("\0")
                except OSError:
                    continue
                if all(mark in environment for mark in marks):
                    yield int(entry.name)

    def ranks_of(self, job: str, node: str | None = None) -> list[int]:
        """Return the process ids of a job's ranks, in the order of ranks."""
        found = {}
        for process in self.processes_of(node):
            try:
                environment = dict(word.split("=", 1) for word in Path(f"/proc/{process}/environ").read_text().split("\0") if "=" in word)
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            except OSError:
                continue
            is_rank = len(words) > 1 and "python" in words[0] and words[1].endswith("pretrain.py")
            if is_rank and environment.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in environment:
                found[int(environment["SLURM_PROCID"])] = process
        return [found[rank] for rank in sorted(found)]

    def kill_node(self, node: str) -> None:
        """Kill slurmd, the slurmstepds of the node and everything that they started at once, as a power cut does."""
        of_jobs = list(self.processes_of(node))
        step_daemons = {parent for process in of_jobs if (parent := parent_of(process)) and is_step_daemon(parent)}
        self.slurmds[node].kill()
        self.slurmds.pop(node).wait()
        for process in [*step_daemons, *of_jobs]:
            kill(process)

    def start_node(self, node: str) -> None:
        self.slurmds[node] = self._start("slurmd", "-D", "-N", node)

    def stop(self) -> None:
        for node in self.command("sinfo", "-h", "-N", "-o", "%N", ok=False).split():
            if node not in self.slurmds:
                self.start_node(node)
        self.command("scancel", "--state=PENDING", "--user=root", ok=False)
        self.command("scancel", "--user=root", "--signal=KILL", ok=False)
        self.command("scancel", "--user=root", ok=False)
        for _ in range(20):
            if not self.command("squeue", "-h", ok=False):
                break
            time.sleep(0.5)
        for daemon in [*self.slurmds.values(), *reversed(self.others)]:
            daemon.terminate()
        for daemon in [*self.slurmds.values(), *self.others]:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in list(self.processes_of()):
            kill(process)


@contextmanager
def cluster(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """Start a cluster. Skips the test with the reason if it cannot start; if the variable CI is set, fails instead."""
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    reason = f"SLURM is not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None
    reason = reason or ("slurmd must be started by root" if os.geteuid() != 0 else None)
    if reason:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    started = Cluster(folder, num_nodes)
    try:
        started.start()
        yield started
    finally:
        started.stop()


def await_(true: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not reached within {seconds} s\n{explain()}"
        time.sleep(0.2)


def job_log(about: dict[str, str]) -> str:
    path = Path(about.get("StdOut", ""))
    return path.read_text(errors="replace") if path.is_file() else ""


def kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def parent_of(process: int) -> int | None:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def is_step_daemon(process: int) -> bool:
    """True for a slurmstepd, of which each job step has one on each node; it is not a child of slurmd."""
    try:
        return Path(f"/proc/{process}/comm").read_text().startswith("slurmstepd")
    except OSError:
        return False


SLURM_SCRIPTS = REPOSITORY / "launch" / "slurm"
