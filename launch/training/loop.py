"""The training loop: an engine with a few methods, a batch plan, and a monitor on rank 0."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from data.command_line import RankError, UserError, describe
from data.files import nearest_existing
from data.sampling.batch_plan import BatchPlan
from data.sampling.batches import Batch
from launch.checkpoints import checkpoint
from launch.evaluation.score import Score, bits_per_byte, perplexity
from launch.ranks.collectives import RanksMissing
from launch.ranks.stopping import SAVED_AND_UNFINISHED, StopRequest
from launch.training.disk_watch import DiskWatch
from launch.training.engine import Engine, StepReport
from launch.training.monitor import Monitor
from launch.training.noise_scale import NoiseScale
from launch.training.schedule import learning_rate
from launch.training.settings import RunSettings

MAX_SKIPPED_IN_A_ROW = 50
"""Steps in a row whose gradient was not finite before the run stops (an fp16 loss scale needs about 16 to settle)."""
_ADVICE_AFTER = (0.05, 0.25, 1.0)
"""Shares of the run after which the log has a line about the noise scale."""

_METRIC_FORMATS = {"perplexity": ".2f", "accuracy": ".2%"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Constants of a run that turn counts into the numbers that people compare."""

    flops_per_token: float
    """FLOPs for each token that BatchPlan counts, forward and backward."""
    peak_flops: float | None
    """FLOP/s that one device can reach at most; None if that is not known."""
    world_size: int
    epochs: Callable[[int], dict[str, float]]
    """Epochs of each source, by its name, after a number of steps."""
    train_bytes_per_token: float | None
    """UTF-8 bytes per training token of the blend; None if the objective does not predict every token from all tokens before it, so that
    the text has no probability."""
    validation_bytes_per_token: dict[str, float]
    """UTF-8 bytes per token of the validation split of each source, by its name."""

    def flops_per_device(self, tokens_per_second: float) -> float:
        """Return the FLOP/s that one device does at `tokens_per_second` of all ranks."""
        return tokens_per_second * self.flops_per_token / self.world_size


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs on one rank. `train` changes only what the engine, the monitor, `noise` and `stop` hold."""

    settings: RunSettings
    plan: BatchPlan
    """The samples that each step reads."""
    engine: Engine
    micro_batches: Callable[[int], list[Batch]]
    """This rank's micro-batches of a step, counted from 0."""
    validation_batches: Mapping[str, Callable[[], Iterable[Batch]]]
    """This rank's validation batches of each source, by its name; empty if no source has a validation split."""
    sample_text: Callable[[int], str] | None
    """Generates a text after a number of steps, called by all ranks together; None for a model that cannot generate."""
    first_step: int
    """Step to begin with: 0, or the step of the checkpoint that was loaded."""
    manifest: dict
    """Facts about the run that every checkpoint's manifest holds."""
    figures: Figures
    monitor: Monitor | None
    """Log and curves, on rank 0; None on every other rank."""
    disk: DiskWatch
    stop: StopRequest
    noise: NoiseScale | None = None
    """Noise scale so far, on rank 0 of a run with log.noise_scale."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.settings.output) / "checkpoints"


def train(run: Run) -> int:
    """Train from `run.first_step` to the end of the plan, or to its pause. Returns the exit status: 0 done, 85 stopped and saved, 1 not
    saved.

    Raises FloatingPointError if the gradient was not finite in too many steps in a row, or if a validation loss, or a value that a
    checkpoint would hold, is not finite.
    """
    log, monitor, steps, pause = run.settings.log, run.monitor, run.plan.steps, run.settings.pause_step(run.plan)
    saved_step = run.first_step or None
    if saved_step and pause <= saved_step < steps:
        if monitor:
            given = describe(run.settings, "pause_tokens")
            monitor.log(f"Nothing to train: the run has read {given} in {saved_step} steps. Give a larger value, or none.")
        return SAVED_AND_UNFINISHED
    skipped_in_a_row = 0
    for step in range(run.first_step, steps):
        done, last, pauses = step + 1, step + 1 == steps, step + 1 == pause
        report = _train_step(run, step)
        skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
        if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"The gradient was not finite in {skipped_in_a_row} steps in a row; the last was step {done}. "
                + checkpoint.describe_newest(run.checkpoints)
            )
        if run.validation_batches and (last or pauses or _is_due(done, log.validation_interval)):
            _validate(run, done)
        if run.sample_text and log.sample_interval and (last or _is_due(done, log.sample_interval)):
            text = run.sample_text(done)
            if monitor:
                monitor.text("samples", text, done)
        lost_folder = None
        if last or pauses or report.stop_asked or _is_due(done, run.settings.checkpoint.interval):
            lost_folder = _check_disk(run, done)
            saved_step = done if _save(run, done) else saved_step
        if lost_folder and monitor:
            monitor.log(f"{lost_folder}; {_how_to_resume(saved_step, done)}")
        if lost_folder and not last:
            return SAVED_AND_UNFINISHED if saved_step == done else 1
        if (report.stop_asked or pauses) and not last:
            if monitor:
                by = describe(run.settings, "pause_tokens") if pauses else run.stop.signal_name or "a signal to another rank"
                monitor.log(f"Stopped by {by} after step {done}; {_how_to_resume(saved_step, done)}")
            return SAVED_AND_UNFINISHED if saved_step == done else 1
    return 0 if saved_step == steps else 1


def _is_due(done: int, interval: int) -> bool:
    """True if an interval of steps ends after `done` steps; an interval of 0 never ends."""
    return interval > 0 and done % interval == 0


def _is_logged(run: Run, done: int) -> bool:
    """True if there is a console line after `done` steps."""
    return _is_due(done, run.settings.log.interval) or done == run.plan.steps


def _train_step(run: Run, step: int) -> StepReport:
    """Take one optimizer step and report it to the monitor."""
    start = time.perf_counter()
    rate, size = rate_of_step(run.settings, run.plan, step), run.plan.size(step)
    batch, beta2 = run.settings.batch, run.settings.batch.beta2(size, run.settings.optimizer.beta2)
    if run.monitor and batch.ramp and step and size != run.plan.size(step - 1):
        run.monitor.log(f"From step {step + 1} on a step reads {size} samples in place of {run.plan.size(step - 1)}.")
    with _reading(run):
        micro_batches = run.micro_batches(step)
    data_seconds = time.perf_counter() - start
    stop_asked = run.stop.signal_name is not None
    report = run.engine.train_step(micro_batches, rate, step, stop_asked, with_scalars=_is_logged(run, step + 1), beta2=beta2)
    seconds = time.perf_counter() - start
    if run.monitor:
        _report_step(run, run.monitor, step + 1, rate, report, seconds, data_seconds)
    return report


@contextlib.contextmanager
def _reading(run: Run) -> Iterator[None]:
    """Name the rank and the newest checkpoint in the error of a file of the data, which only this rank may see.

    Raises RankError for a file that has other contents, and RanksMissing if the disk failed: then the next start may succeed.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise RanksMissing(f"{run.engine.process}: {error}") from error
        raise RankError(f"{run.engine.process}: {error} {checkpoint.describe_newest(run.checkpoints)}") from error


