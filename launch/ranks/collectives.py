"""Communication among all ranks of a run: over the shared store before there is a process group, and with the group after that."""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.command_line import UserError
from launch.ranks.processes import Process, host_name

Value = TypeVar("Value")

_SECONDS_TO_READ_A_MESSAGE = 10


class RanksMissing(RuntimeError):
    """Other ranks did not start or have ended. The settings are not wrong, so the same command may succeed the next time."""


def gather_on_rank0(store: dist.Store, process: Process, name: str, value: dict, seconds: float) -> list[dict]:
    """Return every rank's value in the order of ranks on rank 0, and an empty list on the others. Needs no process group.

    `name` must be new in this store. Raises RanksMissing if a rank has not given its value after `seconds`.
    """
    store.set(f"{name}/{process.rank}", json.dumps(value))
    if not process.is_first:
        return []
    keys = [f"{name}/{rank}" for rank in range(process.world_size)]
    missing = missing_keys(store, keys, time.monotonic() + seconds)
    if missing:
        raise RanksMissing(
            f"{list_ranks(missing)} did not respond during start-up ({name}; waited {seconds:g} s). See the end of their logs."
        )
    return [json.loads(store.get(key)) for key in keys]


def broadcast_from_rank0(store: dist.Store, process: Process, name: str, text: str, seconds: float) -> str:
    """Return the text of rank 0 on every rank. Needs no process group.

    `name` must be new in this store. Raises RanksMissing if rank 0 has not given its text after `seconds`. Rank 0 holds the store and
    may end after this call, so it waits a few seconds until all ranks have read the text.
    """
    readers = f"{name} readers"
    if process.is_first:
        store.set(name, text)
        deadline = time.monotonic() + _SECONDS_TO_READ_A_MESSAGE
        while store.add(readers, 0) < process.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return text
    if missing_keys(store, [name], time.monotonic() + seconds):
        raise RanksMissing(f"Rank 0 did not respond during start-up ({name}; waited {seconds:g} s). See the end of its log.")
    text = store.get(name).decode()
    store.add(readers, 1)
    return text


def join_process_group(store: dist.Store, process: Process, device: str, timeout: timedelta) -> str:
    """Join the process group over a store, and return its backend: nccl for the device "cuda", else gloo.

    `timeout` is how long a rank waits for the others in any later collective.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    store.set_timeout(timeout)  # NCCL reads its ids from the store at the first use of each group
    store = dist.PrefixStore("process group", store)
    dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world_size, timeout=timeout)
    return backend


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a process group. Every method is called by every rank, in the same order; a single rank needs no group."""

    process: Process
    device: torch.device
    """Device of the tensors that are exchanged, which must be one that the backend can use."""

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.process.is_first

    def sum(self, numbers: list[float]) -> list[float]:
        """Return the sums over all ranks, computed in float64."""
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum_in_place([summed])
        return summed.tolist()

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.process.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def max_in_place(self, tensor: Tensor) -> None:
        """Replace a tensor by its element-wise maximum over all ranks."""
        if self.process.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def all_ranks(self, ok: bool) -> bool:
        """Return True if `ok` is True on every rank."""
        return self.sum([0 if ok else 1])[0] == 0

    def all_gather(self, value: Value) -> list[Value]:
        """Return every rank's value (any object that can be pickled) on every rank, in the order of ranks."""
        if self.process.world_size == 1:
            return [value]
        values: list = [None] * self.process.world_size
        dist.all_gather_object(values, value)
        return values

    def first_error_of_any_rank(self, error: str | None) -> str | None:
        """Return, on every rank, the error message of the lowest rank that has one; None if no rank has one."""
        return next((one for one in self.all_gather(error) if one), None)

    def broadcast(self, value: Value | None, source: int = 0) -> Value:
        """Return the value of rank `source` (any object that can be pickled) on every rank."""
        values = [value]
        if self.process.world_size > 1:
            dist.broadcast_object_list(values, src=source, device=self.device)
        return values[0]  # type: ignore[return-value]

    def run_on_rank0(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 and return its result on every rank; if it raises UserError there, every rank raises it."""
        outcome: tuple[Value | None, UserError | None] = None, None
        if self.is_first:
            try:
                outcome = function(), None
            except UserError as error:
                outcome = None, error
        result, mistake = self.broadcast(outcome)
        if mistake is not None:
            raise mistake
        return result  # type: ignore[return-value]


class CollectedError:
    """The first error of the operations that this rank ran on a disk or a file.

    It is kept and not raised, because the other ranks are already waiting in the next collective.
    """

    def __init__(self) -> None:
        self.message: str | None = None

    def run(self, operation: Callable[[], Value]) -> Value | None:
        """Call a function and return its result; keep the message, and return None, if it raises UserError or OSError."""
        try:
            return operation()
        except UserError as error:
            self.message = self.message or str(error)
        except OSError as error:
            self.message = self.message or f"{type(error).__name__}: {error}."
        return None


def describe_lost_ranks(error: RuntimeError, communication_timeout: float) -> str | None:
    """Return a message if the error means that other ranks have ended or do not answer, else None.

    The error's notes tell in which step it was. Gloo's messages contain its name and how long it waited, except if a transfer was under
    way while another one timed out.
    """
    text = str(error)
    if isinstance(error, RanksMissing):
        return text
    ended_with_another = "timeout caused pair closure" in text
    is_communication = isinstance(error, dist.DistError) or "gloo" in text.lower() or ended_with_another
    if not is_communication or not re.search(r"timed? ?out|connection|connect|peer|socket|remote process|network", text, re.I):
        return None
    reason = re.sub(r"^(\[[^]]*\]\s*)+", "", " ".join(text.split())).rstrip(". ")[:500]  # without gloo's source file and line
    if ended_with_another or re.search(r"[Tt]imed out waiting \d+ms", reason):
        reason = f"no answer for {communication_timeout:g} s (--communication_timeout)"
    when = " ".join(getattr(error, "__notes__", ["during start-up"]))
    return f"Rank {os.environ['RANK']} on {host_name()} lost the other ranks {when}: {reason}."


def missing_keys(store: dist.Store, keys: list[str], deadline: float) -> list[str]:
    """Wait until a store has all the keys; return those that it does not have at the deadline (of time.monotonic)."""
    try:
        store.wait(keys, timedelta(seconds=max(0.05, deadline - time.monotonic())))
        return []
    except dist.DistError:  # the time is over, or the process that holds the store has ended
        with contextlib.suppress(dist.DistError):
            return [key for key in keys if not store.check([key])]
        return keys


def list_ranks(keys: list[str]) -> str:
    """The ranks that keys of the form NAME/RANK stand for, as the beginning of a message; at most eight are listed."""
    numbers = [key.rpartition("/")[2] for key in keys]
    shown = ", ".join(numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"Rank{'s' if len(numbers) > 1 else ''} {shown}"
