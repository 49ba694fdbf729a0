"""The training loop: an engine with a few verbs, samples by step number, a monitor on rank 0."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from data.sampling.batches import Batch
from launch.checkpoints import checkpoint
from launch.evaluation.score import Score, perplexity
from launch.ranks.stopping import StopRequest
from launch.training.engine import Engine, StepReport
from launch.training.monitor import Monitor
from launch.training.schedule import learning_rate
from launch.training.settings import RunSettings

SAVED_AND_UNFINISHED = 85
"""Exit status of a run that was told to stop: saved, start it again to go on."""
MOST_SKIPPED_IN_A_ROW = 50
"""Steps whose gradient was not finite before the run gives up (an fp16 loss scale needs about 16 to settle)."""


def train(
    settings: RunSettings,
    stop: StopRequest,
    engine: Engine,
    batches_of_step: Callable[[int], list[Batch]],
    validation_batches: Mapping[str, Callable[[], Iterable[Batch]]],
    sample: Callable[[int], str] | None,
    first_step: int,
    about: dict,
    monitor: Monitor | None,
    figures: "Figures",
) -> int:
    """Train from step `first_step` to the end of the recipe; the exit status: 0 done, 85 told to stop and saved.

    `validation_batches` are those of each source's held-out split, by its name; `sample` writes a text after a step, on all ranks
    together, where the model writes; `monitor` is rank 0's; `about` goes into every manifest.
    """
    root = Path(settings.output) / "checkpoints"
    saved_step = first_step if first_step else None
    skipped_in_a_row = 0

    def save(step: int) -> None:
        nonlocal saved_step
        start = time.perf_counter()
        complaint = engine.save(root, step, about)
        if complaint is None:
            saved_step = step
        if monitor:
            if complaint is None:
                seconds = time.perf_counter() - start
                monitor.scalars(step, {"time/save": seconds})
                monitor.say(f"step: {step} | checkpoint saved in {seconds:.1f} s")  # launch/slurm/pretrain.sbatch reads this as progress
                try:
                    checkpoint.retain(root, settings.checkpoint.keep)
                except OSError as error:
                    monitor.say(f"Old checkpoints cannot be deleted: {error}.")
            else:
                monitor.say(f"The checkpoint of step {step} could not be written: {complaint} The one before it stands; training goes on.")
                monitor.scalars(step, {"alarm/save_failed": 1.0})
            monitor.flush()  # what a checkpoint stands on is on the disk when it is

    for step in range(first_step, settings.batch_plan.steps):
        start = time.perf_counter()
        rate = _rate(settings, step)
        micro_batches = batches_of_step(step)
        data_seconds = time.perf_counter() - start
        report = engine.train_step(micro_batches, rate, step, stop_asked=stop.asked is not None)
        seconds = time.perf_counter() - start
        done = step + 1
        skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
        if monitor:
            _show_step(settings, monitor, figures, done, rate, report, seconds, data_seconds, engine)
        if skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"The gradient was not finite in {skipped_in_a_row} steps in a row; the last was step {done}.")
        last = done == settings.batch_plan.steps
        if validation_batches and (last or (settings.log.validation_interval and done % settings.log.validation_interval == 0)):
            _validate(engine, validation_batches, monitor, figures, done)
        if sample and settings.log.sample_interval and (last or done % settings.log.sample_interval == 0):
            text = sample(done)
            if monitor:
                monitor.text("samples", text, done)
        if last or report.stop_asked or (settings.checkpoint.interval and done % settings.checkpoint.interval == 0):
            save(done)
        if report.stop_asked and not last:
            if monitor:
                monitor.say(f"Stopped by {stop.asked or 'a signal to another rank'} after step {done}; " + _how_to_go_on(saved_step, done))
            return SAVED_AND_UNFINISHED if saved_step == done else 1
    return 0 if saved_step == settings.batch_plan.steps else 1


class Figures:
    """Numbers that turn counts into what people compare."""

    def __init__(
        self,
        flops_per_token: float,
        peak_flops: float,
        world_size: int,
        epochs: Callable[[int], dict[str, float]],
        train_bytes_per_token: float | None,
        validation_bytes_per_token: dict[str, float],
    ):
        self.flops_per_token = flops_per_token
        """Of a token as BatchPlan counts them."""
        self.peak_flops = peak_flops
        self.world_size = world_size
        self.epochs = epochs
        """Of each source, by name, after so many steps."""
        self.train_bytes_per_token = train_bytes_per_token
        """In the blend; None where no token is predicted from all those before it, and so the text is given no probability."""
        self.validation_bytes_per_token = validation_bytes_per_token
        """Of each source's held-out split, by name."""

    def flops_per_device(self, tokens_per_second: float) -> float:
        return tokens_per_second * self.flops_per_token / self.world_size


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """From mean nats per token."""
    return loss / math.log(2) / bytes_per_token


