"""The pass that compresses: for each block it gathers statistics, changes weights, writes them, and runs the changed block."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.command_line import UserError
from launch.compressing.layer_store import DequantizedWeights, LayerStore
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
class BlockMethod:
    """Functions that compress the linear layers of a block."""

    change: Callable[[int, str, Tensor, InputStatistics | None], Changed | None]
    """(index of the block, name in it, weight [out, in], statistics of its inputs) -> the changed weight; None: it stays unchanged."""
    scales: Callable[[int, Group, list[Tensor], InputStatistics], Tensor | None] = lambda block, group, weights, statistics: None
    """Divisors of a group's inputs, by which the columns of its weights are multiplied before the change.  -> [in], or None for none"""
    watch: Callable[[Step], contextlib.AbstractContextManager] | None = None
    """Context that is entered for each changed layer before the head while the calibration samples pass through it."""


def compress(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    method: BlockMethod,
    samples: Sequence[Stream],
    store: LayerStore,
    workers: Workers,
    stored_as: torch.dtype,
    log: Callable[[str], object],
) -> None:
    """Pass this rank's calibration samples through the network, and write every layer to `store`, after the finished ones.

    All weights are rounded to `stored_as` first: a weight that was trained in that type is then written as it was trained. One
    layer and the samples' hidden states are in memory at a time. Raises UserError if the disk is full, or if the ranks do not see the
    same disk; finished layers are kept, and the same call resumes.
    """
    done = _count_finished_layers(store, workers)
    if done:
        log(f"Resuming after layer {done} of an earlier start, from {store.folder}.")
    watch, is_calibrated = method.watch or contextlib.nullcontext, any(workers.all_gather(bool(samples)))
    streams, pass_start, blocks_done, written = list(samples), time.perf_counter(), 0, set(store)
    index = -1
    for step in walk(config, _ResumedWeights(store, state, stored_as), workers.device):
        index += 1  # enumerate() would keep a step in memory while the next one is read
        if index >= done:
            tensors: dict[str, Tensor | Quantized] = {}
            layer_report: dict[str, Any] = {}
            if step.block is not None:
                start = time.perf_counter()
                statistics = _gather_statistics(step, streams, workers) if is_calibrated else {}
                tensors, linears = _compress_block(step, method, statistics, workers, stored_as)
                seconds, blocks_done = time.perf_counter() - start, blocks_done + 1
                layer_report = {"block": step.block, "seconds": seconds, "linears": [dataclasses.asdict(one) for one in linears]}
                seconds_left = (time.perf_counter() - pass_start) / blocks_done * (config.total_blocks - step.block - 1)
                log(_progress_line(step.block, config.total_blocks, linears, seconds, seconds_left))
            unchanged = {name: parameter for name, parameter in step.parameters.items() if name not in tensors and name not in written}
            tensors |= {name: parameter.to("cpu", stored_as) for name, parameter in unchanged.items()}
            workers.run_on_rank0(functools.partial(store.write, index, tensors, layer_report))
            _load_written(step, tensors)
            written |= set(tensors)
            del tensors, unchanged
        is_head = step.layer.module is Head or step.layer.forward is as_head
        if is_calibrated and (step.blocks_before < config.total_blocks or (method.watch is not None and not is_head)):
            with watch(step):
                for number, stream in enumerate(streams):
                    streams[number] = step(stream)
        del step  # before the next one is read
    _count_finished_layers(store, workers)


def _load_written(step: Step, tensors: Mapping[str, "Tensor | Quantized"]) -> None:
    """Replace the layer's weights by the written ones, dequantized as other software does it."""
    for name, tensor in tensors.items():
        parameter = step.module.get_parameter(name.removeprefix(f"{step.name}."))
        parameter.data = (tensor.weight() if isinstance(tensor, Quantized) else tensor.float()).to(parameter.device)


def _count_finished_layers(store: LayerStore, workers: Workers) -> int:
    """Return the number of finished layers. Raises UserError if the ranks find different numbers."""
    count = workers.run_on_rank0(store.find_finished_layers)
    if count and any(seen != count for seen in workers.all_gather(store.find_finished_layers())):
        raise UserError(f"{store.folder} does not have the same content on all ranks. Give an --output on a disk that all machines share.")
    return count


def gather_each_block(
    config: ModelConfig, state: Mapping[str, Tensor], samples: Sequence[Stream], workers: Workers
) -> Iterator[tuple[Step, dict[Group, InputStatistics]]]:
    """Yield each block of the unchanged network with the statistics of all ranks' samples."""
    streams = list(samples)
    for step in walk(config, state, workers.device):
        if step.block is not None:
            yield step, _gather_statistics(step, streams, workers)
        if step.blocks_before < config.total_blocks:
            for number, stream in enumerate(streams):
                streams[number] = step(stream)
        del step


