"""The pass that compresses: for each block gather statistics, change weights, write them, and run the changed block for the next one."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.command_line import UserError
from launch.compressing.layer_store import Parts, Weights
from launch.compressing.report import LinearReport
from launch.compressing.workers import Workers
from launch.ranks.processes import peak_memory_bytes
from model.compression.grids import Quantized
from model.compression.quantization import Changed
from model.compression.statistics import Gatherer, Group, InputStatistics, groups_of, output_error
from model.config import ModelConfig
from model.layers import Head, Stream
from model.transformer import Block, as_head
from model.walk import Step, walk


@dataclasses.dataclass(frozen=True)
class Treatment:
    """The changes to make in the linear layers of a block."""

    change: Callable[[int, str, Tensor, InputStatistics | None], Changed | None]
    """(index of the block, name in it, weight [out, in], statistics of its inputs) -> the changed weight; None: it stays unchanged."""
    scales: Callable[[int, Group, list[Tensor], InputStatistics], Tensor | None] = lambda block, group, weights, statistics: None
    """Divisors of a group's inputs, by which the columns of its weights are multiplied before the change.  -> [in], or None for none"""
    watch: Callable[[Step], contextlib.AbstractContextManager] | None = None
    """Context that is entered for each changed layer before the head while the calibration samples pass through it."""


def compress(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    treatment: Treatment,
    samples: Sequence[Stream],
    parts: Parts,
    workers: Workers,
    stored_as: torch.dtype,
    say: Callable[[str], object],
) -> None:
    """Pass this rank's calibration samples through the network, and write every layer to `parts`, after those that are there already.

    All weights are rounded to `stored_as` first: a weight that was trained rounded in that type is then written as it was trained. One
    layer and the samples' hidden states are in memory at a time. Raises UserError if the disk is full, or if the ranks do not see the
    same disk; finished layers are kept, and the same call resumes.
    """
    done = _layers_in(parts, workers)
    if done:
        say(f"Resuming after layer {done} of an earlier start, from {parts.folder}.")
    watch, is_calibrated = treatment.watch or contextlib.nullcontext, any(workers.all_gather(bool(samples)))
    passed, begun, blocks_done, written = list(samples), time.perf_counter(), 0, set(parts)
    place = -1
    for step in walk(config, _Continued(parts, state, stored_as), workers.device):
        place += 1  # enumerate() would keep a step while the next one is read
        if place >= done:
            tensors: dict[str, Tensor | Quantized] = {}
            told: dict[str, Any] = {}
            if step.block is not None:
                start = time.perf_counter()
                tensors, linears = _treat(step, treatment, _gather(step, passed, workers) if is_calibrated else {}, workers, stored_as)
                seconds, blocks_done = time.perf_counter() - start, blocks_done + 1
                told = {"block": step.block, "seconds": seconds, "linears": [dataclasses.asdict(one) for one in linears]}
                left = (time.perf_counter() - begun) / blocks_done * (config.total_blocks - step.block - 1)
                say(_line(step.block, config.total_blocks, linears, seconds, left))
            unchanged = {name: parameter for name, parameter in step.parameters.items() if name not in tensors and name not in written}
            tensors |= {name: parameter.to("cpu", stored_as) for name, parameter in unchanged.items()}
            workers.run_on_rank0(functools.partial(parts.write, place, tensors, told))
            _put(step, tensors)
            written |= set(tensors)
            del tensors, unchanged
        is_head = step.layer.module is Head or step.layer.forward is as_head
        if is_calibrated and (step.blocks_before < config.total_blocks or (treatment.watch is not None and not is_head)):
            with watch(step):
                for number, sample in enumerate(passed):
                    passed[number] = step(sample)
        del step  # before the next one is read
    _layers_in(parts, workers)


def _put(step: Step, tensors: Mapping[str, "Tensor | Quantized"]) -> None:
    """Put the written weights into the layer, as software that loads them computes with them."""
    for name, tensor in tensors.items():
        parameter = step.module.get_parameter(name.removeprefix(f"{step.name}."))
        parameter.data = (tensor.weight() if isinstance(tensor, Quantized) else tensor.float()).to(parameter.device)


def _layers_in(parts: Parts, workers: Workers) -> int:
    """Return the number of finished layers. Raises UserError if a rank sees another number."""
    count = workers.run_on_rank0(parts.find)
    if count and any(seen != count for seen in workers.all_gather(parts.find())):
        raise UserError(f"{parts.folder} is not the same folder for all ranks. --output must be on a disk that all machines share.")
    return count


def gathered(
    config: ModelConfig, state: Mapping[str, Tensor], samples: Sequence[Stream], workers: Workers
) -> Iterator[tuple[Step, dict[Group, InputStatistics]]]:
    """Yield each block of the unchanged network with the statistics of all ranks' samples."""
    passed = list(samples)
    for step in walk(config, state, workers.device):
        if step.block is not None:
            yield step, _gather(step, passed, workers)
        if step.blocks_before < config.total_blocks:
            for number, sample in enumerate(passed):
                passed[number] = step(sample)
        del step


