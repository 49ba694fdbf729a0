"""Two hosts on this machine, each with its own network, host name, processes and sshd. The network between them can be cut.

A host is a set of Linux namespaces with its own first process, which the kernel ends together with this process: no part of it runs
longer than the tests, and commands in it (a `pkill`, a mount, a firewall) do not affect the machine. This needs root and Debian's
openssh-server, pdsh, iproute2 and iptables.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ranks import REPOSITORY

_PROGRAMS = ("setpriv", "unshare", "nsenter", "taskset", "ip", "iptables", "hostname", "ssh", "ssh-keygen", "sshd", "pdsh")
_CLIENT = """
IdentityFile {folder}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
_SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""
_INIT = """
set -e
hostname {name}
ip link set lo up
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind {folder}/hosts.{name} /etc/hosts
mount --bind {folder}/ssh /etc/ssh
$(command -v sshd) -D -e 2> {folder}/sshd.{name}.log &
wait
"""


@dataclasses.dataclass(frozen=True)
class Host:
    """One of the two hosts. It has the files of the machine, as on a network disk."""

    name: str
    address: str
    init: int
    """Process id of its first process, as the machine counts."""
    core: int
    """Its only core. Two hosts that both used all cores of the machine would slow each other down."""

    def start(self, *command: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        """Start a command on the host, in the repository; standard output and error are one pipe of text."""
        enter = ("nsenter", "--target", str(self.init), "--net", "--uts", "--mount", "--pid")
        return subprocess.Popen(
            ["taskset", "--cpu-list", str(self.core), *enter, "env", f"--chdir={REPOSITORY}", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        """Run a short command and return its output. Fails if the command fails."""
        process = self.start(*command)
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0, f"{self.name}: {' '.join(command)}: {output}"
        return output

    def processes(self) -> list[psutil.Process]:
        """Processes on the host, without its first process and sshd."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):  # it has just ended, or is a zombie
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace
                if inside and process.pid != self.init and process.name() != "sshd":
                    found.append(process)
        return found


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Both hosts and the network between them."""

    alpha: Host
    beta: Host

    def cut(self) -> None:
        """Drop each packet between the hosts from now on, without a reset or an "unreachable" reply."""
        for host in (self.alpha, self.beta):
            host.run("iptables", "--append", "INPUT", "--in-interface", "eth0", "--jump", "DROP")

    def mend(self) -> None:
        """Let packets through again."""
        for host in (self.alpha, self.beta):
            host.run("iptables", "--flush", "INPUT")

    def running(self) -> list[str]:
        """Processes on both hosts, each as host and command line."""
        found = []
        for host in (self.alpha, self.beta):
            for process in host.processes():
                with contextlib.suppress(psutil.Error):
                    found.append(f"{host.name}: {' '.join(process.cmdline())}")
        return found

    def end_all(self) -> None:
        """Kill all processes on both hosts."""
        for host in (self.alpha, self.beta):
            for process in host.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Start the hosts alpha (10.77.0.1) and beta (10.77.0.2), which reach each other by name and by ssh without a password.

    On its own host, each name is 127.0.1.1, as Debian and Ubuntu set it up: a server that listens on that address cannot be reached.
    """
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    reason = f"{', '.join(missing)} not installed" if missing else "not root" if os.geteuid() else None
    if reason and "CI" in os.environ:
        pytest.fail(f"two hosts cannot be started on this machine: {reason}")
    if reason:
        pytest.skip(f"two hosts cannot be started on this machine: {reason}")
    addresses = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
    (folder / "ssh").mkdir()
    (folder / "ssh" / "ssh_config").write_text(_CLIENT.format(folder=folder))
    (folder / "ssh" / "sshd_config").write_text(_SERVER.format(folder=folder))
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with contextlib.ExitStack() as ends:
        for name in addresses:
            lines = [f"{'127.0.1.1' if host == name else address} {host}" for host, address in addresses.items()]
            (folder / f"hosts.{name}").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        cores = sorted(os.sched_getaffinity(0))
        alpha, beta = (
            Host(name, address, ends.enter_context(_init(name, folder, core)), core)
            for (name, address), core in zip(addresses.items(), (cores[0], cores[-1]), strict=True)
        )
        cable = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(beta.init))
        subprocess.run(["nsenter", "--target", str(alpha.init), "--net", *cable], check=True)
        for host in (alpha, beta):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        for name in addresses:
            _wait_for_ssh(alpha, name)
        yield Hosts(alpha, beta)


@contextlib.contextmanager
def _init(name: str, folder: Path, core: int) -> Iterator[int]:
    """Start the first process of a host; yields its process id."""
    namespaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    script = _INIT.format(name=name, folder=folder)
    outer = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "taskset", "--cpu-list", str(core), "unshare", *namespaces, "sh", "-c", script]
    )
    try:
        until = time.monotonic() + 10
        while not (folder / f"sshd.{name}.log").exists():  # the last file that the script creates
            assert outer.poll() is None and time.monotonic() < until, f"host {name} did not start"
            time.sleep(0.02)
        yield psutil.Process(outer.pid).children()[0].pid
    finally:
        outer.send_signal(signal.SIGKILL)  # the kernel ends all others
        outer.wait()


def _wait_for_ssh(host: Host, other: str) -> None:
    until = time.monotonic() + 10
    while True:
        process = host.start("ssh", "-o", "ConnectTimeout=2", other, "hostname")
        output = process.communicate(timeout=30)[0]
        if output.strip() == other:
            return
        assert time.monotonic() < until, f"ssh from {host.name} to {other}: {output}"
        time.sleep(0.1)
