"""The walk that compresses: block by block gather statistics, change weights, write them, and pass on what the changed block says."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from launch.compressing.comparison import Comparison, compared
from launch.compressing.parts import Parts, Weights
from launch.compressing.report import LinearReport
from launch.compressing.workers import Workers
from launch.training.processes import peak_memory_bytes
from model.compression.grids import Quantized
from model.compression.statistics import Gatherer, Group, InputStatistics, groups_of, output_error
from model.compression.sweep import Changed
from model.config import ModelConfig
from model.layers import Block, Passed
from model.walk import Step, outputs, walk

Watch = Callable[[Step], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What is done to the linear layers of a block."""

    change: Callable[[int, str, Tensor, InputStatistics | None], Changed | None]
    """(number of the block, name in it, weight [out, in], statistics of its inputs) -> what it becomes; None: it stays."""
    scales: Callable[[int, Group, list[Tensor], InputStatistics], Tensor | None] = lambda block, group, weights, statistics: None
    """What a group's inputs are divided by, and its weights' columns multiplied, before that.  -> [in], or None for nothing"""
    watch: Watch = contextlib.nullcontext
    """Entered for each layer while the calibration samples pass through it, changed."""


def compress(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    treatment: Treatment,
    samples: Sequence[Passed],
    parts: Parts,
    workers: Workers,
    stored_as: torch.dtype,
    say: Callable[[str], object],
) -> None:
    """Walk the network with this rank's calibration samples, and write every layer to `parts`, behind what is there already.

    Weights that stay as they are are rounded to `stored_as`. One layer is in memory at a time, beside the samples' hidden states.
    Raises UserError where a weight is not finite or the disk is full: what was done is kept, and the same call goes on behind it.
    """
    done = workers.tell(parts.open() if workers.is_first else None)
    if not workers.is_first:
        parts.find()
    if done:
        say(f"Going on behind layer {done} of an earlier start, from {parts.folder}.")
    passed, begun, blocks_done = list(samples), time.perf_counter(), 0
    for place, step in enumerate(walk(config, _Continued(parts, state), workers.device)):
        if place >= done:
            tensors, told = {name: parameter.to(stored_as) for name, parameter in step.parameters.items()}, {}
            if step.block is not None:
                start = time.perf_counter()
                statistics = _gather(step, passed, workers) if samples else {}
                changed, linears = _treat(step, treatment, statistics, workers, stored_as)
                tensors |= changed
                seconds, blocks_done = time.perf_counter() - start, blocks_done + 1
                told = {"block": step.block, "seconds": seconds, "linears": [dataclasses.asdict(one) for one in linears]}
                left = (time.perf_counter() - begun) / blocks_done * (config.total_blocks - step.block - 1)
                say(_line(step.block, config.total_blocks, linears, seconds, left))
            if workers.is_first:
                parts.write(place, tensors, told)
            weights = {name: tensor.weight() if isinstance(tensor, Quantized) else tensor.float() for name, tensor in tensors.items()}
            step.module.load_state_dict({name.removeprefix(f"{step.name}."): weight for name, weight in weights.items()}, assign=True)
            step.module.requires_grad_(False)
        if samples and step.blocks_before < config.total_blocks:
            with treatment.watch(step):
                for number, sample in enumerate(passed):
                    passed[number] = step(sample)


def gathered(
    config: ModelConfig, state: Mapping[str, Tensor], samples: Sequence[Passed], workers: Workers
) -> Iterator[tuple[Step, dict[Group, InputStatistics]]]:
    """Each block of the network as it is, with the statistics of all ranks' samples."""
    passed = list(samples)
    for step in walk(config, state, workers.device):
        if step.block is not None:
            yield step, _gather(step, passed, workers)
        if step.blocks_before < config.total_blocks:
            for number, sample in enumerate(passed):
                passed[number] = step(sample)


class _Continued(Mapping[str, Tensor]):
    """What an earlier start has changed, and before it the model's own."""

    def __init__(self, parts: Parts, state: Mapping[str, Tensor]) -> None:
        self._changed, self._state = Weights(parts), state

    def __getitem__(self, name: str) -> Tensor:
        return self._changed[name] if name in self._changed else self._state[name]

    def __iter__(self):
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _gather(step: Step, samples: Sequence[Passed], workers: Workers) -> dict[Group, InputStatistics]:
    """Of all ranks' samples, on every rank."""
    assert isinstance(step.module, Block)
    with Gatherer(step.module) as gatherer:
        for sample in samples:
            gatherer.counted = sample[1] != 0
            gatherer.counted_in_source = sample[3] != 0 if len(sample) > 3 else None
            step(sample)
    statistics = {}
    for group, sums in gatherer.sums():
        workers.add_up([sums.tokens, sums.second_moment, sums.magnitude])
        workers.take_largest(sums.largest)
        statistics[group] = sums.statistics()
    return statistics


