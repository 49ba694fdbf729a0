"""Assembly of a training run on one rank: ready ranks in, a Run with its engine, batches and monitor out, and its exit status."""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.command_line import UserError, flatten
from data.sampling.batch_plan import BatchPlan
from data.sampling.batches import Batch, TrainingBatches, held_out_batches
from data.sampling.samples import Samples
from data.shards import bytes_per_token
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints import checkpoint, run_record
from launch.checkpoints.initial import InitialWeights
from launch.evaluation.tasks.task import TextRequest
from launch.ranks.collectives import describe_lost_ranks
from launch.ranks.layout import describe_layout
from launch.ranks.stopping import NOT_TO_BE_REQUEUED, StopRequest
from launch.training import run_folder
from launch.training.data import RunData
from launch.training.disk_watch import DiskWatch
from launch.training.engine import Engine
from launch.training.estimates import flops_per_counted_token
from launch.training.gradient_squares import leaves_out_tied
from launch.training.loop import Figures, Run, train
from launch.training.monitor import Monitor
from launch.training.noise_scale import NoiseScale
from launch.training.peak import peak_flops
from launch.training.pipeline import engine_for
from launch.training.plan import plan
from launch.training.planning.micro_batch import device_bytes
from launch.training.settings import RunSettings, share_the_batch
from launch.training.setup import Ready, get_ready
from model.transformer import layers


def pretrain(settings: RunSettings, arguments: Sequence[str], stop: StopRequest) -> int:
    """Prepare this rank, print the plan and train. Returns the exit status; raises UserError for a user's mistake.

    `arguments` is the command line, by which ranks recognise the other ranks of their run.
    """
    try:
        ready = get_ready(settings, arguments)
        if ready.process.is_first:
            print(_plan(ready), flush=True)
        return 0 if settings.dry_run else _train(ready, stop)
    except FloatingPointError as error:  # the next start would fail in the same way
        print(error, file=sys.stderr)
        return NOT_TO_BE_REQUEUED
    except RuntimeError as error:
        if (message := describe_lost_ranks(error, settings.communication_timeout)) is None:
            raise
        print(f"{message} {checkpoint.describe_newest(Path(settings.output) / 'checkpoints')}", file=sys.stderr)
    return 1


def _plan(ready: Ready) -> str:
    settings, start = ready.settings, ready.start
    batches = start.plan if start else settings.batch_plan
    memory_bytes = device_bytes(ready.device, ready.process.local_world_size)
    shown = plan(settings, ready.merged_json, ready.layout, ready.device, batches, ready.data, ready.initial, ready.teacher, memory_bytes)
    return "\n".join([shown, *(start.notes if start and settings.dry_run else ())])  # a run that trains writes the notes into its log


def _train(ready: Ready, stop: StopRequest) -> int:
    run = assemble(ready, stop)
    try:
        status = train(run)
    except RuntimeError as error:
        error.add_note(f"in step {run.engine.current_step + 1}")
        raise
    except (FloatingPointError, UserError) as error:
        if run.monitor:
            run.monitor.record(str(error))
            run.monitor.close()
        raise
    if run.monitor:
        if status == 0:
            output = ready.settings.output
            run.monitor.log(f"Done: {run.plan.steps} steps. The model is in {output}; evaluate it with: python launch/evaluate.py {output}")
        run.monitor.close()
    run.engine.close()
    return status


