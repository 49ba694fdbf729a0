"""One rank of the equality tests: trains a tiny model for each job of a JSON file and returns losses and gradient norms.

A job is {"case": the model and its layout, "first": first step, "steps": number of steps, "load": a checkpoint or null, "init": a
model or null, "save": a folder or null}.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import sys
import time
from pathlib import Path

import torch

from data.sampling.batches import Batch
from launch.checkpoints.opening import open_model
from launch.evaluation.tasks.task import Task
from launch.ranks.layout import Layout
from launch.ranks.processes import Process, find_process
from launch.training import deepspeed_config
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.estimates import model_state_bytes, parameters_per_rank
from launch.training.optimizers import optimizer_for
from launch.training.recipe import read_run_settings
from launch.training.settings import RunSettings
from model.config import ModelConfig
from model.loss import IGNORED, training_loss
from model.transformer import Transformer
from tests.launch.training.optimizer_references import REFERENCES, adamw_with_changing_beta2
from tests.ranks import answer, answers_of_ranks

STEPS = 20
GLOBAL_BATCH = 8
SEQUENCE = 16
TARGET_LENGTH = 12
VOCABULARY = 64
RATES = {"adamw": 1e-3, "lamb": 2e-3, "lars": 1.0, "lion": 3e-4, "muon": 1e-3, "sgd": 2e-2}
"""Learning rate by optimizer, at which the weights move about equally far."""


def model_config(case: dict) -> ModelConfig:
    shape = dict(vocab_size=VOCABULARY, sequence_length=SEQUENCE, hidden_size=32, num_layers=2, num_attention_heads=2)
    return ModelConfig(**shape | case.get("model", {}))


settings_of = functools.cache(read_run_settings)  # reading a command line takes longer than building a small model


def run_settings(case: dict) -> RunSettings:
    settings = settings_of(("--batch.global_batch_size", str(GLOBAL_BATCH), *case.get("words", [])))
    name = case.get("optimizer", "adamw")
    settings = dataclasses.replace(
        settings,
        model=model_config(case),
        optimizer=dataclasses.replace(
            settings.optimizer, name=name, learning_rate=RATES[name], gradient_clipping=case.get("clipping", 0.5)
        ),
        loss=dataclasses.replace(settings.loss, **case.get("loss", {})),
        precision=case.get("precision", "float32"),
        recompute=case.get("recompute", False),
        compile=case.get("compile", False),
        **case.get("layout", {}),
    )
    assert not settings.complaints()
    return settings


def global_batch(step: int, config: ModelConfig) -> Batch:
    """Return the global batch of a step. A third of the targets are ignored, a different share of each sample."""
    generator = torch.Generator().manual_seed(step)
    length = TARGET_LENGTH if config.architecture == "encoder_decoder" else SEQUENCE
    drawn = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, length + 1), generator=generator)
    share = torch.linspace(0.0, 0.7, GLOBAL_BATCH)[:, None]
    ignored = torch.rand((GLOBAL_BATCH, length), generator=generator) < share
    batch = Batch(drawn[:, :-1], segments(length, generator), drawn[:, 1:].masked_fill(ignored, IGNORED))
    if config.architecture == "decoder":
        return batch
    batch = batch._replace(segments=batch.segments.masked_fill(torch.arange(length) >= length - 1 - torch.arange(8)[:, None] % 3, 0))
    batch = batch._replace(targets=batch.targets.masked_fill(batch.segments == 0, IGNORED))
    if config.architecture == "encoder_decoder":
        source = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE), generator=generator)
        source_segments = segments(SEQUENCE, generator).masked_fill(torch.arange(SEQUENCE) >= SEQUENCE - torch.arange(8)[:, None] % 4, 0)
        return batch._replace(source=source, source_segments=source_segments)
    if not config.token_head:
        batch = batch._replace(targets=torch.full_like(batch.targets, IGNORED))
    if config.num_classes:
        classes = batch.tokens[:, 0] % config.num_classes
        batch = batch._replace(classes=classes.masked_fill(torch.arange(GLOBAL_BATCH) % 5 == 1, IGNORED))
    return batch._replace(token_types=(batch.segments == 2).long()) if config.token_types else batch


def segments(length: int, generator: torch.Generator) -> torch.Tensor:
    """Return the segments of two documents in each sample.  [8, length]"""
    cuts = torch.randint(1, length, (GLOBAL_BATCH, 1), generator=generator)
    return 1 + (torch.arange(length) >= cuts).long()


def size_of(step: int, case: dict) -> int:
    """Return the samples that a step reads: under a ramp half of the batch in its first steps, and three steps later again."""
    return GLOBAL_BATCH // 2 if step < case.get("ramp", 0) or step == case.get("ramp", -4) + 3 else GLOBAL_BATCH


def beta2_of(step: int, case: dict, settings: RunSettings) -> float | None:
    """Return the beta2 of a step under a ramp with batch.beta2_rule tokens; None without a ramp."""
    return settings.optimizer.beta2 ** (size_of(step, case) / GLOBAL_BATCH) if "ramp" in case else None


def micro_batches(step: int, config: ModelConfig, layout: Layout, rank: int, size: int, case: dict) -> list[Batch]:
    starts = range(layout.data_rank(rank) * size, size_of(step, case), layout.data_parallel_size * size)
    return [global_batch(step, config).map(lambda whole, start=start: whole[start : start + size]) for start in starts]


def counts_of(batch: Batch) -> list[torch.Tensor]:
    """Return the number of targets and, if there are any, of classes that are not ignored."""
    return [(labels != IGNORED).sum() for labels in (batch.targets, batch.classes) if labels is not None]


def rate(step: int, settings: RunSettings) -> float:
    return settings.optimizer.learning_rate * (step + 1) / (2 * STEPS)


def train_plain(
    case: dict, steps: int = 2 * STEPS, initial: dict[str, torch.Tensor] | None = None
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Train the reference: one process, the whole batch at once, torch's own optimizer and clipping.

    Return losses and gradient norms of all steps, and the weights after STEPS.
    """
    from launch.training.engine import labels_of

    settings = run_settings(case)
    model = Transformer(settings.model, settings.seed).train()
    if settings.init:
        initial = dict(open_model(settings.init).state)
    model.load_state_dict(initial or {}, strict=False)
    held = {name: weight == 0 for name, weight in model.named_parameters() if settings.hold_zeros and is_of_a_linear(name)}
    teacher = None
    if settings.distillation.teacher:
        there = open_model(settings.distillation.teacher)
        teacher = Transformer(dataclasses.replace(there.config, document_mask=settings.model.document_mask))
        teacher.load_state_dict(dict(there.state))
    reference = adamw_with_changing_beta2 if "ramp" in case else REFERENCES[settings.optimizer.name]
    take_step = reference(model, settings.optimizer)
    history, weights = [], {}
    for step in range(steps):
        if step == STEPS:
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if step == case.get("poison"):  # as if the step had not been taken
            history.append((float("nan"), float("nan")))
            continue
        size = size_of(step, case)
        batch = global_batch(step, settings.model).map(lambda whole, size=size: whole[:size])
        outputs = torch.func.functional_call(model, rounded(model, settings), batch.inputs)
        loss = training_loss(outputs, labels_of(batch, counts_of(batch)), **case.get("loss", {}))
        if teacher:
            with torch.no_grad():
                taught = teacher(*batch.inputs)
            loss = with_teacher(loss, outputs, taught, batch, settings)
        model.zero_grad()
        loss.backward()
        for name, is_zero in held.items():
            model.get_parameter(name).grad[is_zero] = 0
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping or float("inf"))
        beta2 = beta2_of(step, case, settings)
        take_step(rate(step, settings), *([] if beta2 is None else [beta2]))
        for name, is_zero in held.items():  # Muon moves weights without a gradient
            model.get_parameter(name).data[is_zero] = 0
        history.append((float(loss.detach()), float(norm)))
    return history, weights


