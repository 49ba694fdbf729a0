"""What a person sees of a run: console lines, TensorBoard, metrics.jsonl. Rank 0 holds one; no other rank writes anything."""

import json
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from data.files import write_file
from data.sampling.batch_plan import BatchPlan

DEEPSPEED_NAMES = {  # what DeepSpeed's own monitor calls them, over samples; old dashboards expect these
    "loss/train": "Train/Samples/train_loss",
    "optimization/learning_rate": "Train/Samples/lr",
    "optimization/loss_scale": "Train/Samples/loss_scale",
}


class Monitor:
    """Console, log.txt, metrics.jsonl and TensorBoard of one run, from step `first_step` on.

    What an earlier process wrote for later steps than it saved is cut off, so a resumed run leaves the curves of a run that never
    stopped. A full disk silences the files, with one sentence, and not the training.
    """

    def __init__(self, folder: Path, first_step: int, plan: BatchPlan):
        self._plan = plan
        self._muted = False
        self._recent_seconds: deque[float] = deque(maxlen=50)
        self._log = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115
        _cut_off(folder / "metrics.jsonl", first_step)
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(folder / "tb", flush_secs=20, purge_step=first_step + 1)
        self._board_by_samples = SummaryWriter(folder / "tb" / "by_samples", flush_secs=20, purge_step=plan.position(first_step) + 1)
        self._bar = tqdm(
            total=plan.steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True
        )

    def say(self, line: str) -> None:
        """A line for the console and log.txt."""
        try:
            if self._bar.disable:
                print(line, flush=True)
            else:
                tqdm.write(line)
        except OSError:  # the terminal, or the launcher behind the pipe, is gone; the run goes on, or saves and stops
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        self._guard(lambda: self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n"))

    def step(self, step: int, scalars: dict[str, float], seconds: float) -> None:
        """Scalars of every step, and how long it took."""
        self._recent_seconds.append(seconds)
        self._bar.update(step - self._bar.n)
        self.scalars(step, scalars)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        def write() -> None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
                if name in DEEPSPEED_NAMES:
                    self._board_by_samples.add_scalar(DEEPSPEED_NAMES[name], value, self._plan.position(step))
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
            self._metrics.write(json.dumps({"step": step} | finite) + "\n")

        self._guard(write)

    def console(self, step: int, loss: float, learning_rate: float, gradient_norm: float, tokens_per_second: float, use: float) -> None:
        """The steady line."""
        left = median(self._recent_seconds) * (self._plan.steps - step)
        self.say(
            f"step: {step}/{self._plan.steps} | loss: {loss:.4f} | learning rate: {learning_rate:.2e} | "
            f"gradient norm: {gradient_norm:.3f} | tokens/s: {tokens_per_second:,.0f} | MFU: {100 * use:.1f} % | left: {_clock(left)}"
        )

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Text as it is, in TensorBoard."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._guard(lambda: self._board.add_text(name, indented, step))

    def hyperparameters(self, settings: dict, results: dict[str, float]) -> None:
        """For TensorBoard's HPARAMS page, into this run itself (SummaryWriter.add_hparams would make a run of its own)."""
        flat = {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()}

        def write() -> None:
            for summary in hparams(flat, results):
                self._board.file_writer.add_summary(summary)

        self._guard(write)

    def flush(self) -> None:
        self._guard(self._board.flush)
        self._guard(self._board_by_samples.flush)

    def close(self) -> None:
        self._bar.close()
        for file in (self._board, self._board_by_samples, self._log, self._metrics):
            self._guard(file.close)  # closing writes what is left

    def _guard(self, write) -> None:
        if self._muted:
            return
        try:
            write()
        except OSError as error:
            self._muted = True
            print(f"The run's curves and log cannot be written any more ({error.strerror or error}). Training goes on.", file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _cut_off(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to `last_step`; a torn last line goes too."""
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
