"""Worker processes that process units and write shards, and the progress display."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any

import tqdm

from data.preparation.work_units import UnitWorker, WorkerSettings
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_REFRESHES = 0.2


class WorkerLost(RuntimeError):
    """A worker process died (for example killed by the out-of-memory killer)."""


class Workers:
    """A pool that calls functions with a UnitWorker as first argument: in this process if there is one worker, else in worker processes."""

    def __init__(self, settings: WorkerSettings, count: int, tokenizer: Tokenizer) -> None:
        """Start `count` workers. `tokenizer` is that of the settings, with one thread, which this process has loaded already."""
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._done: list[int] | SynchronizedArray = [0, 0]
        if count == 1:
            self._worker = UnitWorker(settings, tokenizer if settings.threads == 1 else _load_tokenizer(settings), self._add_done)
            return
        # Spawned, not forked: a forked process would inherit the locks of the caller's PyTorch threads, and could wait for them forever.
        context = get_context("spawn")
        self._done = done = context.Array("q", 2)
        self._pool = ProcessPoolExecutor(count, context, _start_worker, (settings, done))

    def _add_done(self, num_bytes: int, num_documents: int) -> None:
        self._done[0] += num_bytes
        self._done[1] += num_documents

    @property
    def done(self) -> tuple[int, int]:
        """(bytes of text, documents) that all workers have processed so far."""
        return self._done[0], self._done[1]

    def call(self, function: Callable[..., Any], calls: Iterable[tuple], refresh: Callable[[], object]) -> Iterator[tuple[tuple, Any]]:
        """Yield (arguments, result) of function(worker, *arguments) for all `calls`, in the order in which they finish.

        `calls` is read only a little ahead of the work. `refresh` is called from time to time.
        """
        if self._pool is None:
            for arguments in calls:
                yield arguments, function(self._worker, *arguments)
                refresh()
            return
        waiting: dict[Future, tuple] = {}
        remaining = iter(calls)
        try:
            while True:
                while len(waiting) < 2 * self.count and (upcoming := next(remaining, None)) is not None:
                    waiting[self._pool.submit(_call, function, upcoming)] = upcoming
                if not waiting:
                    return
                done, _ = wait(waiting, _SECONDS_BETWEEN_REFRESHES, FIRST_COMPLETED)
                for future in sorted(done, key=list(waiting).index):
                    yield waiting.pop(future), future.result()
                refresh()
        except BrokenProcessPool as error:
            raise WorkerLost("A worker process died. The system log shows if the machine ran out of memory.") from error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # after an error the unfinished results are not needed
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


_worker: UnitWorker | None = None  # the UnitWorker of a worker process


def _start_worker(settings: WorkerSettings, done: SynchronizedArray) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # only the parent prints a message
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def _add_done(num_bytes: int, num_documents: int) -> None:
        with done.get_lock():
            done[0] += num_bytes
            done[1] += num_documents

    _worker = UnitWorker(settings, _load_tokenizer(settings), _add_done)


def _load_tokenizer(settings: WorkerSettings) -> Tokenizer:
    return load_tokenizer(settings.tokenizer, fast=settings.fast, threads=settings.threads)


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[..., Any], arguments: tuple) -> Any:
    return function(_worker, *arguments)


def show_progress(done: Iterable, total: int, unit: str, log: Callable[[str], object]) -> None:
    """Consume all of `done` and show how many of `total` there were: a bar on a terminal, else a line every few seconds."""
    logged = time.monotonic()
    with tqdm.tqdm(total=total, desc="Writing", unit=f" {unit}", disable=None) as bar:
        for number, _ in enumerate(done, start=1):
            bar.update()
            if bar.disable and time.monotonic() - logged > _SECONDS_BETWEEN_LINES:
                logged = time.monotonic()
                log(f"{number:,} of {total:,} {unit} written")


class Progress:
    """Progress display: a bar on a terminal, else a line every few seconds.

    It shows input done and total, documents and megabytes a second, and the remaining time. For a compressed file that several workers
    read, the input done is the largest position that one of them has reached.
    """

    def __init__(self, workers: Workers, num_bytes: int | None, log: Callable[[str], object]) -> None:
        """`num_bytes` is the size of the input, or None if it is unknown."""
        self._workers, self._log = workers, log
        self._total, self._input, self._input_before = num_bytes, 0, 0
        self._done: dict[object, int] = {}
        self._started = self._logged = time.monotonic()
        self._bar = tqdm.tqdm(total=num_bytes, desc="Preparing", unit="B", unit_scale=True, disable=None, smoothing=0.05)

    def add(self, key: object, num_bytes: int, is_new: bool) -> None:
        """Set the bytes done of the input `key`, if they have grown. `is_new` is False for work of an earlier start."""
        added = max(0, num_bytes - self._done.get(key, 0))
        self._done[key] = self._done.get(key, 0) + added
        self._input += added
        self._input_before += 0 if is_new else added
        self._bar.update(added)

    def refresh(self) -> None:
        """Show the current speed, if it is time for that."""
        now = time.monotonic()
        text_bytes, documents = self._workers.done
        seconds = max(1e-3, now - self._started)
        speed = f"{documents:,} documents, {documents / seconds:,.0f} documents/s, {text_bytes / seconds / 1e6:.1f} MB/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(0)
        elif now - self._logged > _SECONDS_BETWEEN_LINES:
            self._logged = now
            total = f" of {self._total / 1e6:,.0f} MB" if self._total else " MB"
            left = ""
            if self._total and self._input > self._input_before:
                remaining = round(seconds * (self._total - self._input) / (self._input - self._input_before))
                left = f", {remaining // 3600}:{remaining // 60 % 60:02}:{remaining % 60:02} left"
            self._log(f"{self._input / 1e6:,.0f}{total} of input done: {speed}{left}")

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