def is_of_a_linear(name: str) -> bool:
    return name.split(".")[-2] in ("query", "key", "value", "output", "gate", "up", "down") and name.endswith(".weight")


def rounded(model: Transformer, settings: RunSettings) -> dict[str, torch.Tensor]:
    """Return the weights of linear layers rounded to integers with a zero point, with the gradient of unrounded weights."""
    chosen, weights = settings.quantization, {}
    for name, weight in model.named_parameters():
        if chosen.bits is not None and is_of_a_linear(name):
            groups = weight.detach().unflatten(1, (-1, chosen.group_size))
            least, most = groups.amin(dim=2, keepdim=True).clamp(max=0), groups.amax(dim=2, keepdim=True).clamp(min=0)
            scale = (most - least) / (2**chosen.bits - 1)
            zero = (-least / scale).round()
            codes = (groups / scale + zero).round().clamp(0, 2**chosen.bits - 1)
            weights[name] = weight + (((codes - zero) * scale).flatten(1) - weight.detach())
    return weights


def with_teacher(loss: torch.Tensor, outputs: torch.Tensor, taught: torch.Tensor, batch: Batch, settings: RunSettings) -> torch.Tensor:
    """Return the distillation loss by Hinton's formula, with torch's own functions."""
    chosen = settings.distillation
    ours, theirs = ((logits / chosen.temperature).log_softmax(dim=-1)[batch.targets != IGNORED] for logits in (outputs, taught))
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return chosen.cross_entropy_weight * loss + chosen.kl_weight * chosen.temperature**2 * divergence