class _ResumedWeights(Mapping[str, Tensor]):
    """The weights of finished layers as they are stored, and the model's own weights of the others, rounded as they will be stored."""

    def __init__(self, store: LayerStore, state: Mapping[str, Tensor], stored_as: torch.dtype) -> None:
        self._changed, self._state, self._stored_as = DequantizedWeights(store), state, stored_as

    def __getitem__(self, name: str) -> Tensor:
        return self._changed[name] if name in self._changed else self._state[name].to(self._stored_as)

    def __iter__(self):
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _gather_statistics(step: Step, samples: Sequence[Stream], workers: Workers) -> dict[Group, InputStatistics]:
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


def _compress_block(
    step: Step, method: BlockMethod, statistics: dict[Group, InputStatistics], workers: Workers, stored_as: torch.dtype
) -> tuple[dict[str, "Tensor | Quantized"], list[LinearReport]]:
    """Return the block's changed matrices by full name, and their reports. Each rank changes some of them; `statistics` is emptied."""
    block, number = step.module, step.block
    assert isinstance(block, Block) and number is not None
    for group in statistics:
        weights = (block.get_parameter(f"{linear}.weight").data for linear in group.linears)
        scales = method.scales(number, group, list(weights), statistics[group])
        scales = workers.broadcast(None if scales is None else scales.cpu())  # a search may find other scales on another machine
        if scales is not None:
            scales = scales.to(workers.device)
            _fold_scales(block, group, scales)
            statistics[group] = statistics[group].divided_by(scales)
    linears = [linear for group in groups_of(block) for linear in group.linears]
    results: dict[str, tuple[Tensor | Quantized, LinearReport] | None] = {}
    for group in groups_of(block):
        inputs = statistics.pop(group) if group in statistics else None
        for linear in group.linears:
            if workers.owns(linears.index(linear)):
                results[linear] = _change_matrix(step, linear, method, inputs, stored_as)
    tensors, reports = {}, []
    for index, linear in enumerate(linears):
        result = workers.broadcast(results.pop(linear, None), workers.owner_of(index))
        if result is not None:
            tensors[f"{step.name}.{linear}.weight"], report = result
            reports.append(report)
    return tensors, reports


def _change_matrix(
    step: Step, linear: str, method: BlockMethod, statistics: InputStatistics | None, stored_as: torch.dtype
) -> tuple["Tensor | Quantized", LinearReport] | None:
    """Return a matrix as it will be stored, on the CPU, and its report; None if it stays unchanged."""
    assert step.block is not None
    weight = step.module.get_parameter(f"{linear}.weight").data
    changed = method.change(step.block, linear, weight, statistics)
    if changed is None:
        return None
    error = None if statistics is None else output_error(changed.weight - weight, weight, statistics)
    stored = changed.weight.to("cpu", stored_as) if changed.quantized is None else _on_cpu(changed.quantized)
    return stored, LinearReport(f"{step.name}.{linear}", step.block, linear, error, changed.damping, changed.notes)


def _on_cpu(quantized: Quantized) -> Quantized:
    moved: dict[str, Any] = {name: piece.cpu() for name, piece in vars(quantized).items() if isinstance(piece, Tensor)}
    return dataclasses.replace(quantized, **moved)


def _fold_scales(block: Block, group: Group, scales: Tensor) -> None:
    """Divide the outputs of the layer before by the scales and multiply columns by them; the network computes the same."""
    assert group.producer is not None
    for parameter in block.get_submodule(group.producer).parameters():
        parameter.data = parameter.data / (scales if parameter.ndim == 1 else scales[:, None])
    for linear in group.linears:
        weight = block.get_parameter(f"{linear}.weight")
        weight.data = weight.data * scales


def _progress_line(block: int, num_blocks: int, linears: Sequence[LinearReport], seconds: float, seconds_left: float) -> str:
    errors = [one.error for one in linears if one.error is not None]
    error = f" | output error: {min(errors):.4f} to {max(errors):.4f}" if errors else ""
    notes = "".join(f"\n  {one.linear}: {note}" for one in linears for note in one.notes)
    minutes, seconds_rest = divmod(round(seconds_left), 60)
    memory = f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
    block_text = f"block {block + 1} of {num_blocks} | {len(linears)} matrices{error}"
    return f"{block_text} | {seconds:.1f} s | {memory} | left: {minutes}:{seconds_rest:02d}{notes}"
