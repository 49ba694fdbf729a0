"""How ranks find one another, and tell rank 0 a word before there is a process group. Every mistake ends in a sentence, soon."""

import contextlib
import fcntl
import ipaddress
import itertools
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from data.command_line import RankError
from launch.ranks.processes import Process, host_name

_FAREWELL_SECONDS = 10


class RanksMissing(RuntimeError):
    """Other ranks did not come, or are gone: no mistake in the settings, so the same start may succeed the next time."""


def meet(process: Process, seconds: float, arguments: Sequence[str]) -> dist.Store:
    """The store that all ranks of this run share; returns when all are there, and gloo knows by which interface they are reached.

    Raises RankError where MASTER_ADDR cannot be resolved or another program or run has the port, and RanksMissing where ranks are not
    there after `seconds`. `arguments`, the run's own, are how it is told from another one at the same port.
    """
    if process.world_size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + seconds
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    reached = _address_of(host, port)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process has the port then
    is_server = process.is_first and not by_agent
    if not is_server:
        reached = _wait_for_listener(host, port, deadline, seconds)
    store: dist.Store = _open(host, port, process, is_server, deadline, seconds)
    if by_agent:  # it outlives a restart of its ranks
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    address = _check_in(store, process, f"{host}:{port}", reached, arguments, deadline, seconds)
    if process.spans_nodes and (interface := _interface_to(address)):
        # By itself gloo takes the address of the machine's own name, which on Debian is 127.0.1.1: no other machine can reach that.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store


def gather(store: dist.Store, process: Process, name: str, mine: dict, seconds: float) -> list[dict]:
    """What every rank says, in the order of ranks, on rank 0; on the others an empty list. Raises RanksMissing after `seconds`."""
    store.set(f"{name}/{process.rank}", json.dumps(mine))
    if not process.is_first:
        return []
    keys = [f"{name}/{rank}" for rank in range(process.world_size)]
    missing = _wait(store, keys, time.monotonic() + seconds)
    if missing:
        raise RanksMissing(
            f"{_ranks(missing)} said nothing more at the start ({name}; waited at most {seconds:g} s); see the end of their logs."
        )
    return [json.loads(store.get(key)) for key in keys]


def tell(store: dist.Store, process: Process, name: str, text: str, seconds: float) -> str:
    """What rank 0 says, on every rank. Raises RanksMissing where it says nothing within `seconds`.

    Rank 0 stays until all have heard it, or some seconds: it may be its last word, and the store goes with it.
    """
    heard = f"{name} heard"
    if process.is_first:
        store.set(name, text)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while store.add(heard, 0) < process.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return text
    if _wait(store, [name], time.monotonic() + seconds):
        raise RanksMissing(f"Rank 0 said nothing more at the start ({name}; waited at most {seconds:g} s); see the end of its log.")
    text = store.get(name).decode()
    store.add(heard, 1)
    return text


def sentence_of_loss(error: RuntimeError, communication_timeout: float) -> str | None:
    """Why a rank cannot go on without the others, where that is what the error is about. Its notes say when it was.

    Gloo names itself, and how long it waited, but where a transfer was under way while another ran out of its time.
    """
    text = str(error)
    if isinstance(error, RanksMissing):
        return text
    ended_with_another = "timeout caused pair closure" in text
    of_communication = isinstance(error, dist.DistError) or "gloo" in text.lower() or ended_with_another
    if not of_communication or not re.search(r"timed? ?out|connection|connect|peer|socket|remote process|network", text, re.I):
        return None
    reason = re.sub(r"^(\[[^]]*\]\s*)+", "", " ".join(text.split())).rstrip(". ")[:500]  # without gloo's source file and line
    if ended_with_another or re.search(r"[Tt]imed out waiting \d+ms", reason):
        reason = f"no answer for {communication_timeout:g} s (--communication_timeout)"
    when = " ".join(getattr(error, "__notes__", ["at the start"]))
    return f"Rank {os.environ['RANK']} on {host_name()} lost the other ranks {when}: {reason}."


def _address_of(host: str, port: int) -> str:
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise RankError(
            f'MASTER_ADDR "{host}" (port {port}), the machine of rank 0, cannot be resolved on {host_name()}: {error.strerror}. '
            "It must be a name or an address that every node knows."
        ) from error