def build_engine(case: dict, process: Process):
    from launch.training.pipeline import engine_for

    settings = run_settings(case)
    path = f"ds_configs/{case['json']}.json"
    written = read_deepspeed_json(path) if case["json"] != "zero0" else {"zero_optimization": {"stage": 0}}
    written["zero_optimization"] |= case.get("zero", {})
    if "aio_bytes" in case:  # smaller tensors stay in memory
        from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

        optimizer_utils.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES = written["aio"]["block_size"] = case["aio_bytes"]
    if "pipeline" in case:
        written["pipeline"] |= case["pipeline"]
    layout = deepspeed_config.layout_of(written, settings, process.world_size)
    size = case.get("micro_batch", 2 if layout.pipeline_stages > 1 else 4 // layout.data_parallel_size)  # two for each data rank
    settings = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, micro_batch_size=size))
    merged = deepspeed_config.complete(written, path, settings, layout, "cpu")
    return engine_for(layout)(settings, merged, process, layout), settings


def matrices_of(pieces) -> list[str]:
    return [name for name, shape in pieces.shapes.items() if len(shape) >= 2]


def optimizer_bytes(engine, settings: RunSettings, json_name: str) -> tuple[float, float]:
    """Return the mean bytes on a rank of the optimizer's states and its own copy of the weights, and the figure in the plan."""
    network = {parameter.untyped_storage().data_ptr() for parameter in engine._model.parameters()}
    copies = [tensor for tensor in engine._state.tensors if tensor.untyped_storage().data_ptr() not in network]
    states = [tensor for state in engine._built.state.values() for tensor in state.values() if tensor.dim()]
    (measured,) = engine.ranks.sum([float(sum(tensor.nbytes for tensor in (*copies, *states)))])
    parameters = parameters_per_rank(settings.model, engine.layout, "dualpipev" if "dualpipev" in json_name else "1f1b")
    bytes_of_states = optimizer_for(settings.optimizer).state_bytes
    planned = model_state_bytes(parameters, engine.zero_stage, engine.layout.zero_size, settings.precision, bytes_of_states)
    return measured / engine.process.world_size, planned["optimizer"]