def _rate(settings: RunSettings, step: int) -> float:
    schedule = settings.schedule
    return learning_rate(
        step,
        settings.batch_plan.steps,
        settings.optimizer.learning_rate,
        schedule.kind,
        schedule.warmup_steps,
        schedule.min_learning_rate,
        schedule.decay_fraction,
    )


def _show_step(
    settings: RunSettings,
    monitor: Monitor,
    figures: Figures,
    done: int,
    rate: float,
    report: StepReport,
    seconds: float,
    data_seconds: float,
    engine: Engine,
) -> None:
    tokens_per_second = settings.batch_plan.tokens(done - 1) / seconds
    used = figures.flops_per_device(tokens_per_second)
    scalars = {
        "loss/train": report.loss,
        "optimization/learning_rate": rate,
        "optimization/gradient_norm": report.gradient_norm,
        "progress/tokens": settings.batch_plan.tokens_before(done),
        **_by_source("progress/epochs", figures.epochs(done)),
    }
    if report.loss_scale is not None:
        scalars["optimization/loss_scale"] = report.loss_scale
    if report.skipped:
        scalars["alarm/skipped_step"] = 1.0
        monitor.say(f"Step {done} was skipped: its gradient was not finite. No weight was changed.")
    at_interval = done % settings.log.interval == 0 or done == settings.batch_plan.steps
    if at_interval:
        scalars |= {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tflops_per_device": used / 1e12,
            "throughput/utilization": used / figures.peak_flops,
            "memory/peak_gib": engine.memory_bytes() / 2**30,
            "memory/free_disk_gib": shutil.disk_usage(settings.output).free / 2**30,
            "time/step": seconds,
            "time/data": data_seconds,
        } | {f"time/{part}": part_seconds for part, part_seconds in report.seconds.items()}
        more = settings.model.num_classes, settings.loss.label_smoothing, settings.loss.z_loss, settings.distillation.teacher
        if not any(more):  # else it is more than nats a token
            scalars["perplexity/train"] = perplexity(report.loss)
            if figures.train_bytes_per_token is not None:
                scalars["bits_per_byte/train"] = bits_per_byte(report.loss, figures.train_bytes_per_token)
    monitor.step(done, scalars, seconds)
    if at_interval:
        monitor.console(done, report.loss, rate, report.gradient_norm, tokens_per_second, used / figures.peak_flops)


def _by_source(name: str, values: dict[str, float]) -> dict[str, float]:
    """Scalars of a value of each source; of a single one the plain name is enough."""
    return {name if len(values) == 1 else f"{name}/{source}": value for source, value in values.items()}


def _validate(
    engine: Engine,
    batches_of_source: Mapping[str, Callable[[], Iterable[Batch]]],
    monitor: Monitor | None,
    figures: Figures,
    step: int,
) -> None:
    """Each source on its own, and all of them together, weighted by token and by class."""
    start = time.perf_counter()
    scores = {source: engine.validate(batches()) for source, batches in batches_of_source.items()}
    if not monitor:
        return
    score = sum(scores.values(), Score())
    losses = {source: one.loss for source, one in scores.items()}
    scalars, shown = {"loss/validation": score.loss, "time/validation": time.perf_counter() - start}, [f"validation loss: {score.loss:.4f}"]
    if score.tokens:
        nats = score.token_loss / score.tokens
        scalars["perplexity/validation"] = perplexity(nats)
        shown.append(f"perplexity: {perplexity(nats):.2f}")
        if figures.train_bytes_per_token is not None:
            num_bytes = sum(one.tokens * figures.validation_bytes_per_token[source] for source, one in scores.items())
            scalars["bits_per_byte/validation"] = bits = bits_per_byte(nats, num_bytes / score.tokens)
            shown.append(f"bits per byte: {bits:.4f}")
    if score.accuracy is not None:
        scalars["accuracy/validation"] = score.accuracy
        shown.append(f"accuracy: {score.accuracy:.2%}")
    counts = [f"{count:,} {what}" for count, what in ((score.tokens, "tokens"), (score.classes, "samples with a class")) if count]
    shown.append(f"over {' and '.join(counts)}")
    monitor.scalars(step, scalars | _by_source("loss/validation", losses))
    monitor.say(f"step: {step} | " + " | ".join(shown + [f"{source}: {loss:.4f}" for source, loss in losses.items() if len(losses) > 1]))
    monitor.flush()


def _how_to_go_on(saved_step: int | None, done: int) -> str:
    if saved_step == done:
        return "saved. The same command goes on from here."
    return f"the newest checkpoint is of step {saved_step}." if saved_step else "there is no checkpoint."