def assemble(ready: Ready, stop: StopRequest) -> Run:
    """Build the engine, load the weights that the run begins with, and put together what the training loop needs."""
    settings, process, layout, data, start = ready.settings, ready.process, ready.layout, ready.data, ready.start
    assert data is not None and start is not None, "a dry run is not assembled"
    if process.is_first:
        initial = ready.initial.opened if ready.initial else None
        run_folder.record(settings, ready.merged_json, start, data.fingerprint, data.tokenizer_path, initial)
    engine = engine_for(layout)(settings, ready.merged_json, process, layout)
    _record_teacher(ready, engine)
    current_layout = layout.record(ready.merged_json["zero_optimization"]["stage"], settings.precision)
    first_step, batch_plan, how_loaded = _load_weights(ready, engine, current_layout)
    data_rank = layout.data_rank(process.rank)
    batches = TrainingBatches(data.sampling.samples, data.sampling.blend, batch_plan, data_rank, layout.data_parallel_size)
    peak, peak_source = peak_flops(settings, engine.device.type) if process.is_first else (None, "")
    monitor = None
    if process.is_first:
        run_folder.record_data(settings, batch_plan, data.stamps)
        monitor = Monitor(Path(settings.output), first_step, batch_plan)
        shown_peak = peak_source if peak is None else f"peak {peak / 1e12:.3g} TFLOP/s ({peak_source})"
        _introduce(monitor, ready, first_step, batch_plan, how_loaded, shown_peak)
    return Run(
        settings=settings,
        plan=batch_plan,
        engine=engine,
        micro_batches=batches.step,
        validation_batches={name: functools.partial(_validation_batches, ready, samples) for name, samples in data.held_out.items()},
        sample_text=_text_sampler(settings, data, engine),
        first_step=first_step,
        manifest=_manifest(settings, batch_plan, data, current_layout, engine.ranks.broadcast(start.run_id)),
        figures=_figures(settings, batch_plan, data, peak, process.world_size),
        monitor=monitor,
        disk=DiskWatch(Path(settings.output), data.sampling.folders.values(), process),
        stop=stop,
        noise=_noise_scale(ready, batch_plan, first_step, monitor) if monitor and settings.log.noise_scale else None,
    )


def _noise_scale(ready: Ready, batch_plan: BatchPlan, first_step: int, monitor: Monitor) -> NoiseScale:
    """Return the noise scale as the checkpoint of `first_step` recorded it; if it holds none, an empty one, and log that."""
    settings = ready.settings
    has_tied = any(layer.tied_key for layer in layers(settings.model))
    horizon = settings.log.noise_horizon * max(batch_plan.sizes_from(0))
    noise = NoiseScale(horizon, has_tied and leaves_out_tied(ready.layout))
    if first_step:
        folder = Path(settings.output) / "checkpoints" / checkpoint.folder_name(first_step)
        if not noise.restore(checkpoint.read_manifest(folder).get("noise_scale")):
            monitor.log(f"The noise scale is measured anew from step {first_step}: {folder.name} has no noise scale of these parameters.")
    return noise


def _record_teacher(ready: Ready, engine: Engine) -> None:
    """Record the teacher's weights in run.json. Raises UserError on every rank if the run had another teacher before."""
    if (fingerprint := engine.teacher_fingerprint()) is not None:
        complaint = run_folder.record_teacher(ready.settings, fingerprint) if ready.process.is_first else None
        if complaint := engine.ranks.first_error_of_any_rank(complaint):
            raise UserError(complaint)


def _load_weights(ready: Ready, engine: Engine, current_layout: dict) -> tuple[int, BatchPlan, str]:
    """Load the newest checkpoint, or the weights of --init if there is none.

    Returns the step to begin with, the samples that each step reads, and how the checkpoint was read ("" without one).
    """
    settings, start = ready.settings, ready.start
    assert start is not None
    root = Path(settings.output) / "checkpoints"
    names = [path.name for path in checkpoint.published(root)]
    # Rank 0 decides for all ranks which checkpoints there are: a network disk may show each rank another state.
    choice, *names = engine.ranks.broadcast(["resume" if start.resumes else "begin", *names])
    if choice == "resume":
        return _load_checkpoint(ready, engine, [root / name for name in names], current_layout)
    if settings.init:
        weights = ready.initial or InitialWeights(settings.init, settings.model)  # None: this rank saw a checkpoint, rank 0 saw none
        fingerprint = engine.start_from(weights)
        if ready.process.is_first:
            run_folder.record_initial_weights(settings, fingerprint)
    return 0, settings.batch_plan, ""


def _load_checkpoint(ready: Ready, engine: Engine, candidates: list[Path], current_layout: dict) -> tuple[int, BatchPlan, str]:
    """Load the newest checkpoint that is not damaged. Returns its step, the samples of each step, and the time and layouts as text."""
    process = ready.process
    folder = checkpoint.newest_undamaged(
        Path(ready.settings.output) / "checkpoints",
        verify=lambda folder: engine.ranks.first_error_of_any_rank(checkpoint.find_damage(folder, process.rank, process.world_size)),
        report=lambda line: print(line, flush=True) if process.is_first else None,
        may_rename=process.is_first,
        candidates=candidates,
    )
    assert folder is not None
    begun = time.perf_counter()
    engine.load(folder)
    manifest = checkpoint.read_manifest(folder)
    saved_layout = manifest.get("converted_from", manifest)["layout"]
    how = f"read in {time.perf_counter() - begun:.1f} s"
    how += (
        "" if saved_layout == current_layout else f", converted from {describe_layout(saved_layout)} to {describe_layout(current_layout)}"
    )
    step, plan_of_run = checkpoint.step_of(folder), run_folder.plan_after(ready.settings, manifest)
    # If newer checkpoints are damaged, sizes are to come again that nobody has checked.
    share_the_batch(ready.settings, ready.layout, plan_of_run, step)
    return step, plan_of_run, how