def results_of_ranks(world_size: int, jobs: list[dict], folder: Path, timeout_seconds: float, **environment: str) -> list[list[dict]]:
    """Return the results of each rank for each job. `folder` is for the file of the jobs."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return answers_of_ranks(world_size, Path(__file__), str(path), timeout_seconds=timeout_seconds, **environment)


@contextlib.contextmanager
def poisoned(on_this_rank: bool):
    """Make the loss on this rank NaN inside the context."""
    loss = Task.training_loss
    if on_this_rank:
        Task.training_loss = staticmethod(lambda *arguments: loss(*arguments) * float("nan"))
    yield
    Task.training_loss = staticmethod(loss)


def train_under_deepspeed(job: dict, process: Process) -> dict:
    from launch.checkpoints.initial import InitialWeights

    case, first = job["case"], job["first"]
    engine, settings = build_engine(case, process)
    if job["load"]:
        engine.load(Path(job["load"]))
    if job["init"]:
        engine.start_from(InitialWeights(job["init"], settings.model))
    reports, results = [], {}
    for step in range(first, first + job["steps"]):
        batches = micro_batches(step, settings.model, engine.layout, process.rank, settings.batch.micro_batch_size, case)
        with poisoned(step == case.get("poison") and engine.layout.data_rank(process.rank) == 0):
            beta2, last = beta2_of(step, case, settings), step == first + job["steps"] - 1
            reports.append(engine.train_step(batches, rate(step, settings), step, beta2=beta2, with_scalars=last))
        if case.get("samples") and step == 3:  # must not change the weights that ZeRO-3 has gathered
            if settings.model.architecture != "encoder":
                source = [5, 6, 7, 8, 9] if settings.model.architecture == "encoder_decoder" else None
                results["drawn"] = engine.sample([1, 2, 3], 4, 0.0 if source else 1.0, step, VOCABULARY, source)
            score = engine.validate(batches)
            results["validated"] = [score.loss, score.tokens, score.classes, score.right]
            one = engine.validate(batches[:1])
            assert 0 < one.token_loss < score.token_loss and 0 < one.tokens < score.tokens
    assert [step for step, report in enumerate(reports) if report.skipped] == [step for step in [case.get("poison")] if step is not None]
    if job["save"]:
        root = Path(job["save"])
        about = {"run_id": "test", "layout": {"world_size": process.world_size}, "model": dataclasses.asdict(settings.model)}
        complaint = engine.save(root, STEPS, about)
        assert complaint is None, complaint
    if case.get("hooks"):
        optimizer = engine._deepspeed.optimizer.optimizer
        on_parameters = sum(len(parameter._backward_hooks or ()) for parameter in engine._model.parameters())
        results["hooks"] = on_parameters + len(optimizer._optimizer_step_pre_hooks)
    if settings.log.noise_scale:
        results["squares"] = [dataclasses.asdict(report.squares) for report in reports if report.squares]
    if engine.pieces:
        results["bytes"] = engine.ranks.all_gather((engine.pieces.bytes_exchanged, len(matrices_of(engine.pieces))))
        results["scalars"] = reports[-1].scalars
    results["optimizer_bytes"] = optimizer_bytes(engine, settings, case["json"])
    engine._deepspeed.destroy()  # its hooks would keep it in memory, and with it its process groups
    return results | {"history": [(report.loss, report.gradient_norm) for report in reports]}


def release_groups() -> None:
    """End the process groups of a job. A run has one engine, these ranks have many, and idle groups have threads that wake up to poll."""
    from deepspeed.utils import groups

    groups._release_process_group_references()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()


def main() -> None:
    from launch.ranks.rendezvous import connect
    from launch.training.communication import initialize_communication

    torch.set_num_threads(1)
    process = find_process()
    initialize_communication(process, connect(process, 30, sys.argv), 600)
    gc.freeze()  # imported objects stay; visiting them at every collection would take a tenth of the time
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        start = time.perf_counter()
        results.append(train_under_deepspeed(job, process))
        print(f"{time.perf_counter() - start:.1f} s: {job['case']}", flush=True)
        release_groups()
    answer(results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
