"""A worker: starts the runs of a search, several at a time, and records how each one ended.

Everything is in the trials' folders, so a worker that is killed loses nothing, and any number of workers may run at once.
"""

import ctypes
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
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
from launch.searching.trials import Record

MAX_FAILURES = 5
"""Starts in a row that may fail without a new checkpoint before a run is given up."""
_POLL_SECONDS = 0.2
_WAIT_SECONDS = 2.0
"""Time between two looks for work while only other workers have some."""
_REPORT_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None)  # loaded before any fork


class Slot:
    """A share of this machine's cores and GPUs, and the run that uses it."""

    def __init__(self, index: int, count: int):
        cores = sorted(os.sched_getaffinity(0))
        self._cores = cores[index::count] or [cores[index % len(cores)]]
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        self._devices = ",".join(visible[index * len(visible) // count : (index + 1) * len(visible) // count]) if count > 1 else None
        self.work: Work | None = None
        self._process: subprocess.Popen | None = None
        self._started, self._step_before = 0.0, 0

    def start(self, work: Work, command: Sequence[str]) -> None:
        """Start a run. It is asked to save and stop if this process ends."""
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
        environment |= {"CUDA_VISIBLE_DEVICES": self._devices} if self._devices else {}
        parent = os.getpid()

        def prepare() -> None:
            """Ask the kernel to send SIGTERM if the parent ends, and use the cores of this slot."""
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it ended before the line above
                os._exit(1)
            os.sched_setaffinity(0, self._cores)

        self._step_before, self._started = work.run.newest_step, time.monotonic()
        with open(work.run.output, "a") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare,
                start_new_session=True,  # Ctrl-C reaches only this process, which then asks the runs to stop
            )
        self.work = work

    def poll(self) -> int | None:
        """Return the exit status of the run; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self) -> int:
        """Return the exit status of the run when it has ended."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Ask the run to save and stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def release(self) -> tuple[Work, float, bool]:
        """Free the slot. Return its work, the seconds that the run took, and whether it has a new checkpoint."""
        work = self.work
        assert work is not None
        self.work = self._process = None
        return work, time.monotonic() - self._started, work.run.newest_step > self._step_before


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
        while not stop.signal_name:
            for slot in self._slots:
                if slot.work and (status := slot.poll()) is not None:
                    self._finish(slot, status)
            was_done = self._search.is_done()
            for slot in self._slots:
                if slot.work is None and (work := self._search.next_work()):
                    slot.start(work, self._command(self._search.prepare(work)))
            if all(slot.work is None for slot in self._slots):
                if was_done:
                    return
                time.sleep(_WAIT_SECONDS)
            self._check_objective()
            time.sleep(_POLL_SECONDS)

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
                shutil.rmtree(branch.folder / "checkpoints")  # only its score is needed
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