def _treat(
    step: Step, treatment: Treatment, statistics: dict[Group, InputStatistics], workers: Workers, stored_as: torch.dtype
) -> tuple[dict[str, "Tensor | Quantized"], list[LinearReport]]:
    """The block's changed tensors by their whole names, and what is told of them. Each rank changes its share of the matrices."""
    block, number = step.module, step.block
    assert isinstance(block, Block) and number is not None
    for name, parameter in step.parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite: the model is damaged, or its training has failed.")
    weight_of = lambda linear: block.get_submodule(linear).weight.data  # noqa: E731
    moved = set()
    for group in statistics:
        scales = treatment.scales(number, group, [weight_of(linear) for linear in group.linears], statistics[group])
        if scales is not None:
            moved |= _fold(block, group, scales)
            statistics[group] = statistics[group].divided_by(scales)
    jobs = [(group, linear) for group in groups_of(block) for linear in group.linears]
    results: dict[str, tuple[Changed, float | None] | None] = {}
    for job, (group, linear) in enumerate(jobs):
        if workers.has(job):
            weight, known = weight_of(linear), statistics.get(group)
            changed = treatment.change(number, linear, weight, known)
            error = None if changed is None or known is None else output_error(changed.weight - weight, weight, known)
            results[linear] = None if changed is None else (changed, error)
    tensors: dict[str, Tensor | Quantized] = {f"{step.name}.{name}": block.get_parameter(name).data.to(stored_as) for name in moved}
    told = []
    for job, (_, linear) in enumerate(jobs):
        result = workers.tell(results.pop(linear, None), job)
        if result is not None:
            changed, error = result
            whole = f"{step.name}.{linear}"
            tensors[f"{whole}.weight"] = changed.weight.to(stored_as) if changed.quantized is None else changed.quantized
            told.append(LinearReport(whole, number, linear, error, changed.damping, changed.notes))
    return tensors, told


def _fold(block: Block, group: Group, scales: Tensor) -> set[str]:
    """Divide the outputs of what comes before by the scales and multiply columns by them: the same network. The parameters' names."""
    assert group.producer is not None
    producer, changed = block.get_submodule(group.producer), set()
    for name, parameter in producer.named_parameters():
        parameter.data.div_(scales if parameter.ndim == 1 else scales[:, None])
        changed.add(f"{group.producer}.{name}")
    for linear in group.linears:
        block.get_submodule(linear).weight.data.mul_(scales)
        changed.add(f"{linear}.weight")
    return changed


def _line(block: int, num_blocks: int, linears: Sequence[LinearReport], seconds: float, left: float) -> str:
    errors = [one.error for one in linears if one.error is not None]
    error = f" | error of outputs: {min(errors):.4f} to {max(errors):.4f}" if errors else ""
    notes = "".join(f"\n  {one.linear}: {note}" for one in linears for note in one.notes)
    minutes, rest = divmod(round(left), 60)
    memory = f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
    head = f"block {block + 1} of {num_blocks} | {len(linears)} matrices{error}"
    return f"{head} | {seconds:.1f} s | {memory} | left: {minutes}:{rest:02d}{notes}"


@dataclasses.dataclass(frozen=True)
class Side:
    """A network whose outputs are compared: its shape, its weights, and how they are stored."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    prepare: Callable[[Step], object] = lambda step: None
    """As model.walk.outputs has it."""


def compare(before: Side, after: Side, batches: Sequence, workers: Workers) -> Comparison:
    """Two networks on this rank's share of the batches, summed over the ranks. Each streams through memory layer by layer."""
    from launch.compressing.samples import first_inputs

    samples = first_inputs(batches, workers.device)
    total = Comparison()
    sides = [outputs(side.config, side.state, samples, workers.device, prepare=side.prepare) for side in (before, after)]
    for batch, old, new in zip(batches, *sides, strict=True):
        total += compared(*answers(old, new, batch.map(lambda tensor: tensor.to(workers.device))))
    return functools.reduce(Comparison.__add__, workers.gather(total))


def answers(old, new, batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both and what was asked for: of tokens, or, where none are predicted, of classes.  -> 2 x [.., choices], [..]"""
    if isinstance(old, tuple):
        if batch.classes is not None and not (batch.targets != -100).any():
            return old[1], new[1], batch.classes
        old, new = old[0], new[0]
    return old, new, batch.targets
