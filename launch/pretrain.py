"""Train: deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json [--config RECIPE] [--data PREPARED] [--output RUN]"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from data.command_line import run_door
from launch.training.config import RunSettings, read_run_settings


def main(arguments: Sequence[str]) -> int:
    settings = read_run_settings(arguments)

    # Torch and DeepSpeed are imported only now: --help and mistakes in settings answer at once.
    from launch.training import deepspeed_config, processes, run_folder
    from launch.training.data import open_data
    from launch.training.plan import peak_flops, plan

    process = processes.find_process()
    processes.share_the_cores(process)
    device = processes.device_name()
    if device == "cpu":
        processes.keep_freed_memory()
    written = deepspeed_config.read_deepspeed_json(settings.deepspeed)
    merged = deepspeed_config.complete(written, settings.deepspeed, settings, process.world_size, device)
    data = open_data(settings, process)
    layout = {"world_size": process.world_size, "zero_stage": merged["zero_optimization"].get("stage", 0), "precision": settings.precision}
    start = run_folder.inspect(settings, data.fingerprint, layout)
    if process.is_first:
        print(plan(settings, merged, process, device, data.train, data.validation, f"tokenizer {data.tokenizer_path.name}"), flush=True)
    if settings.dry_run:
        return 0
    return _run(settings, merged, process, data, layout, start, peak_flops(settings, device))


def _run(settings: RunSettings, merged: dict, process, data, layout: dict, start, peak: tuple[float, str]) -> int:
    from data.batches import CausalBatches, evaluation_batches
    from launch.training import checkpoint, run_folder
    from launch.training.engine import Engine, OptimizerNumbers, initialize_communication
    from launch.training.loop import Figures, train
    from launch.training.monitor import Monitor
    from model.config import flops_per_token

    initialize_communication(process)
    if process.is_first:
        run_folder.record(settings, merged, start, data.fingerprint, data.tokenizer_path)
    numbers = OptimizerNumbers(
        settings.optimizer.weight_decay, settings.optimizer.beta1, settings.optimizer.beta2, settings.optimizer.epsilon
    )
    engine = Engine(settings.model, merged, numbers, process, settings.seed, settings.recompute, settings.compile)
    first_step = 0
    if start.goes_on:
        root = Path(settings.output) / "checkpoints"
        seen_by_the_first = engine.first_sentence(" ".join(path.name for path in checkpoint.published(root))) or ""
        folder = checkpoint.newest_good(
            root,
            verify=lambda folder: engine.first_sentence(checkpoint.damage(folder, process.rank, process.world_size)),
            say=lambda line: print(line, flush=True) if process.is_first else None,
            may_rename=process.is_first,
            candidates=[root / name for name in seen_by_the_first.split()],
        )
        assert folder is not None
        engine.load(folder)
        first_step = checkpoint.step_of(folder)
    monitor = Monitor(Path(settings.output), first_step, settings.steps, settings.batch.global_batch_size) if process.is_first else None
    if monitor:
        for note in start.notes:
            monitor.say(note)
        where = f"Going on from step {first_step}" if first_step else "Starting at step 0"
        monitor.say(f"{where} of {settings.steps}; peak {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]})")
        monitor.text("recipe", json.dumps(dataclasses.asdict(settings), indent=1))
        monitor.text("deepspeed", json.dumps(merged, indent=1))
        monitor.hyperparameters(run_folder.flatten(dataclasses.asdict(settings)), {"loss/validation": 0.0})
    batch = settings.batch
    samples = CausalBatches(
        data.train,
        settings.model.sequence_length,
        batch.global_batch_size,
        batch.micro_batch_size,
        settings.seed,
        process.rank,
        process.world_size,
        settings.model.document_mask,
    )
    about = {
        "run_id": engine.first_sentence(start.run_id),
        "model": dataclasses.asdict(settings.model),
        "layout": layout,
        "data": {
            "fingerprint": data.fingerprint,
            "sequence_length": settings.model.sequence_length,
            "samples_per_step": batch.global_batch_size,
        },
        "random": {"seed": settings.seed, "streams": "order: (seed, epoch, sample); dropout: (seed, step, rank)"},
        "recipe": dataclasses.asdict(settings),
        "versions": run_folder.versions(),
    }
    status = train(
        settings,
        engine,
        samples.step,
        lambda: evaluation_batches(
            data.validation,
            settings.model.sequence_length,
            batch.micro_batch_size,
            process.rank,
            process.world_size,
            settings.log.validation_samples or None,
        ),
        first_step,
        about,
        monitor,
        Figures(
            flops_per_token(settings.model),
            peak[0],
            process.world_size,
            {"train": data.train.num_bytes / len(data.train), "validation": data.validation.num_bytes / max(1, len(data.validation))},
        ),
        data.tokenizer.decode,
        data.tokenizer.encode(settings.log.sample_prompt) or [data.tokenizer.end_of_text],
        data.tokenizer.end_of_text,
    )
    if monitor:
        if status == 0:
            monitor.say(f"Done: {settings.steps} steps. {settings.output} holds the model; python launch/evaluate.py {settings.output}")
        monitor.close()
    engine.close()
    return status


if __name__ == "__main__":
    run_door(main)
