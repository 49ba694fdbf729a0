"""Measure the training step on this CPU, beside transformers' and beside its bare matrix products.

    python launch/benchmarks/training_step.py

Every contender runs in a process of its own, one after the other, in several rounds; a share is a ratio of medians within one run.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from data.command_line import UserError, nearest, read_settings, run_door


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    hidden_size: int = 384
    """Width."""
    num_layers: int = 6
    """Blocks."""
    num_attention_heads: int = 6
    """Heads."""
    intermediate_size: int = 1024
    """Feed-forward width."""
    vocab_size: int = 8192
    """Rows of embedding and head, which are not tied."""
    sequence_length: int = 256
    """Tokens of a sequence."""
    micro_batch_size: int = 16
    """Sequences a forward pass."""
    accumulation: int = 2
    """Micro-batches a step."""
    rounds: int = 3
    """How often each contender is started."""
    steps: int = 4
    """Steps measured in each round, after two that are not."""
    only: tuple[str, ...] = ()
    """Contenders to measure (default: all)."""
    contender: str | None = None
    """Measure this one here and print its seconds a step; the benchmark starts itself with this."""


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(BenchmarkSettings, arguments, "Measure the training step beside others.")
    for name in (settings.contender, *settings.only):
        if name is not None and name not in CONTENDERS:
            raise UserError(f'Unknown contender "{name}".{nearest(name, list(CONTENDERS))} There are: {", ".join(CONTENDERS)}.')
    for name in ("rounds", "steps", "accumulation", "micro_batch_size"):
        if getattr(settings, name) < (2 if name == "accumulation" else 1):
            raise UserError(f"{name} is {getattr(settings, name)}; it must be at least {2 if name == 'accumulation' else 1}.")
    if settings.contender:
        measured = _measure(CONTENDERS[settings.contender](settings), settings.steps)
        _leave_process_group()
        print(json.dumps(measured))
        return 0
    names = [name for name in CONTENDERS if name in (settings.only or CONTENDERS)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[dict[str, float]]] = {}
    for number in range(settings.rounds):
        for name in names:
            print(f"round {number + 1}/{settings.rounds}: {name} ...", file=sys.stderr, flush=True)
            ranks = _start(name, arguments)
            seconds[name] += ranks[0]["seconds"]
            parts[name] = [rank["parts"] for rank in ranks]
    tokens = settings.micro_batch_size * settings.accumulation * settings.sequence_length
    bare = statistics.median(seconds["bare products"]) if "bare products" in seconds else None
    print(f"\n{'':40}{'s/step':>8}{'tokens/s':>11}{'of bare products':>18}")
    for name in names:
        middle = statistics.median(seconds[name])
        share = f"{bare / middle:18.2f}" if bare else ""
        print(f"{name:40}{middle:8.3f}{tokens / middle:11,.0f}{share}")
    for name in names:
        if parts[name][0]:
            _show_parts(name, parts[name], settings)
    return 0


def _show_parts(name: str, ranks: list[dict[str, float]], settings: BenchmarkSettings) -> None:
    """Where each rank's time went in the last round; for a pipeline also why it waited."""
    print(f"\n{name + ', last round':40}" + "".join(f"{part:>11}" for part in ranks[0]) + "   (seconds a step)")
    for number, parts in enumerate(ranks):
        print(f"{f'    rank {number}':40}" + "".join(f"{parts[part]:11.3f}" for part in ranks[0]))
    if name == "pipeline, two ranks":
        step, micro_batches = sum(ranks[0].values()), settings.accumulation
        busy = [sum(parts.values()) - parts["passing"] for parts in ranks]
        mean = sum(busy) / len(busy)
        even = mean * (1 + (len(ranks) - 1) / micro_batches)
        uneven = _one_forward_one_backward([(parts["forward"], parts["backward"]) for parts in ranks], micro_batches)
        uneven += max(parts["optimizer"] for parts in ranks)
        rows = {
            "work": mean,
            "bubble of equal stages": even - mean,
            "stages not equal": uneven - even,
            "sending and the rest": step - uneven,
        }
        print("    of a step: " + ", ".join(f"{what} {seconds / step:.0%}" for what, seconds in rows.items()))


