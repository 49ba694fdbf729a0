"""How the ranks of a run find one another before there is a process group. Every failure gives a clear message within a time limit."""

import contextlib
import fcntl
import ipaddress
import itertools
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from data.command_line import RankError
from launch.ranks.collectives import RanksMissing, list_ranks, missing_keys
from launch.ranks.processes import Process, host_name


def connect(process: Process, seconds: float, arguments: Sequence[str]) -> dist.Store:
    """Return the store that all ranks of this run share, once all of them are connected to it.

    Also sets GLOO_SOCKET_IFNAME to the network interface by which the other machines reach this one. `arguments` is the run's command
    line, which distinguishes it from another run on the same port. Raises RankError if MASTER_ADDR cannot be resolved or if another
    program or run uses the port, and RanksMissing if some ranks are not connected after `seconds`.
    """
    if process.world_size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + seconds
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    reached = _address_of(host, port)
    agent_has_port = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process listens then
    is_server = process.is_first and not agent_has_port
    if not is_server:
        reached = _wait_for_listener(host, port, deadline, seconds)
    store: dist.Store = _open_store(host, port, process, is_server, deadline, seconds)
    if agent_has_port:  # its store outlives a restart of the ranks
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    address = _register(store, process, f"{host}:{port}", reached, arguments, deadline, seconds)
    if process.spans_nodes and (interface := _interface_to(address)):
        # Without this, gloo uses the address of the machine's own name, which on Debian is 127.0.1.1: other machines cannot reach that.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store


def _address_of(host: str, port: int) -> str:
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise RankError(
            f'MASTER_ADDR "{host}" (port {port}), the machine of rank 0, cannot be resolved on {host_name()}: {error.strerror}. '
            "Give a name or an address that every node can resolve."
        ) from error


def _wait_for_listener(host: str, port: int, deadline: float, seconds: float) -> str:
    """Wait until a program listens at HOST:PORT (rank 0 may still be importing), and return the address."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(5, max(0.1, deadline - time.monotonic()))) as connection:
                return connection.getpeername()[0]
        except OSError as error:
            reason = error.strerror or "no answer"
        if time.monotonic() > deadline:
            raise RanksMissing(
                f"{host_name()} cannot reach rank 0 at {host}:{port} within {seconds:g} s: {reason}. Rank 0 has ended or not started "
                "(see its log), MASTER_ADDR or MASTER_PORT is wrong, or a firewall blocks it. A larger --rendezvous_seconds waits longer."
            )
        time.sleep(0.2)


def _open_store(host: str, port: int, process: Process, is_server: bool, deadline: float, seconds: float) -> dist.TCPStore:
    """Open torch's store. In a thread, because its client waits for ever if another program listens at that port."""
    result: list = []

    def create_store() -> None:
        """Open the store at rank 0, or connect to it."""
        timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        # Rank 0 connects to its own server directly: MASTER_ADDR may lead to another machine.
        server = "localhost" if is_server else host
        try:
            result.append(dist.TCPStore(server, port, process.world_size, is_server, timeout, wait_for_workers=False))
        except RuntimeError as error:
            result.append(error)

    last_try_for_port = deadline - seconds / 3  # a run that has just ended may use the port for that long
    while True:
        result.clear()
        thread = threading.Thread(target=create_store, daemon=True)
        thread.start()
        thread.join(max(0.1, deadline - time.monotonic()))
        if result and not isinstance(result[0], Exception):
            return result[0]
        in_use = bool(result) and "EADDRINUSE" in str(result[0])
        if not (is_server and in_use and time.monotonic() < last_try_for_port):
            break
        time.sleep(0.5)
    if is_server and in_use:
        # The port of a batch job is derived from its job number and restart count, so the next start has another one.
        raise (RanksMissing if "SLURM_JOB_ID" in os.environ else RankError)(
            f"Port {port} of {host_name()} is in use by another program, so rank 0 cannot listen at {host}:{port}. "
            "Give another MASTER_PORT (deepspeed and torchrun: --master_port), or end the program that uses it."
        )
    no_answer = f"the program that listens there does not answer as rank 0 does; does another program use port {port}?"
    reason = str(result[0]).splitlines()[0] if result else no_answer
    raise RanksMissing(f"{host_name()} reached {host}:{port} but could not join the run within {seconds:g} s: {reason}")


def _register(
    store: dist.Store, process: Process, server: str, reached: str, arguments: Sequence[str], deadline: float, seconds: float
) -> str:
    """Wait until all ranks are registered and belong to this run; return the address by which other machines reached rank 0's.

    `server` is HOST:PORT of the store, and `reached` the address that this rank found behind it.
    """
    if process.is_first:
        run = {"world_size": process.world_size, "arguments": list(arguments), "host": host_name(), "job": _batch_job()}
        store.set("run", json.dumps(run))
    elif missing_keys(store, ["run"], deadline):
        raise RanksMissing(f"Rank 0 did not connect to {server} within {seconds:g} s. See the end of its log.")
    _refuse_other_run(json.loads(store.get("run")), process, server, list(arguments))
    if store.add(f"registrations/{process.rank}", 1) > 1:
        raise _same_command(process, server)
    store.set(f"address/{process.rank}", reached)
    if not process.is_first:
        if missing_keys(store, ["address of rank 0"], deadline):
            raise RanksMissing(
                f"Rank {process.rank} connected to {server}, but not all others did within {seconds:g} s; rank 0's log lists them."
            )
        return store.get("address of rank 0").decode()
    keys = [f"address/{rank}" for rank in range(process.world_size)]
    if missing := missing_keys(store, keys, deadline):
        message = f"{list_ranks(missing)} of {process.world_size} ranks did not connect to rank 0 at {server} within {seconds:g} s."
        if not _is_own(reached):
            raise RankError(f"{message} MASTER_ADDR leads to {reached}, which is not an address of {host_name()}, where rank 0 runs.")
        raise RanksMissing(f"{message} See the end of their logs; a larger --rendezvous_seconds waits longer.")
    addresses = [store.get(key).decode() for key in keys]  # rank 0 may know its own name as a loopback address
    address = next((address for address in addresses if not ipaddress.ip_address(address).is_loopback), reached)
    store.set("address of rank 0", address)
    return address


def _refuse_other_run(run: dict, process: Process, server: str, arguments: list[str]) -> None:
    """Raise RankError if rank 0 belongs to another run than this rank."""
    if (run["world_size"], run["arguments"]) != (process.world_size, arguments):
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(run["arguments"], arguments, strict=False)))
        theirs, ours = (" ".join(words[alike : alike + 6]) or "nothing" for words in (run["arguments"], arguments))
        raise RankError(
            f"{process} found another run at {server}: rank 0 on {run['host']} has {run['world_size']} rank(s), this run "
            f"{process.world_size}. From the first difference on, its command has `{theirs}` and this one `{ours}`. "
            "Start all nodes with one command, and each run with its own MASTER_PORT."
        )
    if run["job"] != _batch_job():
        raise _same_command(process, server)


def _same_command(process: Process, server: str) -> RankError:
    return RankError(f"{process} found another run of the same command at {server}. Give each run its own MASTER_PORT.")


def _batch_job() -> list[str]:
    """SLURM's job number and restart count, which distinguish this start of a batch job from an earlier one."""
    return [os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "RESTART_COUNT")]


def _is_own(address: str) -> bool:
    """True if an address belongs to this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.bind((address, 0))
        return True
    return False


def _interface_to(address: str) -> str | None:
    """Name of the network interface that has, or sends packets to, an IPv4 address; None if the system does not know one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                siocgifaddr = 0x8915  # netdevice(7)
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None
