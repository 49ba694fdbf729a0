"""Train: deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json [--config RECIPE] [--data PREPARED] [--output RUN]"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from data.command_line import flatten, run_door
from launch.training.config import RunSettings, read_run_settings, share_the_batch


def main(arguments: Sequence[str]) -> int:
    settings = read_run_settings(arguments)

    # Torch and DeepSpeed are imported only now: --help and mistakes in settings answer at once.
    from data.batches import CausalBatches
    from launch.training import deepspeed_config, processes, run_folder
    from launch.training.data import open_data, will_be_prepared
    from launch.training.plan import plan

    process = processes.find_process()
    processes.share_the_cores(process)
    device = processes.device_name()
    if device == "cpu":
        processes.keep_freed_memory()
    written = deepspeed_config.read_deepspeed_json(settings.deepspeed)
    layout = deepspeed_config.layout_of(written, settings, process.world_size)
    settings = share_the_batch(settings, layout)
    merged = deepspeed_config.complete(written, settings.deepspeed, settings, layout, device, process.local_world_size)
    if settings.dry_run and will_be_prepared(settings):
        if process.is_first:
            print(plan(settings, merged, layout, device, None))
        return 0
    data = open_data(settings, process)
    samples = CausalBatches(
        data.train,
        settings.model.sequence_length,
        settings.batch.global_batch_size,
        settings.batch.micro_batch_size,
        settings.seed,
        layout.data_rank(process.rank),
        layout.data_parallel_size,
        settings.model.document_mask,
    )
    start = run_folder.inspect(settings, data.fingerprint, merged)
    if process.is_first:
        print(plan(settings, merged, layout, device, data), flush=True)
    if settings.dry_run:
        return 0
    held = run_folder.lock(settings) if process.is_first else None  # noqa: F841 (held until the process ends)
    return _run(settings, merged, process, layout, data, samples, start)


def _run(settings: RunSettings, merged: dict, process, layout, data, samples, start) -> int:
    from data.batches import evaluation_batches
    from launch.training import checkpoint, run_folder
    from launch.training.engine import initialize_communication
    from launch.training.layout import describe
    from launch.training.loop import Figures, train
    from launch.training.monitor import Monitor
    from launch.training.pipeline import engine_for
    from launch.training.plan import peak_flops
    from model.config import flops_per_token

    initialize_communication(process)
    if process.is_first:
        run_folder.record(settings, merged, start, data.fingerprint, data.tokenizer_path)
    engine = engine_for(layout)(settings, merged, process, layout)
    root = Path(settings.output) / "checkpoints"
    seen = [path.name for path in checkpoint.published(root)]
    # Rank 0 says for all what there is to go on with: a network disk may show each rank something else.
    word, *names = engine.first_sentence(" ".join(["resume" if start.goes_on else "begin", *seen]), 32 * 1024).split()
    layout_now = layout.recorded(merged["zero_optimization"]["stage"], settings.precision)
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
    monitor, peak = None, 1.0
    if process.is_first:
        monitor = Monitor(Path(settings.output), first_step, settings.steps, settings.batch.global_batch_size)
        peak, peak_source = peak_flops(settings, engine.device.type)
        _introduce(monitor, settings, merged, start, first_step, read, f"peak {peak / 1e12:.3g} TFLOP/s ({peak_source})")
    about = {
        "run_id": engine.first_sentence(start.run_id),
        "model": dataclasses.asdict(settings.model),
        "layout": layout_now,
        "data": {"fingerprint": data.fingerprint, "samples_per_step": settings.batch.global_batch_size},
        "random": {
            "seed": settings.seed,
            "streams": "order: (seed, epoch, sample); dropout: (seed, step, micro-batch, layer, part of the sequence)",
        },
        "recipe": dataclasses.asdict(settings),
        "versions": run_folder.versions(),
    }

    def validation_batches():
        return evaluation_batches(
            data.validation,
            settings.model.sequence_length,
            settings.batch.micro_batch_size,
            layout.data_rank(process.rank),
            layout.data_parallel_size,
            settings.log.validation_samples or None,
            settings.model.document_mask,
        )

    def sample(step: int) -> str:
        prompt = data.tokenizer.encode(settings.log.sample_prompt) or [data.tokenizer.end_of_text]
        drawn = engine.sample(prompt, min(128, settings.model.sequence_length // 2), 0.8, step, data.tokenizer.vocab_size)
        end = drawn.index(data.tokenizer.end_of_text) if data.tokenizer.end_of_text in drawn else len(drawn)
        return data.tokenizer.decode(prompt + drawn[:end])

    bytes_per_token = {"train": data.train.num_bytes / len(data.train)}
    if len(data.validation):
        bytes_per_token["validation"] = data.validation.num_bytes / len(data.validation)
    figures = Figures(flops_per_token(settings.model), peak, process.world_size, samples.num_samples, bytes_per_token)
    validated = validation_batches if len(data.validation) > 1 else None
    status = train(settings, engine, samples.step, validated, sample, first_step, about, monitor, figures)
    if monitor:
        if status == 0:
            monitor.say(f"Done: {settings.steps} steps. {settings.output} holds the model; python launch/evaluate.py {settings.output}")
        monitor.close()
    engine.close()
    return status


def _introduce(monitor, settings: RunSettings, merged: dict, start, first_step: int, read: str, peak: str) -> None:
    for note in start.notes:
        monitor.say(note)
    begun = f"Going on from step {first_step} of {settings.steps}, {read}" if first_step else f"Starting at step 0 of {settings.steps}"
    monitor.say(f"{begun}; {peak}")
    monitor.text("recipe", json.dumps(dataclasses.asdict(settings), indent=1))
    monitor.text("deepspeed", json.dumps(merged, indent=1))
    monitor.hyperparameters(flatten(dataclasses.asdict(settings)), {"loss/validation": 0.0})


if __name__ == "__main__":
    run_door(main)
