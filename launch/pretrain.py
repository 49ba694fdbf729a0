"""Train: deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json [--config RECIPE] [--data PREPARED] [--output RUN]"""

import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError, flatten, run_script
from data.sampling.samples import Samples
from launch.ranks.stopping import StopRequest, leave
from launch.training.settings import RunSettings, read_run_settings

NOT_TO_BE_REQUEUED = 93
"""Exit status of a run that a new start would not help."""


def main(arguments: Sequence[str]) -> int:
    settings = read_run_settings(arguments)
    stop = StopRequest()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported; it warns of every host without a reverse name

    # Torch and DeepSpeed are imported only now: --help and mistakes in settings answer at once.
    from launch.checkpoints import checkpoint
    from launch.ranks.rendezvous import sentence_of_loss
    from launch.training.plan import plan
    from launch.training.setup import get_ready

    try:
        ready = get_ready(settings, arguments)
        if ready.process.is_first:
            print(plan(ready.settings, ready.merged_json, ready.layout, ready.device, ready.data, ready.initial, ready.teacher), flush=True)
        return 0 if settings.dry_run else _run(ready, stop)
    except FloatingPointError as error:  # so would the next start end
        print(error, file=sys.stderr)
        return NOT_TO_BE_REQUEUED
    except RuntimeError as error:
        if (sentence := sentence_of_loss(error, settings.communication_timeout)) is None:
            raise
        saved = [path.name for path in checkpoint.published(Path(settings.output) / "checkpoints")[:1]]
        go_on = f" The newest checkpoint is {saved[0]}; the same command goes on from it." if saved else ""
        print(sentence + go_on, file=sys.stderr)
    return 1


