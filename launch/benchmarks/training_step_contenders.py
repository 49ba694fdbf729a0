"""The contenders of launch/benchmarks/training_step.py: each builds what it needs and returns a function that runs one step."""

import functools
import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from data.sampling.batch_plan import BatchSettings
from data.sampling.batches import Batch
from launch import REPOSITORY
from launch.benchmarks.measurement import timed
from launch.benchmarks.settings import TrainingStepSettings
from launch.ranks import processes
from launch.ranks.rendezvous import connect
from launch.training import deepspeed_config
from launch.training.communication import initialize_communication
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.pipeline import engine_for
from launch.training.settings import LogSettings, OptimizerSettings, RunSettings
from model.config import ModelConfig
from model.loss import Labels, training_loss
from model.transformer import Transformer

ADAMW = OptimizerSettings()
LOG = LogSettings()


def measure(name: str, settings: TrainingStepSettings) -> int:
    """Run a contender in this process, and print the seconds of its steps as JSON."""
    processes.share_cores(processes.find_process())
    processes.keep_freed_memory()
    measured = _measure(TABLE[name](settings), settings.steps)
    if dist.is_initialized():  # threads of a group that still exists when Python ends may end it with "terminate called"
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(measured))
    return 0


def _measure(step: Callable[[], object], steps: int) -> dict:
    """Return the wall and CPU seconds of each step after two warm-up steps, and, if a step reports them, the mean seconds of its parts."""
    timings, reported = [], []
    for _ in range(steps + 2):
        timings.append(timed(lambda: reported.append(getattr(step(), "seconds", {}))))
    return {
        "wall": [timing.wall for timing in timings[2:]],
        "cpu": [timing.cpu for timing in timings[2:]],
        "threads": torch.get_num_threads(),
        "parts": {part: statistics.mean(one[part] for one in reported[2:]) for part in reported[-1]},
    }


def _config(settings: TrainingStepSettings) -> ModelConfig:
    return ModelConfig(
        vocab_size=settings.vocab_size,
        sequence_length=settings.sequence_length,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        tie_embeddings=False,
    )


def _draw(settings: TrainingStepSettings) -> Tensor:
    """Draw random tokens.  -> [micro_batch_size, sequence_length + 1]"""
    return torch.randint(0, settings.vocab_size, (settings.micro_batch_size, settings.sequence_length + 1))


def _bare_products(settings: TrainingStepSettings) -> Callable[[], object]:
    """Return a step of only its matrix products, forward and backward: bf16, contiguous, outputs discarded.

    Attention has two products forward (scores and mixture) and four backward, over whole (not causal) squares.
    """
    rows = settings.micro_batch_size * settings.sequence_length
    hidden, inner = settings.hidden_size, settings.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    draw = lambda *shape: torch.randn(*shape).bfloat16()  # noqa: E731
    linear = {(i, o): (draw(rows, i), draw(o, i), draw(rows, o)) for i, o in {*shapes, (hidden, settings.vocab_size)}}
    heads = settings.micro_batch_size * settings.num_attention_heads
    head_size = hidden // settings.num_attention_heads
    part, square = draw(heads, settings.sequence_length, head_size), draw(heads, settings.sequence_length, settings.sequence_length)

    def products(shape: tuple[int, int]) -> None:
        """Compute the output of one linear layer, and the gradients of its input and weight."""
        x, weight, gradient = linear[shape]
        x @ weight.t()
        gradient @ weight
        gradient.t() @ x

    def step() -> None:
        """Compute the products of one step."""
        for _ in range(settings.accumulation):
            for _ in range(settings.num_layers):
                for shape in shapes:
                    products(shape)
                for _ in range(2):
                    part @ part.transpose(1, 2)
                for _ in range(4):
                    square @ part
            products((hidden, settings.vocab_size))

    return step


def _llama(settings: TrainingStepSettings) -> LlamaForCausalLM:
    """Llama of transformers with the same shape as our model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.intermediate_size,
            max_position_embeddings=settings.sequence_length,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def _transformers(settings: TrainingStepSettings, compiled: bool) -> Callable[[], object]:
    """Llama of transformers in the plain loop; the whole network is compiled."""
    model = _llama(settings).bfloat16()
    call = torch.compile(model) if compiled else model
    return _plain_loop(
        settings, model, lambda tokens, _: call(input_ids=tokens, labels=tokens).loss / settings.accumulation
    )  # it shifts them


def _transformers_autocast(settings: TrainingStepSettings, compiled: bool) -> Callable[[], object]:
    """Llama of transformers with float32 weights under bf16 autocast, as its users often train."""
    model = _llama(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> None:
        """Train for one step."""
        for _ in range(settings.accumulation):
            drawn = _draw(settings)
            with torch.autocast("cpu", torch.bfloat16):
                loss = call(input_ids=drawn[:, :-1], labels=drawn[:, :-1]).loss / settings.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours_in_a_plain_loop(settings: TrainingStepSettings, compiled: bool) -> Callable[[], object]:
    """Our layers in the plain loop, without DeepSpeed; each block is compiled, as --compile does."""
    model = Transformer(_config(settings)).bfloat16()
    if compiled:
        for block in model.blocks():
            block.compile()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a micro-batch, divided by the number of micro-batches."""
        divisor = torch.tensor(float(targets.numel() * settings.accumulation))
        return training_loss(model(tokens, torch.ones_like(tokens)), Labels(targets, divisor))

    return _plain_loop(settings, model, loss)