def _one_forward_one_backward(stages: list[tuple[float, float]], micro_batches: int) -> float:
    """How long a pipeline takes whose stages need so long for all forwards and all backwards, if sending takes no time."""
    done: dict[tuple[str, int, int], float] = {}
    orders = []
    for stage in range(len(stages)):
        ahead = min(len(stages) - stage - 1, micro_batches)
        order = [("forward", number) for number in range(ahead)]
        for number in range(micro_batches):
            order += [("forward", ahead + number)] if ahead + number < micro_batches else []
            order.append(("backward", number))
        orders.append(order)
    clocks = [0.0] * len(stages)
    while any(orders):
        for stage, order in enumerate(orders):
            kind, number = order[0] if order else ("", -1)
            from_whom = stage - 1 if kind == "forward" else stage + 1
            if not order or (0 <= from_whom < len(stages) and (kind, from_whom, number) not in done):
                continue
            seconds = stages[stage][kind == "backward"] / micro_batches
            clocks[stage] = done[kind, stage, number] = max(clocks[stage], done.get((kind, from_whom, number), 0.0)) + seconds
            order.pop(0)
    return max(clocks)


def _start(name: str, arguments: Sequence[str]) -> list[dict]:
    world_size = 2 if name.endswith("two ranks") else 1
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"DS_ACCELERATOR": "cpu"}
    if world_size > 1:
        from launch.ranks.processes import free_port

        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    command = [sys.executable, __file__, *arguments, "--contender", name]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{name} failed:\n" + "\n".join(error for _, error in outputs))
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def _leave_process_group() -> None:
    """Threads of a group that is still there when Python ends may end it with "terminate called"."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _measure(step: Callable[[], object], steps: int) -> dict:
    """Seconds of each step after the first two, and, where a step reports them, the mean seconds of its parts."""
    seconds, reported = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        reported.append(getattr(step(), "seconds", {}))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[2:], "parts": {part: statistics.mean(one[part] for one in reported[2:]) for part in reported[-1]}}


def _config(settings: BenchmarkSettings):
    from model.config import ModelConfig

    return ModelConfig(
        vocab_size=settings.vocab_size,
        sequence_length=settings.sequence_length,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        tie_embeddings=False,
    )


def _draw(settings: BenchmarkSettings):
    import torch

    return torch.randint(0, settings.vocab_size, (settings.micro_batch_size, settings.sequence_length + 1))


def _bare_products(settings: BenchmarkSettings) -> Callable[[], object]:
    """Every matrix product of one step, forward and backward, and nothing else: bf16, contiguous, outputs thrown away.

    Attention: scores and mixture forward, two each backward, over whole (not causal) squares.
    """
    import torch

    rows = settings.micro_batch_size * settings.sequence_length
    hidden, inner = settings.hidden_size, settings.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    draw = lambda *shape: torch.randn(*shape).bfloat16()  # noqa: E731
    linear = {(i, o): (draw(rows, i), draw(o, i), draw(rows, o)) for i, o in {*shapes, (hidden, settings.vocab_size)}}
    heads = settings.micro_batch_size * settings.num_attention_heads
    head_size = hidden // settings.num_attention_heads
    part, square = draw(heads, settings.sequence_length, head_size), draw(heads, settings.sequence_length, settings.sequence_length)

    def products(shape: tuple[int, int]) -> None:
        x, weight, gradient = linear[shape]
        x @ weight.t()
        gradient @ weight
        gradient.t() @ x

    def step() -> None:
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


def _transformers(settings: BenchmarkSettings, compiled: bool) -> Callable[[], object]:
    """transformers' Llama of the same shape in a plain loop: float32 weights, bf16 autocast, fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> None:
        for _ in range(settings.accumulation):
            drawn = _draw(settings)
            with torch.autocast("cpu", torch.bfloat16):
                loss = call(input_ids=drawn[:, :-1], labels=drawn[:, :-1]).loss / settings.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours_in_a_plain_loop(settings: BenchmarkSettings, compiled: bool) -> Callable[[], object]:
    """Our layers without DeepSpeed: bf16 weights, float32 master weights and gradients, as ZeRO-1 keeps them."""
    import torch

    from launch.ranks.processes import keep_freed_memory
    from model.loss import training_loss
    from model.transformer import Transformer

    keep_freed_memory()
    model = Transformer(_config(settings)).bfloat16()
    if compiled:
        for block in model.blocks():
            block.compile()
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def step() -> None:
        for _ in range(settings.accumulation):
            drawn = _draw(settings)
            tokens, targets = drawn[:, :-1], drawn[:, 1:]
            divisor = torch.tensor(float(targets.numel() * settings.accumulation))
            training_loss(model(tokens, torch.ones_like(tokens)), (targets, divisor)).backward()
            for weight, master in zip(weights, masters, strict=True):
                master.grad += weight.grad
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([weight.detach() for weight in weights], masters)
        for master in masters:
            master.grad.zero_()

    return step