def _run(ready, stop: StopRequest) -> int:
    from data.sampling.batches import TrainingBatches, held_out_batches
    from launch.checkpoints import checkpoint, run_record
    from launch.checkpoints.initial import InitialWeights
    from launch.ranks.layout import describe
    from launch.training import run_folder
    from launch.training.loop import Figures, train
    from launch.training.monitor import Monitor
    from launch.training.pipeline import engine_for
    from launch.training.plan import flops_per_counted_token, peak_flops

    settings, process, layout, data, start = ready.settings, ready.process, ready.layout, ready.data, ready.start
    tokenizer, held_out, model = data.sampling.tokenizer, data.held_out, settings.model
    if process.is_first:
        run_folder.record(settings, ready.merged_json, start, data.fingerprint, data.tokenizer_path)
    batches = TrainingBatches(
        data.sampling.samples,
        data.sampling.blend,
        settings.batch_plan,
        layout.data_rank(process.rank),
        layout.data_parallel_size,
    )
    engine = engine_for(layout)(settings, ready.merged_json, process, layout)
    if (taught_by := engine.teacher_fingerprint()) is not None:
        complaint = run_folder.note_teacher(settings, taught_by) if process.is_first else None
        if complaint := engine.first_sentence(complaint):
            raise UserError(complaint)
    root = Path(settings.output) / "checkpoints"
    seen = [path.name for path in checkpoint.published(root)]
    # Rank 0 says for all what there is to go on with: a network disk may show each rank something else.
    word, *names = engine.first_sentence(" ".join(["resume" if start.goes_on else "begin", *seen]), 32 * 1024).split()
    layout_now = layout.recorded(ready.merged_json["zero_optimization"]["stage"], settings.precision)
    first_step, read = 0, ""
    if word == "resume":
        folder = checkpoint.newest_good(
            root,
            verify=lambda folder: engine.first_sentence(checkpoint.damage(folder, process.rank, process.world_size)),
            say=lambda line: print(line, flush=True) if process.is_first else None,
            may_rename=process.is_first,
            candidates=[root / name for name in names],
        )
        assert folder is not None
        begun = time.perf_counter()
        engine.load(folder)
        first_step = checkpoint.step_of(folder)
        manifest = checkpoint.read_manifest(folder)
        there = manifest.get("converted_from", manifest)["layout"]
        read = f"read in {time.perf_counter() - begun:.1f} s"
        read += "" if there == layout_now else f", converted from {describe(there)} to {describe(layout_now)}"
    elif settings.init:
        read_from = engine.begin_from(
            ready.initial or InitialWeights(settings.init, model)
        )  # None: this rank saw a checkpoint, rank 0 none
        if process.is_first:
            run_folder.note_beginning(settings, read_from)
    monitor, peak = None, 1.0
    if process.is_first:
        monitor = Monitor(Path(settings.output), first_step, settings.batch_plan)
        peak, peak_source = peak_flops(settings, engine.device.type)
        _introduce(monitor, settings, ready.merged_json, start, first_step, read, f"peak {peak / 1e12:.3g} TFLOP/s ({peak_source})")
    about = {
        "run_id": engine.first_sentence(start.run_id),
        "model": dataclasses.asdict(settings.model),
        "layout": layout_now,
        "data": {"fingerprint": data.fingerprint, "samples_per_step": len(settings.batch_plan.positions(0))},
        "random": {
            "seed": settings.seed,
            "streams": "order: (seed, epoch, sample); dropout: (seed, step, micro-batch, layer, part of the sequence)",
        },
        "recipe": dataclasses.asdict(settings),
        "versions": run_record.versions(),
    }

    def validation_batches(samples: Samples):
        return held_out_batches(
            samples,
            settings.batch.micro_batch_size,
            layout.data_rank(process.rank),
            layout.data_parallel_size,
            math.ceil(settings.log.validation_samples / len(held_out)) or None,
        )

    def sample(step: int) -> str:
        text, end = tokenizer.encode(settings.log.sample_prompt), tokenizer.end_of_text
        new_tokens = max(1, min(128, (data.sampling.target_length or model.sequence_length) // 2))
        if model.architecture == "encoder_decoder":
            source = [*text[: model.sequence_length - 1], end]
            drawn, shown = engine.sample([data.sampling.start_token], new_tokens, 0.0, step, tokenizer.vocab_size, source), []
        else:
            shown = text or [end]
            drawn = engine.sample(shown, new_tokens, 0.8, step, tokenizer.vocab_size)
        return tokenizer.decode(shown + drawn[: drawn.index(end) if end in drawn else len(drawn)])

    figures = Figures(
        flops_per_counted_token(model, data.sampling.target_length),
        peak,
        process.world_size,
        lambda steps: data.sampling.epochs(settings.batch_plan.position(steps)),
        data.sampling.bytes_per_token,
        {name: samples.stream.num_bytes / len(samples.stream) for name, samples in held_out.items()},
    )
    validated = {name: functools.partial(validation_batches, samples) for name, samples in held_out.items()}
    write_sample = None if model.architecture == "encoder" else sample
    try:
        status = train(settings, stop, engine, batches.step, validated, write_sample, first_step, about, monitor, figures)
    except RuntimeError as error:
        error.add_note(f"in step {engine.step_in_hand + 1}")
        raise
    if monitor:
        if status == 0:
            monitor.say(
                f"Done: {settings.batch_plan.steps} steps. {settings.output} holds the model; python launch/evaluate.py {settings.output}"
            )
        monitor.close()
    engine.close()
    return status


def _introduce(monitor, settings: RunSettings, merged: dict, start, first_step: int, read: str, peak: str) -> None:
    for note in start.notes:
        monitor.say(note)
    begun = (
        f"Going on from step {first_step} of {settings.batch_plan.steps}, {read}"
        if first_step
        else f"Starting at step 0 of {settings.batch_plan.steps}"
    )
    monitor.say(f"{begun}; {peak}")
    monitor.text("recipe", json.dumps(dataclasses.asdict(settings), indent=1))
    monitor.text("deepspeed", json.dumps(merged, indent=1))
    monitor.hyperparameters(flatten(dataclasses.asdict(settings)), {"loss/validation": 0.0})


if __name__ == "__main__":
    run_script(main, leave)
