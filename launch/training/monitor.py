"""Console lines, log.txt, metrics.jsonl and TensorBoard of a run. Only rank 0 has a monitor; no other rank writes any of them."""

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from data.files import write_file
from data.sampling.batch_plan import BatchPlan

DEEPSPEED_TAGS = {  # names in DeepSpeed's own monitor, over samples; existing dashboards expect them
    "loss/train": "Train/Samples/train_loss",
    "optimization/learning_rate": "Train/Samples/lr",
    "optimization/loss_scale": "Train/Samples/loss_scale",
}


class Monitor:
    """Writer of a run's console lines, log and curves, from step `first_step` on.

    Entries of an earlier process for steps after `first_step` are removed, so that a resumed run has the curves of a run that never
    stopped. If a file cannot be written, for example because the disk is full, the monitor prints one message and writes no more
    files; training continues.
    """

    def __init__(self, folder: Path, first_step: int, plan: BatchPlan):
        self._plan = plan
        self._files_failed = False
        self._recent_seconds: deque[float] = deque(maxlen=50)  # for each sample
        self._log_file = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115
        _remove_later_entries(folder / "metrics.jsonl", first_step)
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        self._usual_thread_hook = threading.excepthook
        threading.excepthook = self._report_error_of_thread
        self._board = SummaryWriter(folder / "tb", flush_secs=20, purge_step=first_step + 1)
        self._board_by_samples = SummaryWriter(folder / "tb" / "by_samples", flush_secs=20, purge_step=plan.position(first_step) + 1)
        self._bar = tqdm(
            total=plan.steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True
        )

    def log(self, line: str) -> None:
        """Print a line on the console and write it to log.txt with the time."""
        try:
            if self._bar.disable:
                print(line, flush=True)
            else:
                tqdm.write(line)
        except OSError:  # the terminal, or the launcher that reads the pipe, has ended; the run continues, or saves and stops
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        self.record(line)

    def record(self, line: str) -> None:
        """Write a line to log.txt with the time."""
        self._guard(lambda: self._log_file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n"))

    def step(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        """Write the scalars of a training step and note that it took `seconds`."""
        self._recent_seconds.append(seconds / self._plan.size(step - 1))
        self._bar.update(step - self._bar.n)
        self.scalars(step, scalars)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars by tag to TensorBoard and metrics.jsonl."""
        self._guard(lambda: self._write_scalars(step, scalars))

    def _write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
            if name in DEEPSPEED_TAGS:
                self._board_by_samples.add_scalar(DEEPSPEED_TAGS[name], value, self._plan.position(step))
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
        self._metrics.write(json.dumps({"step": step} | finite) + "\n")

    def console(
        self, step: int, loss: float, learning_rate: float, gradient_norm: float, tokens_per_second: float, use: float | None
    ) -> None:
        """Log the line that appears every log.interval steps. `use` is the share of the peak FLOP/s (MFU), 0 to 1; None if unknown."""
        left = median(self._recent_seconds) * (self._plan.position(self._plan.steps) - self._plan.position(step))
        mfu = "" if use is None else f" | MFU: {100 * use:.1f} %"
        self.log(
            f"step: {step}/{self._plan.steps} | loss: {loss:.4f} | learning rate: {learning_rate:.2e} | "
            f"gradient norm: {gradient_norm:.3f} | tokens/s: {tokens_per_second:,.0f}{mfu} | left: {_clock(left)}"
        )

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Write a text to TensorBoard without changing its line breaks."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._guard(lambda: self._board.add_text(name, indented, step))

    def hyperparameters(self, settings: dict, results: dict[str, float]) -> None:
        """Write settings and results to TensorBoard's HPARAMS page, in this run (SummaryWriter.add_hparams would add another run)."""
        flat = {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()}
        self._guard(lambda: [self._board._get_file_writer().add_summary(summary) for summary in hparams(flat, results)])

    def flush(self) -> None:
        """Write buffered curves to the disk."""
        self._guard(self._board.flush)
        self._guard(self._board_by_samples.flush)

    def close(self) -> None:
        """Write everything that is buffered and close the files."""
        self._bar.close()
        for file in (self._board, self._board_by_samples, self._log_file, self._metrics):
            self._guard(file.close)  # closing writes what is still buffered
        if not self._files_failed:  # else a writer's thread may still be about to fail
            threading.excepthook = self._usual_thread_hook

    def _report_error_of_thread(self, error: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread as usual, except for an error of TensorBoard's writers, which the next write raises again."""
        if not (isinstance(error.thread, _AsyncWriterThread) and isinstance(error.exc_value, OSError)):
            self._usual_thread_hook(error)

    def _guard(self, write: Callable[[], object]) -> None:
        """Write, unless a write has failed before."""
        if self._files_failed:
            return
        try:
            write()
        except OSError as error:
            self._files_failed = True
            print(f"The run's curves and log can no longer be written ({error.strerror or error}). Training continues.", file=sys.stderr)


def _clock(seconds: float) -> str:
    """Format seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _remove_later_entries(path: Path, last_step: int) -> None:
    """Remove from metrics.jsonl the lines of steps after `last_step`, and lines that are incomplete."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_file(path, "".join(kept))
