"""A worker: starts the runs of a search, several at a time, and records how each one ended.

Everything is in the trials' folders, so a worker that is killed loses nothing, and any number of workers may run at once.
"""

import dataclasses
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.command_line import INTERRUPTED, UserError
from launch import REPOSITORY
from launch.ranks.launchers import free_port
from launch.ranks.stopping import NOT_TO_BE_REQUEUED, SAVED_AND_UNFINISHED, StopRequest
from launch.searching.progress import Progress
from launch.searching.report import write_hparams, write_report
from launch.searching.search import Search, Work
from launch.searching.settings import SearchSettings
from launch.searching.slots import Slot
from launch.searching.trials import Record

MAX_FAILURES = 5
"""Starts in a row that may fail without a new checkpoint before a run is given up."""
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
"""Time between two looks into all folders: for work while there is none, and for the first validation of a run."""
_REPORT_SECONDS = 60.0


def run_search(settings: SearchSettings) -> int:
    """Work on a search until it is done. Return the exit status: 0, 1 if a run failed, 85 or 130 if a signal stopped it.

    Raises UserError for invalid settings, and if the runs do not write the objective.
    """
    stop = StopRequest()
    search = Search(settings)
    slots = [Slot(index, settings.workers) for index in range(settings.workers)]
    worker = _Worker(search, slots)
    try:
        worker.work(stop)
    finally:
        worker.stop_all()
    report = write_report(search)
    write_hparams(search)
    if stop.signal_name:
        print(f"{INTERRUPTED if stop.signal_name == 'SIGINT' else 'Stopped.'} The same command continues the search. Report: {report}")
        return 128 + signal.SIGINT if stop.signal_name == "SIGINT" else SAVED_AND_UNFINISHED
    print(f"Done. Report: {report}")
    return int(any(run.record.state == "failed" for trial in search.trials for run in trial.runs))


class _Worker:
    """The loop over the slots of this process."""

    def __init__(self, search: Search, slots: Sequence[Slot]):
        self._search, self._slots = search, slots
        self._progress = Progress(search)
        self._objective_seen = False
        self._reported = time.monotonic()

    def work(self, stop: StopRequest) -> None:
        """Start runs and record their ends until nothing is left, or until a signal."""
        print(f"{self._progress.line(0)} | {self._search.folder}", flush=True)
        next_look = 0.0
        while not stop.signal_name:
            for slot in self._slots:
                if slot.work and (status := slot.poll()) is not None:
                    self._finish(slot, status)
                    next_look = 0.0
            if time.monotonic() >= next_look:
                if self._start_runs():
                    return
                self._check_objective()
                next_look = time.monotonic() + _LOOK_SECONDS
            time.sleep(_POLL_SECONDS)

    def _start_runs(self) -> bool:
        """Start a run in each free slot, as long as there is work. Return True if the search is done."""
        free = [slot for slot in self._slots if slot.work is None]
        was_done = len(free) == len(self._slots) and self._search.is_done()
        for slot in free:
            if work := self._search.next_work():
                slot.start(work, self._command(self._search.prepare(work)))
        return was_done and all(slot.work is None for slot in self._slots)

    def stop_all(self) -> None:
        """Ask all runs to save and stop, and record how they end."""
        for slot in self._slots:
            slot.stop()
        for slot in self._slots:
            if slot.work:
                self._finish(slot, slot.wait(), is_stopping=True)

    def _command(self, words: Sequence[str]) -> list[str]:
        launcher = shlex.split(self._search.settings.launcher.replace("{port}", str(free_port()))) or [sys.executable]
        return [*launcher, str(REPOSITORY / "launch" / "pretrain.py"), *words]

    def _finish(self, slot: Slot, status: int, is_stopping: bool = False) -> None:
        """Record how the run of a slot ended, free the slot and print a line.

        Raises UserError if the run was refused and no run of the search has ever trained. Its record stays as it was.
        """
        work, seconds, has_new_checkpoint = slot.release()
        before = dataclasses.replace(work.record, seconds=work.record.seconds + seconds)
        after = self._record_after(work, before, status, may_fail=not (is_stopping or has_new_checkpoint))
        if status == 2 and not any(run.last_metrics() for trial in self._search.trials for run in trial.runs):
            work.lock.close()
            if is_stopping:
                return
            advice = "The first run of the search was refused. Correct its settings; the same command then continues."
            raise UserError(f"{after.reason}\n{advice}")
        work.run.write(after)
        if len(after.metrics) > len(before.metrics):  # only the score of a branch is needed
            shutil.rmtree(work.run.branch(before.target).folder / "checkpoints", ignore_errors=True)
        work.lock.close()
        if after.state == "failed":
            last = after.reason.splitlines()[-1:] or ["no output"]
            print(f"Trial {work.run.trial.number} failed: {last[0]} Its output: {work.run.output}", flush=True)
        running = sum(one.work is not None for one in self._slots)
        print(self._progress.line(running), flush=True)
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            write_report(self._search)
            self._reported = time.monotonic()

    def _record_after(self, work: Work, record: Record, status: int, may_fail: bool) -> Record:
        """Return the record of a run whose start has ended with `status`. `may_fail`: it failed unless it reached its rung or end."""
        target, rungs = record.target, self._search.rungs
        if self._search.decays_now(work):  # either the run has just paused, or its branch has ended
            branch = work.run.branch(target)
            if status == 0 and branch.folder.exists():
                return dataclasses.replace(record, metrics=(*record.metrics, branch.last_metrics()), failures=0)
            if status == SAVED_AND_UNFINISHED:
                return dataclasses.replace(record, failures=0)
        elif status == 0:
            reached = (*record.metrics, *[work.run.last_metrics()] * (len(rungs) - len(record.metrics)))
            return dataclasses.replace(record, state="finished", metrics=reached, failures=0)
        elif status == SAVED_AND_UNFINISHED and work.run.has_saved(rungs[target]):
            return dataclasses.replace(record, metrics=(*record.metrics, work.run.last_metrics()), failures=0)
        reason = _last_lines(work.run.output)
        if status == NOT_TO_BE_REQUEUED:
            return dataclasses.replace(record, state="diverged", reason=reason)
        failures = record.failures + 1 if may_fail else 0
        if status == 2 or failures >= MAX_FAILURES:
            return dataclasses.replace(record, state="failed", failures=failures, reason=reason)
        return dataclasses.replace(record, failures=failures)

    def _check_objective(self) -> None:
        """Raise UserError as soon as a run has validated and has not written the objective."""
        for slot in self._slots if not self._objective_seen else ():
            if slot.work and "time/validation" in (metrics := slot.work.run.last_metrics()):
                self._search.score(metrics)
                self._objective_seen = True


def _last_lines(path: Path) -> str:
    """Return the end of what a run has printed, at most three lines."""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 2000, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-3:])