def _wait_for_listener(host: str, port: int, deadline: float, seconds: float) -> str:
    """The address at which something listens; rank 0 may still be importing."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(5, max(0.1, deadline - time.monotonic()))) as connection:
                return connection.getpeername()[0]
        except OSError as error:
            reason = error.strerror or "no answer"
        if time.monotonic() > deadline:
            raise RanksMissing(
                f"{host_name()} cannot reach rank 0 at {host}:{port} within {seconds:g} s: {reason}. Rank 0 has ended or not started "
                "(see its log), MASTER_ADDR or MASTER_PORT is wrong, or a firewall is between. --rendezvous_seconds waits longer."
            )
        time.sleep(0.2)


def _open(host: str, port: int, process: Process, is_server: bool, deadline: float, seconds: float) -> dist.TCPStore:
    """Torch's store. In a thread, because its client waits for ever where something listens and does not speak its language."""
    result: list = []

    def connect() -> None:
        patience = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        # Rank 0 speaks to its own server at once, so a MASTER_ADDR that leads elsewhere must not be asked.
        ours = "localhost" if is_server else host
        try:
            result.append(dist.TCPStore(ours, port, process.world_size, is_server, patience, wait_for_workers=False))
        except RuntimeError as error:
            result.append(error)

    give_up_port = deadline - seconds / 3  # so long a run that has just ended may hold it
    while True:
        result.clear()
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(max(0.1, deadline - time.monotonic()))
        if result and not isinstance(result[0], Exception):
            return result[0]
        in_use = bool(result) and "EADDRINUSE" in str(result[0])
        if not (is_server and in_use and time.monotonic() < give_up_port):
            break
        time.sleep(0.5)
    if is_server and in_use:
        # The port of a batch job is made of its number and its restarts: the next start has another.
        raise (RanksMissing if "SLURM_JOB_ID" in os.environ else RankError)(
            f"Port {port} of {host_name()} is in use by another program, so rank 0 cannot listen at {host}:{port}. "
            "Give another MASTER_PORT (deepspeed and torchrun: --master_port), or end what holds it."
        )
    no_answer = f"what listens there does not answer as a rank 0 does; is port {port} another program's?"
    what = str(result[0]).splitlines()[0] if result else no_answer
    raise RanksMissing(f"{host_name()} reached {host}:{port} but could not join the run within {seconds:g} s: {what}")


def _check_in(
    store: dist.Store, process: Process, place: str, reached: str, arguments: Sequence[str], deadline: float, seconds: float
) -> str:
    """Return when all ranks are there and are those of this run: the address by which other machines reached rank 0's."""
    if process.is_first:
        store.set("run", json.dumps({"world_size": process.world_size, "arguments": list(arguments), "host": host_name(), "job": _job()}))
    elif _wait(store, ["run"], deadline):
        raise RanksMissing(f"Rank 0 did not come to {place} within {seconds:g} s; see the end of its log.")
    first = json.loads(store.get("run"))
    if (first["world_size"], first["arguments"]) != (process.world_size, list(arguments)):
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first["arguments"], arguments, strict=False)))
        theirs, own = (" ".join(words[alike : alike + 6]) or "nothing" for words in (first["arguments"], arguments))
        raise RankError(
            f"{process} found another run at {place}: rank 0 on {first['host']} is of {first['world_size']} rank(s), this one of "
            f"{process.world_size}; where their commands part, it has `{theirs}` and this one `{own}`. "
            "Start all nodes with one command, and each run with a MASTER_PORT of its own."
        )
    if first["job"] != _job() or store.add(f"came/{process.rank}", 1) > 1:
        raise RankError(f"{process} found another run of the same command at {place}. Give each run a MASTER_PORT of its own.")
    store.set(f"here/{process.rank}", reached)
    if not process.is_first:
        if _wait(store, ["address of rank 0"], deadline):
            raise RanksMissing(f"Rank {process.rank} came to {place}, but not all others within {seconds:g} s; rank 0's log names them.")
        return store.get("address of rank 0").decode()
    keys = [f"here/{rank}" for rank in range(process.world_size)]
    if missing := _wait(store, keys, deadline):
        sentence = f"{_ranks(missing)} of {process.world_size} ranks did not come to rank 0 at {place} within {seconds:g} s."
        if not _is_own(reached):
            raise RankError(f"{sentence} MASTER_ADDR leads to {reached}, which is no address of {host_name()}, where rank 0 is.")
        raise RanksMissing(f"{sentence} See the end of their logs; --rendezvous_seconds waits longer.")
    addresses = [store.get(key).decode() for key in keys]  # rank 0 itself may know its own name as a loopback address
    address = next((address for address in addresses if not ipaddress.ip_address(address).is_loopback), reached)
    store.set("address of rank 0", address)
    return address


def _job() -> list[str]:
    """What tells a batch job's start from an earlier one's."""
    return [os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "RESTART_COUNT")]


def _wait(store: dist.Store, keys: list[str], deadline: float) -> list[str]:
    """Those of the keys that are not there at the deadline."""
    try:
        store.wait(keys, timedelta(seconds=max(0.05, deadline - time.monotonic())))
        return []
    except dist.DistError:  # the time is up, or rank 0's store is gone
        with contextlib.suppress(dist.DistError):
            return [key for key in keys if not store.check([key])]
        return keys


def _ranks(keys: list[str]) -> str:
    numbers = [key.rpartition("/")[2] for key in keys]
    shown = ", ".join(numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"Rank{'s' if len(numbers) > 1 else ''} {shown}"


def _is_own(address: str) -> bool:
    """Whether an address is of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.bind((address, 0))
        return True
    return False


def _interface_to(address: str) -> str | None:
    """The name of the interface by which packets leave for an address, or that has it; None where the system does not say. IPv4."""
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
