"""One rank of the equality tests: trains a tiny model under each job of a JSON list, answers with losses and gradient norms.

A job is {"case": what to train and in which layout, "first": step, "load": a checkpoint or null, "save": a folder or null}.
"""

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from data.batches import Batch
from launch.training import deepspeed_config
from launch.training.config import RunSettings, read_run_settings
from launch.training.layout import Layout
from launch.training.processes import Process, find_process
from model.config import ModelConfig
from model.loss import IGNORED, training_loss
from model.transformer import Transformer
from tests.ranks import answer

STEPS = 20
GLOBAL_BATCH = 8
MICRO_BATCH = 2
SEQUENCE = 16
VOCABULARY = 64


def model_config(case: dict) -> ModelConfig:
    shape = dict(vocab_size=VOCABULARY, sequence_length=SEQUENCE, hidden_size=32, num_layers=2, num_attention_heads=2)
    return ModelConfig(**shape | case.get("model", {}))


def micro_batch_of(case: dict) -> int:
    return case.get("micro_batch", MICRO_BATCH)


def run_settings(case: dict) -> RunSettings:
    words = ["--batch.global_batch_size", str(GLOBAL_BATCH), "--batch.micro_batch_size", str(micro_batch_of(case))]
    words += ["--optimizer.gradient_clipping", str(case.get("clipping", 0.5)), "--optimizer.learning_rate", "1e-3"]
    words += ["--precision", case.get("precision", "float32"), "--recompute", str(case.get("recompute", False)).lower()]
    words += ["--compile", str(case.get("compile", False)).lower()]
    words += [f"--{name}={size}" for name, size in case.get("layout", {}).items()]
    return dataclasses.replace(read_run_settings(words), model=model_config(case))


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [8, 16] of a step; a third of the targets are left out, unevenly over the samples."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    share = torch.linspace(0.0, 0.7, GLOBAL_BATCH)[:, None]
    left_out = torch.rand((GLOBAL_BATCH, SEQUENCE), generator=generator) < share
    return drawn[:, :-1], drawn[:, 1:].masked_fill(left_out, IGNORED)


def segments(step: int) -> torch.Tensor:
    """Two documents in each sample [8, 16], told apart where the case has a document mask."""
    cuts = torch.randint(1, SEQUENCE, (GLOBAL_BATCH, 1), generator=torch.Generator().manual_seed(step))
    return 1 + (torch.arange(SEQUENCE) >= cuts).long()


def micro_batches(step: int, layout: Layout, rank: int, size: int) -> list[Batch]:
    tokens, targets = global_batch(step)
    starts = range(layout.data_rank(rank) * size, GLOBAL_BATCH, layout.data_parallel_size * size)
    rows = [slice(start, start + size) for start in starts]
    return [Batch(tokens[row], segments(step)[row], targets[row]) for row in rows]


def rate(step: int, settings: RunSettings) -> float:
    return settings.optimizer.learning_rate * (step + 1) / (2 * STEPS)


def train_plain(case: dict, steps: int = 2 * STEPS) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The reference: one process, the whole batch at once, torch's own optimizer and clipping.

    Losses and gradient norms of all steps, and the weights as they were after STEPS.
    """
    settings = run_settings(case)
    model = Transformer(settings.model, settings.seed).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(settings.optimizer.beta1, settings.optimizer.beta2),
        eps=settings.optimizer.epsilon,
    )
    history, weights = [], {}
    for step in range(steps):
        if step == STEPS:
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if step == case.get("poison"):  # as if the step had never been asked for
            history.append((float("nan"), float("nan")))
            continue
        tokens, targets = global_batch(step)
        loss = training_loss(model(tokens, segments(step)), (targets, (targets != IGNORED).sum()))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return history, weights


def build_engine(case: dict, process: Process):
    from launch.training.pipeline import engine_for

    settings = run_settings(case)
    path = f"ds_configs/{case['json']}.json"
    written = deepspeed_config.read_deepspeed_json(path) if case["json"] != "zero0" else {"zero_optimization": {"stage": 0}}
    written["zero_optimization"] |= case.get("zero", {})
    if "aio_bytes" in case:  # what is smaller stays in memory
        from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

        optimizer_utils.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES = written["aio"]["block_size"] = case["aio_bytes"]
    if "pipeline" in case:
        written["pipeline"] |= case["pipeline"]
    layout = deepspeed_config.layout_of(written, settings, process.world_size)
    merged = deepspeed_config.complete(written, path, settings, layout, "cpu")
    return engine_for(layout)(settings, merged, process, layout), settings


@contextlib.contextmanager
def poisoned(here: bool):
    """Within it, a loss on this rank is not a number."""
    from launch.training import engine, pipeline

    whole = engine.training_loss
    if here:
        engine.training_loss = pipeline.training_loss = lambda logits, labels: whole(logits, labels) * float("nan")
    yield
    engine.training_loss = pipeline.training_loss = whole


def train_under_deepspeed(job: dict, process: Process) -> dict:
    case, first = job["case"], job["first"]
    engine, settings = build_engine(case, process)
    if job["load"]:
        engine.load(Path(job["load"]))
    reports, answers = [], {}
    for step in range(first, first + STEPS):
        batches = micro_batches(step, engine.layout, process.rank, micro_batch_of(case))
        with poisoned(step == case.get("poison") and engine.layout.data_rank(process.rank) == 0):
            reports.append(engine.train_step(batches, rate(step, settings), step))
        if case.get("samples") and step == 3:  # must leave nothing behind in the weights that ZeRO-3 gathered
            drawn = engine.sample([1, 2, 3], 4, 1.0, step, VOCABULARY)
            loss_sum, num_targets = engine.validate(batches)
            answers |= {"drawn": drawn, "validated": loss_sum / num_targets}
            first_sum, first_targets = engine.validate(batches[:1])
            assert 0 < first_sum < loss_sum and 0 < first_targets < num_targets
    assert [step for step, report in enumerate(reports) if report.skipped] == [step for step in [case.get("poison")] if step is not None]
    if job["save"]:
        root = Path(job["save"])
        complaint = engine.save(root, STEPS, {"run_id": "test", "layout": {"world_size": process.world_size}, "model": {}})
        assert complaint is None, complaint
    return answers | {"history": [(report.loss, report.gradient_norm) for report in reports]}


def main() -> None:
    from deepspeed.utils import groups

    from launch.training.engine import initialize_communication
    from launch.training.rendezvous import meet

    torch.set_num_threads(1)
    process = find_process()
    initialize_communication(process, meet(process, 30, sys.argv), 600)
    answers = []
    for job in json.loads(sys.argv[1]):
        start = time.perf_counter()
        answers.append(train_under_deepspeed(job, process))
        print(f"{time.perf_counter() - start:.1f} s: {job['case']}", flush=True)
        groups._release_process_group_references()  # of this engine's layout; a run has one engine, these ranks have many
    answer(answers)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
