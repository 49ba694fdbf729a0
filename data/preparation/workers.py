"""Processes that do units and write shards, and what a person sees of it meanwhile."""

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

from data.preparation.work_units import Task, UnitWorker
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_LOOKS = 0.2


class WorkerLost(RuntimeError):
    """Nobody's mistake that this process could see."""


class Workers:
    """Calls of functions that get a UnitWorker first; in this process where there is one worker, else in several of their own."""

    def __init__(self, task: Task, count: int, tokenizer: Tokenizer) -> None:
        """`tokenizer` is the task's, with one thread, as this process has it already."""
        self.count = count
        self._pool = None
        if count == 1:
            self._done = [0, 0]
            self._worker = UnitWorker(task, tokenizer if task.threads == 1 else _tokenizer_of(task), self._tell)
            return
        # Spawned, not forked: whoever calls may have PyTorch's threads running, which a forked process would wait for in vain.
        context = get_context("spawn")
        self._done = context.Array("q", 2)
        self._pool = ProcessPoolExecutor(count, context, _begin, (task, self._done))

    def _tell(self, num_bytes: int, documents: int) -> None:
        self._done[0] += num_bytes
        self._done[1] += documents

    @property
    def done(self) -> tuple[int, int]:
        """Bytes of text and documents so far, over all workers."""
        return self._done[0], self._done[1]

    def call(self, function: Callable[..., Any], calls: Iterable[tuple], look: Callable[[], object]) -> Iterator[tuple[tuple, Any]]:
        """(arguments, result) of function(worker, *arguments), as they are done; `calls` is drawn from a little ahead of the work.

        `look` is called now and then while nothing is done.
        """
        if self._pool is None:
            for arguments in calls:
                yield arguments, function(self._worker, *arguments)
                look()
            return
        waiting: dict[Future, tuple] = {}
        calls = iter(calls)
        try:
            while True:
                while len(waiting) < 2 * self.count and (arguments := next(calls, None)) is not None:
                    waiting[self._pool.submit(_call, function, arguments)] = arguments
                if not waiting:
                    return
                done, _ = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in sorted(done, key=list(waiting).index):
                    yield waiting.pop(future), future.result()
                look()
        except BrokenProcessPool as error:
            raise WorkerLost("A worker process was ended from outside; the system's log says whether memory ran out.") from error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # what they have in hand is not wanted any more
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


_worker: UnitWorker | None = None  # of a worker process


def _begin(task: Task, done: SynchronizedArray) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says what is to be said
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(num_bytes: int, documents: int) -> None:
        with done.get_lock():
            done[0] += num_bytes
            done[1] += documents

    _worker = UnitWorker(task, _tokenizer_of(task), tell)


def _tokenizer_of(task: Task) -> Tokenizer:
    return load_tokenizer(task.tokenizer, fast=task.fast, threads=task.threads)


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _call(function: Callable[..., Any], arguments: tuple) -> Any:
    return function(_worker, *arguments)


def count_off(done: Iterable, total: int, what: str, say: Callable[[str], object]) -> None:
    """Draw all of `done`, telling how many of so many there were: a bar on a terminal, a line every few seconds elsewhere."""
    said = time.monotonic()
    with tqdm.tqdm(total=total, desc="Writing", unit=f" {what}", disable=None) as bar:
        for number, _ in enumerate(done, start=1):
            bar.update()
            if bar.disable and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                say(f"{number:,} of {total:,} {what} written")


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere: input done and to do, documents and megabytes a second, time left.

    Of a compressed file the input that is done is as much as was read of it by whoever has come farthest.
    """

    def __init__(self, workers: Workers, num_bytes: int | None, say: Callable[[str], object]) -> None:
        """`num_bytes` of input there are, where that is known."""
        self._workers, self._say = workers, say
        self._total, self._input, self._before = num_bytes, 0, 0
        self._done: dict[object, int] = {}
        self._begun = self._said = time.monotonic()
        self._bar = tqdm.tqdm(total=num_bytes, desc="Preparing", unit="B", unit_scale=True, disable=None, smoothing=0.05)

    def add(self, what: object, num_bytes: int, now: bool) -> None:
        """So many bytes of a thing are done, all that were before among them: now, or by an earlier start."""
        more = max(0, num_bytes - self._done.get(what, 0))
        self._done[what] = self._done.get(what, 0) + more
        self._input += more
        self._before += 0 if now else more
        self._bar.update(more)

    def look(self) -> None:
        now = time.monotonic()
        text_bytes, documents = self._workers.done
        seconds = max(1e-3, now - self._begun)
        speed = f"{documents:,} documents, {documents / seconds:,.0f} documents/s, {text_bytes / seconds / 1e6:.1f} MB/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(0)
        elif now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            part = f" of {self._total / 1e6:,.0f} MB" if self._total else " MB"
            left = ""
            if self._total and self._input > self._before:
                remaining = round(seconds * (self._total - self._input) / (self._input - self._before))
                left = f", {remaining // 3600}:{remaining // 60 % 60:02}:{remaining % 60:02} left"
            self._say(f"{self._input / 1e6:,.0f}{part} of input done: {speed}{left}")

    def close(self) -> None:
        self._bar.close()
