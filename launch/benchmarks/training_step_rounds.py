"""The rounds of launch/benchmarks/training_step.py: start each contender in its own processes, collect the seconds, print the tables."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launch import REPOSITORY
from launch.benchmarks.measurement import Spread, describe_machine
from launch.benchmarks.settings import TrainingStepSettings
from launch.ranks.launchers import free_port

_SCRIPT = REPOSITORY / "launch" / "benchmarks" / "training_step.py"


def run(contenders: Mapping[str, str], settings: TrainingStepSettings, arguments: Sequence[str]) -> int:
    """Measure these contenders in turn; print their times, their precision, and where the time of each rank goes."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, list[dict]] = {}
    for number in range(settings.rounds):
        for name in contenders:
            print(f"round {number + 1}/{settings.rounds}: {name} ...", file=sys.stderr, flush=True)
            last[name] = ranks = _start(name, arguments)
            wall[name] += ranks[0]["wall"]
            cpu[name] += [sum(seconds) for seconds in zip(*(rank["cpu"] for rank in ranks), strict=True)]
    _print_times(contenders, wall, cpu, settings.micro_batch_size * settings.accumulation * settings.sequence_length)
    for name, ranks in last.items():
        if ranks[0]["parts"]:
            _print_parts(name, [rank["parts"] for rank in ranks], settings.accumulation)
    threads = sorted({rank["threads"] * len(ranks) for ranks in last.values() for rank in ranks})
    print(f"\n{describe_machine(f'{max(threads)} threads for each contender')}")
    return 0


def _print_times(contenders: Mapping[str, str], wall: dict[str, list[float]], cpu: dict[str, list[float]], tokens: int) -> None:
    """Print a row for each contender: wall and CPU seconds per step, and both relative to the bare products."""
    bare = {
        kind: statistics.median(seconds["bare products"]) for kind, seconds in (("wall", wall), ("cpu", cpu)) if "bare products" in seconds
    }
    print(f"\n{'':34}{'s/step':>8}{'least':>8}{'most':>8}{'CPU s':>8}{'tokens/s':>10}{'of bare':>9}{'by CPU':>8}  weights and activations")
    for name, precision in contenders.items():
        seconds, computing = Spread.of(wall[name]), statistics.median(cpu[name])
        shares = f"{bare['wall'] / seconds.median:9.2f}{bare['cpu'] / computing:8.2f}" if bare else f"{'':17}"
        row = f"{seconds.median:8.3f}{seconds.least:8.3f}{seconds.most:8.3f}{computing:8.3f}{tokens / seconds.median:10,.0f}"
        print(f"{name:34}{row}{shares}  {precision}")


def _start(name: str, arguments: Sequence[str]) -> list[dict]:
    """Run a contender on its ranks, and return what each printed."""
    world_size = 2 if name.endswith("two ranks") else 1
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"DS_ACCELERATOR": "cpu"}
    if world_size > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    command = [sys.executable, str(_SCRIPT), *arguments, "--contender", name]
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


def _print_parts(name: str, ranks: list[dict[str, float]], micro_batches: int) -> None:
    """Print where the time of each rank went in the last round; for a pipeline also why it waited."""
    print(f"\n{name + ', last round':40}" + "".join(f"{part:>11}" for part in ranks[0]) + "   (seconds per step)")
    for number, parts in enumerate(ranks):
        print(f"{f'    rank {number}':40}" + "".join(f"{parts[part]:11.3f}" for part in ranks[0]))
    if name == "pipeline, two ranks":
        step = sum(ranks[0].values())
        busy = [sum(parts.values()) - parts["passing"] for parts in ranks]
        mean = sum(busy) / len(busy)
        equal = mean * (1 + (len(ranks) - 1) / micro_batches)
        unequal = _one_forward_one_backward([(parts["forward"], parts["backward"]) for parts in ranks], micro_batches)
        unequal += max(parts["optimizer"] for parts in ranks)
        rows = {
            "work": mean,
            "bubble of equal stages": equal - mean,
            "unequal stages": unequal - equal,
            "sending and the rest": step - unequal,
        }
        print("    of a step: " + ", ".join(f"{what} {seconds / step:.0%}" for what, seconds in rows.items()))


def _one_forward_one_backward(stages: list[tuple[float, float]], micro_batches: int) -> float:
    """Return the seconds of a 1F1B pipeline, given each stage's seconds for all forward and all backward passes, if sending is free."""
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
            sender = stage - 1 if kind == "forward" else stage + 1
            if not order or (0 <= sender < len(stages) and (kind, sender, number) not in done):
                continue
            seconds = stages[stage][kind == "backward"] / micro_batches
            clocks[stage] = done[kind, stage, number] = max(clocks[stage], done.get((kind, sender, number), 0.0)) + seconds
            order.pop(0)
    return max(clocks)