def _ours_under_deepspeed(
    settings: BenchmarkSettings, compiled: bool = False, json_name: str = "zero1", **sizes: int
) -> Callable[[], object]:
    import torch

    from data.sampling.batch_plan import BatchSettings
    from data.sampling.batches import Batch
    from launch import REPOSITORY
    from launch.ranks import processes
    from launch.ranks.rendezvous import meet
    from launch.training import deepspeed_config
    from launch.training.engine import initialize_communication
    from launch.training.pipeline import engine_for
    from launch.training.settings import RunSettings

    process = processes.find_process()
    processes.share_the_cores(process)
    processes.keep_freed_memory()
    initialize_communication(process, meet(process, 30, sys.argv), 600)
    path = str(REPOSITORY / "ds_configs" / f"{json_name}.json")
    batch = BatchSettings(settings.micro_batch_size * settings.accumulation, settings.micro_batch_size)
    run = RunSettings(model=_config(settings), batch=batch, train_steps=1, compile=compiled, **sizes)
    written = deepspeed_config.read_deepspeed_json(path)
    layout = deepspeed_config.layout_of(written, run, process.world_size)
    engine = engine_for(layout)(run, deepspeed_config.complete(written, path, run, layout, "cpu"), process, layout)
    number = 0

    def step() -> object:
        nonlocal number
        torch.manual_seed(number * process.world_size + layout.data_rank(process.rank))  # ranks that share a batch draw the same
        drawn = [_draw(settings) for _ in range(settings.accumulation // layout.data_parallel_size)]
        number += 1
        batches = [Batch(one[:, :-1], one[:, :-1].new_ones(one[:, :-1].shape), one[:, 1:]) for one in drawn]
        return engine.train_step(batches, 1e-4, number - 1)

    return step


CONTENDERS: dict[str, Callable[[BenchmarkSettings], Callable[[], object]]] = {
    "bare products": _bare_products,
    "transformers eager": lambda settings: _transformers(settings, False),
    "transformers compiled": lambda settings: _transformers(settings, True),
    "ours plain eager": lambda settings: _ours_in_a_plain_loop(settings, False),
    "ours plain compiled": lambda settings: _ours_in_a_plain_loop(settings, True),
    "ours ZeRO-1 eager": lambda settings: _ours_under_deepspeed(settings),
    "ours ZeRO-1 compiled": lambda settings: _ours_under_deepspeed(settings, compiled=True),
    "ours ZeRO-1 eager, two ranks": lambda settings: _ours_under_deepspeed(settings),
    "ours ZeRO-2 eager, two ranks": lambda settings: _ours_under_deepspeed(settings, json_name="zero2"),
    "ours ZeRO-3 eager, two ranks": lambda settings: _ours_under_deepspeed(settings, json_name="zero3"),
    "pipeline, two ranks": lambda settings: _ours_under_deepspeed(settings, json_name="pipeline_zero1"),
    "pipeline DualPipeV, two ranks": lambda settings: _ours_under_deepspeed(settings, json_name="pipeline_dualpipev"),
    "tensor parallel, two ranks": lambda settings: _ours_under_deepspeed(settings, tensor_parallel_size=2),
    "sequence parallel, two ranks": lambda settings: _ours_under_deepspeed(settings, sequence_parallel_size=2),
}


if __name__ == "__main__":
    run_door(main)