def rate_of_step(settings: RunSettings, plan: BatchPlan, step: int) -> float:
    """Return the learning rate of a step of `plan`, a plan of this run.

    The whole schedule is multiplied by the rate factor of the batch, its minimum too, but not above `schedule.min_learning_rate`: this is
    where every run ends.
    """
    schedule, factor = settings.schedule, settings.batch.rate_factor(plan.size(step))
    peak, minimum = settings.optimizer.learning_rate * factor, schedule.min_learning_rate * min(factor, 1.0)
    return learning_rate(step, plan, peak, schedule.kind, settings.warmup_steps_in(plan), minimum, schedule.decay_fraction)


def _check_disk(run: Run, step: int) -> str | None:
    """Check the files on which the run relies. Return a message, on every rank, if its folder was removed and recorded again.

    Raises UserError on every rank if the data has changed.
    """
    ranks = run.engine.ranks
    if change := ranks.first_error_of_any_rank(run.disk.find_change()):
        raise UserError(f"{change} The checkpoint of step {step} was not written.")
    message = None
    with contextlib.suppress(OSError):  # a disk that cannot be written is reported when the checkpoint is
        message = run.disk.restore_folder()
    return ranks.broadcast(message)


def _save(run: Run, step: int) -> bool:
    """Write the checkpoint of `step` and delete old ones. Returns False, and lets the run continue, if the write failed."""
    start = time.perf_counter()
    about = run.manifest | ({"noise_scale": run.noise.record()} if run.noise else {})
    failure = run.engine.save(run.checkpoints, step, about)
    monitor = run.monitor
    if monitor is None:
        return failure is None
    if failure is None:
        seconds = time.perf_counter() - start
        monitor.scalars(step, {"time/save": seconds})
        monitor.log(f"step: {step} | checkpoint saved in {seconds:.1f} s")  # launch/slurm/pretrain.sbatch reads this as progress
        try:
            checkpoint.retain(run.checkpoints, run.settings.checkpoint.keep)
        except OSError as error:
            monitor.log(f"Old checkpoints cannot be deleted: {error}.")
    else:
        monitor.log(
            f"The checkpoint of step {step} could not be written: {failure} The checkpoint before it is still there; training continues."
        )
        monitor.scalars(step, {"alarm/save_failed": 1.0})
    monitor.flush()  # the curves up to a checkpoint are on the disk when the checkpoint is
    return failure is None