class _Continued(Mapping[str, Tensor]):
    """Weights that an earlier start has changed, and else the model's own, rounded as they will be stored."""

    def __init__(self, parts: Parts, state: Mapping[str, Tensor], stored_as: torch.dtype) -> None:
        self._changed, self._state, self._stored_as = Weights(parts), state, stored_as

    def __getitem__(self, name: str) -> Tensor:
        return self._changed[name] if name in self._changed else self._state[name].to(self._stored_as)

    def __iter__(self):
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _gather(step: Step, samples: Sequence[Stream], workers: Workers) -> dict[Group, InputStatistics]:
    """Return the statistics of all ranks' samples, on every rank."""
    assert isinstance(step.module, Block)
    with Gatherer(step.module) as gatherer:
        for sample in samples:
            gatherer.counted = sample.segments != 0
            gatherer.counted_in_source = None if sample.source_segments is None else sample.source_segments != 0
            step(sample)
    statistics = {}
    for group, sums in gatherer.sums():
        workers.sum_in_place([sums.tokens, sums.second_moment, sums.magnitude])
        workers.max_in_place(sums.largest)
        statistics[group] = sums.statistics()
    return statistics


def _treat(
    step: Step, treatment: Treatment, statistics: dict[Group, InputStatistics], workers: Workers, stored_as: torch.dtype
) -> tuple[dict[str, "Tensor | Quantized"], list[LinearReport]]:
    """Return the block's changed matrices by full name, and their reports. Each rank changes some of them; `statistics` is emptied."""
    block, number = step.module, step.block
    assert isinstance(block, Block) and number is not None
    for group, known in statistics.items():
        scales = treatment.scales(number, group, [block.get_submodule(linear).weight.data for linear in group.linears], known)
        scales = workers.broadcast(None if scales is None else scales.cpu())  # a search may have another result on another machine
        if scales is not None:
            scales = scales.to(workers.device)
            _fold(block, group, scales)
            statistics[group] = known.divided_by(scales)
    linears = [linear for group in groups_of(block) for linear in group.linears]
    results: dict[str, tuple[Tensor | Quantized, LinearReport] | None] = {}
    for group in groups_of(block):
        known = statistics.pop(group, None)
        for linear in group.linears:
            if workers.owns(linears.index(linear)):
                results[linear] = _changed(step, linear, treatment, known, stored_as)
    tensors, told = {}, []
    for job, linear in enumerate(linears):
        result = workers.broadcast(results.pop(linear, None), workers.owner_of(job))
        if result is not None:
            tensors[f"{step.name}.{linear}.weight"], report = result
            told.append(report)
    return tensors, told


def _changed(
    step: Step, linear: str, treatment: Treatment, statistics: InputStatistics | None, stored_as: torch.dtype
) -> tuple["Tensor | Quantized", LinearReport] | None:
    """Return a matrix as it will be stored, on the CPU, and its report; None if it stays unchanged."""
    assert step.block is not None
    weight = step.module.get_submodule(linear).weight.data
    changed = treatment.change(step.block, linear, weight, statistics)
    if changed is None:
        return None
    error = None if statistics is None else output_error(changed.weight - weight, weight, statistics)
    stored = changed.weight.to("cpu", stored_as) if changed.quantized is None else _on_cpu(changed.quantized)
    return stored, LinearReport(f"{step.name}.{linear}", step.block, linear, error, changed.damping, changed.notes)


def _on_cpu(quantized: Quantized) -> Quantized:
    moved = {name: piece.cpu() for name, piece in vars(quantized).items() if isinstance(piece, Tensor)}
    return dataclasses.replace(quantized, **moved)


def _fold(block: Block, group: Group, scales: Tensor) -> None:
    """Divide the outputs of the layer before by the scales and multiply columns by them; the network computes the same."""
    assert group.producer is not None
    for parameter in block.get_submodule(group.producer).parameters():
        parameter.data = parameter.data / (scales if parameter.ndim == 1 else scales[:, None])
    for linear in group.linears:
        weight = block.get_submodule(linear).weight
        weight.data = weight.data * scales


def _line(block: int, num_blocks: int, linears: Sequence[LinearReport], seconds: float, left: float) -> str:
    errors = [one.error for one in linears if one.error is not None]
    error = f" | error of outputs: {min(errors):.4f} to {max(errors):.4f}" if errors else ""
    notes = "".join(f"\n  {one.linear}: {note}" for one in linears for note in one.notes)
    minutes, rest = divmod(round(left), 60)
    memory = f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
    head = f"block {block + 1} of {num_blocks} | {len(linears)} matrices{error}"
    return f"{head} | {seconds:.1f} s | {memory} | left: {minutes}:{rest:02d}{notes}"