def _introduce(monitor: Monitor, ready: Ready, first_step: int, batch_plan: BatchPlan, how_loaded: str, peak: str) -> None:
    """Write the first lines of the log, and settings for TensorBoard."""
    settings, start = ready.settings, ready.start
    assert start is not None
    for note in start.notes:
        monitor.log(note)
    if new_size := run_folder.describe_new_size(settings, batch_plan, first_step, start.former):
        monitor.log(new_size)
    steps = batch_plan.steps
    begun = f"Resuming from step {first_step} of {steps}, {how_loaded}" if first_step else f"Starting at step 0 of {steps}"
    monitor.log(f"{begun}; {peak}")
    monitor.text("recipe", json.dumps(dataclasses.asdict(settings), indent=1))
    monitor.text("deepspeed", json.dumps(ready.merged_json, indent=1))
    monitor.hyperparameters(flatten(dataclasses.asdict(settings)), {"loss/validation": 0.0})


def _validation_batches(ready: Ready, samples: Samples) -> Iterator[Batch]:
    """This rank's batches of a source's validation split, or of the evenly spread part that log.validation_samples asks for."""
    settings, layout = ready.settings, ready.layout
    assert ready.data is not None and settings.batch.micro_batch_size is not None
    limit = math.ceil(settings.log.validation_samples / len(ready.data.held_out)) or None
    data_rank = layout.data_rank(ready.process.rank)
    return held_out_batches(samples, settings.batch.micro_batch_size, data_rank, layout.data_parallel_size, limit)


def _text_sampler(settings: RunSettings, data: RunData, engine: Engine) -> Callable[[int], str] | None:
    """Return a function that generates a text after log.sample_prompt; all ranks must call it together. None if the model writes none."""
    tokenizer, sampling = data.sampling.tokenizer, data.sampling
    prompt, end = tokenizer.encode_beginning(settings.log.sample_prompt), tokenizer.end_of_text
    new_tokens = max(1, min(128, (sampling.target_length or settings.model.sequence_length) // 2))
    request = engine.task.text_request(prompt, end, sampling.start_token, settings.model)
    if request is None:
        return None

    return functools.partial(_sample_text, engine, tokenizer, request, new_tokens)


def _sample_text(engine: Engine, tokenizer: Tokenizer, request: TextRequest, new_tokens: int, step: int) -> str:
    """Generate the text of a request, with `step` as the seed, up to the end of text."""
    ids = engine.sample(request.tokens, new_tokens, request.temperature, step, tokenizer.vocab_size, request.source)
    end = tokenizer.end_of_text
    return tokenizer.decode([*request.shown, *(ids[: ids.index(end)] if end in ids else ids)])


def _figures(settings: RunSettings, batch_plan: BatchPlan, data: RunData, peak: float | None, world_size: int) -> Figures:
    return Figures(
        flops_per_token=flops_per_counted_token(settings.model, data.sampling.target_length),
        peak_flops=peak,
        world_size=world_size,
        epochs=lambda steps: data.sampling.epochs(batch_plan.position(steps)),
        train_bytes_per_token=data.sampling.bytes_per_token,
        validation_bytes_per_token={name: bytes_per_token([samples.stream]) for name, samples in data.held_out.items()},
    )


def _manifest(settings: RunSettings, batch_plan: BatchPlan, data: RunData, layout: dict, run_id: str | None) -> dict:
    """Facts about the run that every checkpoint's manifest holds."""
    return {
        "run_id": run_id,
        "model": dataclasses.asdict(settings.model),
        "layout": layout,
        "data": {"fingerprint": data.fingerprint, "samples_per_step": settings.batch.global_batch_size},
        "batch_plan": batch_plan.record(),
        "random": {
            "seed": settings.seed,
            "streams": "order: (seed, epoch, sample); dropout: (seed, step, micro-batch, layer, part of the sequence)",
        },
        "recipe": dataclasses.asdict(settings),
        "paths": run_record.record_paths(dataclasses.asdict(settings), Path(settings.output)),
        "versions": run_record.versions(),
    }