def _report_step(run: Run, monitor: Monitor, done: int, rate: float, report: StepReport, seconds: float, data_seconds: float) -> None:
    """Write the scalars of a step, and at each interval of log.interval its console line. `done` counts this step too."""
    figures = run.figures
    tokens_per_second = run.plan.tokens(done - 1) / seconds
    flops = figures.flops_per_device(tokens_per_second)
    use = None if figures.peak_flops is None else flops / figures.peak_flops
    scalars = {
        "loss/train": report.loss,
        "optimization/learning_rate": rate,
        "optimization/gradient_norm": report.gradient_norm,
        "progress/tokens": run.plan.tokens_before(done),
        **_by_source("progress/epochs", figures.epochs(done)),
        **report.scalars,
    }
    if run.settings.batch.ramp:
        scalars["optimization/batch_size"] = run.plan.size(done - 1)
    if report.loss_scale is not None:
        scalars["optimization/loss_scale"] = report.loss_scale
    if report.skipped:
        scalars["alarm/skipped_step"] = 1.0
        monitor.log(f"Step {done} was skipped because its gradient was not finite. No weight was changed.")
    at_interval = _is_logged(run, done)
    if run.noise and report.squares:
        run.noise.add(report.squares)
        if at_interval:
            scalars |= run.noise.scalars(run.plan.sequence_length, run.plan.tokens(done - 1))
    if at_interval:
        scalars |= {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tflops_per_device": flops / 1e12,
            "memory/peak_gib": run.engine.memory_bytes() / 2**30,
            "memory/free_disk_gib": shutil.disk_usage(nearest_existing(Path(run.settings.output))).free / 2**30,
            "time/step": seconds,
            "time/data": data_seconds,
        } | {f"time/{part}": part_seconds for part, part_seconds in report.seconds.items()}
        if use is not None:
            scalars["throughput/utilization"] = use
        if _loss_is_nats_per_token(run):
            scalars["perplexity/train"] = perplexity(report.loss)
            if figures.train_bytes_per_token is not None:
                scalars["bits_per_byte/train"] = bits_per_byte(report.loss, figures.train_bytes_per_token)
    monitor.step(done, scalars, seconds)
    if at_interval:
        monitor.console(done, report.loss, rate, report.gradient_norm, tokens_per_second, use)
    if run.noise and any(_passes(run.plan, done, share) for share in _ADVICE_AFTER):
        monitor.log(run.noise.advice(run.plan.sequence_length, run.plan.tokens(done - 1)))


def _passes(plan: BatchPlan, done: int, share: float) -> bool:
    """True if a run has read `share` of its samples after `done` steps, and had not one step earlier."""
    return plan.position(done - 1) < share * plan.position(plan.steps) <= plan.position(done)


def _loss_is_nats_per_token(run: Run) -> bool:
    """True if the training loss is the cross-entropy of tokens and nothing else is added to it."""
    settings = run.settings
    is_changed = settings.loss.label_smoothing or settings.loss.z_loss or settings.distillation.teacher
    return run.engine.task.loss_is_per_token(settings.data) and not is_changed


def _by_source(name: str, values: dict[str, float]) -> dict[str, float]:
    """Return scalars named `name/source`; if there is one source, `name` alone."""
    return {name if len(values) == 1 else f"{name}/{source}": value for source, value in values.items()}


def _validate(run: Run, step: int) -> None:
    """Measure the validation loss of each source, and of all together, weighted by token and by class.

    Raises FloatingPointError if a loss is not finite.
    """
    start = time.perf_counter()
    with _reading(run):
        scores = {source: run.engine.validate(batches()) for source, batches in run.validation_batches.items()}
    total = sum(scores.values(), Score())
    losses = {source: score.loss for source, score in scores.items()}
    if wrong := [source for source, score in scores.items() if not math.isfinite(score.token_loss + score.class_loss)]:
        raise FloatingPointError(
            f"The validation loss of {wrong[0]} is {losses[wrong[0]]} after step {step}; no checkpoint of this step was written. "
            + checkpoint.describe_newest(run.checkpoints)
        )
    monitor, figures = run.monitor, run.figures
    if not monitor:
        return
    scalars = {"loss/validation": total.loss, "time/validation": time.perf_counter() - start}
    shown = [f"validation loss: {total.loss:.4f}"]
    num_bytes = None
    if figures.train_bytes_per_token is not None:
        num_bytes = sum(score.tokens * figures.validation_bytes_per_token[source] for source, score in scores.items())
    for name, value in run.engine.task.metrics(total, num_bytes).items():
        scalars[f"{name}/validation"] = value
        shown.append(f"{name.replace('_', ' ')}: {value:{_METRIC_FORMATS.get(name, '.4f')}}")
    counts = [f"{count:,} {what}" for count, what in ((total.tokens, "tokens"), (total.classes, "samples with a class")) if count]
    shown.append(f"over {' and '.join(counts)}")
    monitor.scalars(step, scalars | _by_source("loss/validation", losses))
    monitor.log(f"step: {step} | " + " | ".join(shown + [f"{source}: {loss:.4f}" for source, loss in losses.items() if len(losses) > 1]))
    monitor.flush()


def _how_to_resume(saved_step: int | None, done: int) -> str:
    if saved_step == done:
        return "a checkpoint was saved. The same command resumes from it."
    return f"the newest checkpoint is of step {saved_step}." if saved_step else "there is no checkpoint."