def _plain_loop(settings: TrainingStepSettings, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
    """Return a step with bf16 weights, and float32 master weights and gradients, as ZeRO-1 keeps them. `loss` takes tokens and targets."""
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def step() -> None:
        """Train for one step."""
        for _ in range(settings.accumulation):
            drawn = _draw(settings)
            loss(drawn[:, :-1], drawn[:, 1:]).backward()
            for weight, gradient in zip(weights, gradients, strict=True):
                assert weight.grad is not None
                gradient += weight.grad
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([weight.detach() for weight in weights], masters)
        for gradient in gradients:
            gradient.zero_()

    return step


def _ours_under_deepspeed(
    settings: TrainingStepSettings,
    compiled: bool = False,
    json_name: str = "zero1",
    tensor_parallel_size: int = 1,
    sequence_parallel_size: int = 1,
    optimizer: OptimizerSettings = ADAMW,
    log: LogSettings = LOG,
) -> Callable[[], object]:
    """Our engine, as launch/pretrain.py runs it."""
    process = processes.find_process()
    initialize_communication(process, connect(process, 30, sys.argv), 600)
    path = str(REPOSITORY / "ds_configs" / f"{json_name}.json")
    batch = BatchSettings(settings.micro_batch_size * settings.accumulation, settings.micro_batch_size)
    run = RunSettings(
        model=_config(settings),
        batch=batch,
        optimizer=optimizer,
        log=log,
        train_steps=1,
        compile=compiled,
        tensor_parallel_size=tensor_parallel_size,
        sequence_parallel_size=sequence_parallel_size,
    )
    written = read_deepspeed_json(path)
    layout = deepspeed_config.layout_of(written, run, process.world_size)
    engine = engine_for(layout)(run, deepspeed_config.complete(written, path, run, layout, "cpu"), process, layout)
    number = 0

    def step() -> object:
        """Train for one step, and return the engine's result."""
        nonlocal number
        torch.manual_seed(number * process.world_size + layout.data_rank(process.rank))  # ranks that share a batch draw the same
        drawn = [_draw(settings) for _ in range(settings.accumulation // layout.data_parallel_size)]
        number += 1
        batches = [Batch(one[:, :-1], one[:, :-1].new_ones(one[:, :-1].shape), one[:, 1:]) for one in drawn]
        return engine.train_step(batches, 1e-4, number - 1)

    return step


TABLE: dict[str, Callable[[TrainingStepSettings], Callable[[], object]]] = {
    "bare products": _bare_products,
    "transformers eager": functools.partial(_transformers, compiled=False),
    "transformers compiled": functools.partial(_transformers, compiled=True),
    "transformers autocast, eager": functools.partial(_transformers_autocast, compiled=False),
    "transformers autocast, compiled": functools.partial(_transformers_autocast, compiled=True),
    "ours plain eager": functools.partial(_ours_in_a_plain_loop, compiled=False),
    "ours plain compiled": functools.partial(_ours_in_a_plain_loop, compiled=True),
    "ours ZeRO-1 eager": _ours_under_deepspeed,
    "ours ZeRO-1 compiled": functools.partial(_ours_under_deepspeed, compiled=True),
    **{
        f"ours ZeRO-1 eager, {name}": functools.partial(_ours_under_deepspeed, optimizer=OptimizerSettings(name=name))
        for name in ("muon", "lamb", "lars", "sgd", "lion")
    },
    "ours ZeRO-1 eager, muon in bf16": functools.partial(
        _ours_under_deepspeed, optimizer=OptimizerSettings(name="muon", muon_precision="bf16")
    ),
    "ours ZeRO-1 eager, noise scale": functools.partial(_ours_under_deepspeed, log=LogSettings(noise_scale=True)),
    "ours ZeRO-1 eager, two ranks": _ours_under_deepspeed,
    "ours ZeRO-2 eager, two ranks": functools.partial(_ours_under_deepspeed, json_name="zero2"),
    "ours ZeRO-3 eager, two ranks": functools.partial(_ours_under_deepspeed, json_name="zero3"),
    "pipeline, two ranks": functools.partial(_ours_under_deepspeed, json_name="pipeline_zero1"),
    "pipeline DualPipeV, two ranks": functools.partial(_ours_under_deepspeed, json_name="pipeline_dualpipev"),
    "tensor parallel, two ranks": functools.partial(_ours_under_deepspeed, tensor_parallel_size=2),
    "sequence parallel, two ranks": functools.partial(_ours_under_deepspeed, sequence_parallel_size=2),
}
"""The function of each contender, by its name in `only`."""
