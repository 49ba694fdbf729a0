"""The layouts that a run can have: every combination that the project's own rules allow, its memory and the time of its step."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from data.command_line import DEFAULT, UserError, add_origins, origin_of, replace
from launch import REPOSITORY
from launch.ranks.layout import Layout
from launch.training.deepspeed_config import complete, layout_of
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.planning.memory import Memory, run_memory
from launch.training.planning.settings import PlanSettings
from launch.training.planning.step_time import Cluster, StepTime, step_time, utilisation, work_of

LARGEST_MICRO_BATCH_TOKENS = 1 << 17
"""Tokens of the largest micro-batch that is tried, unless a sequence has more: beyond it no device gets faster."""
SAME_TIME = 1.01
"""Factor of the least time up to which the largest micro-batch is taken: larger products are rarely slower."""
_JSON = {"zero1": "zero1.json", "zero2": "zero2.json", "zero3": "zero3.json", "pipeline": "pipeline_zero1.json"}
_CHOICES = ("deepspeed", "pipeline_stages", "tensor_parallel_size", "sequence_parallel_size", "recompute", "batch.micro_batch_size")
"""Settings that are chosen here unless the user gives them."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout of a run with its memory and its time."""

    settings: PlanSettings
    """Settings of the run, with those that the layout decides."""
    layout: Layout
    zero_stage: int
    micro_batches: int
    """Micro-batches of a step on each data rank."""
    memory: Memory
    time: StepTime
    mfu: float
    """Model FLOPs utilisation, 1 is the peak."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all devices."""
        return self.settings.batch.global_batch_size * self.settings.model.sequence_length / self.time.total

    @property
    def chosen(self) -> dict[str, object]:
        """The settings that were chosen here, by name: not those that the user gave."""
        batch = {"batch.micro_batch_size": self.settings.batch.micro_batch_size}
        values = {name: getattr(self.settings, name) for name in _CHOICES if "." not in name} | batch
        defaults = {"pipeline_stages": 1, "tensor_parallel_size": 1, "sequence_parallel_size": 1, "recompute": False}
        return {name: value for name, value in values.items() if not _is_given(self.settings, name) and defaults.get(name) != value}


def candidates(settings: PlanSettings, cluster: Cluster) -> tuple[list[Candidate], list[str]]:
    """Return, for each layout and with and without recomputation, the fastest micro-batch that fits, fastest first.

    If no micro-batch of a layout fits, its candidate is the one with the least memory. The second value has the reasons why the project
    refuses other layouts.
    """
    found, reasons = [], dict[str, None]()
    for path, layout in _layouts(settings, cluster.gpus_per_node):
        try:
            merged, stage = _checked(settings, path, layout, cluster.gpus_per_node)
        except UserError as error:
            reasons[add_origins(str(error), settings)] = None
            continue
        for recompute in _values(settings, "recompute", (False, True)):
            sized = [_candidate(settings, path, layout, merged, stage, cluster, recompute, size) for size in _sizes(settings, layout)]
            fitting = [one for one in sized if one.memory.total <= cluster.device.memory_bytes]
            if fitting:
                fastest = min(one.time.total for one in fitting)
                found.append(max((one for one in fitting if one.time.total <= SAME_TIME * fastest), key=_micro_batch_size))
            elif sized:
                found.append(min(sized, key=lambda one: one.memory.total))
    return sorted(found, key=lambda one: (one.time.total, one.memory.total)), list(reasons)


def _micro_batch_size(one: Candidate) -> int:
    return one.settings.batch.micro_batch_size or 0


def _candidate(
    settings: PlanSettings, path: str, layout: Layout, merged: dict, stage: int, cluster: Cluster, recompute: bool, size: int
) -> Candidate:
    run = _with_layout(settings, path, layout, recompute, size)
    micro_batches = run.batch.global_batch_size // size // layout.data_parallel_size
    work = work_of(run.model, size, recompute, layout, stage, run.precision)
    time = step_time(work, micro_batches, layout, cluster)
    memory = run_memory(run, merged, layout, "cpu" if run.device == "cpu" else "cuda")
    mfu = utilisation(run.model, run.batch.global_batch_size, time.total, layout.world_size, cluster.device)
    return Candidate(run, layout, stage, micro_batches, memory, time, mfu)


def _layouts(settings: PlanSettings, gpus_per_node: int) -> Iterator[tuple[str, Layout]]:
    """Yield each JSON file with each grid of the devices; pipelines only with the JSON that is made for them, and with equal stages."""
    powers = [1 << n for n in range(settings.gpus.bit_length()) if settings.gpus % (1 << n) == 0]
    inside = [size for size in powers if size <= gpus_per_node]
    stages = _values(settings, "pipeline_stages", [size for size in powers if settings.model.total_blocks % size == 0])
    tensor, sequence = (_values(settings, f"{name}_parallel_size", inside) for name in ("tensor", "sequence"))
    for pipeline, size, parts in itertools.product(stages, tensor, sequence):
        if settings.gpus % (pipeline * size * parts) == 0:
            names = ("pipeline",) if pipeline > 1 else ("zero1", "zero2", "zero3")
            paths = [str(REPOSITORY / "ds_configs" / _JSON[name]) for name in names]
            yield from ((path, Layout(settings.gpus, pipeline, size, parts)) for path in _values(settings, "deepspeed", paths))


def _checked(settings: PlanSettings, path: str, layout: Layout, gpus_per_node: int) -> tuple[dict, int]:
    """Return DeepSpeed's JSON as the run would receive it, and its ZeRO stage. Raises UserError if the project does not allow it."""
    settings.batch.accumulation_steps(layout.data_parallel_size)
    run = _with_layout(settings, path, layout, settings.recompute, settings.batch.micro_batch_size or 1)
    written = read_deepspeed_json(path)
    assert layout_of(written, run, settings.gpus) == layout
    merged = complete(written, path, run, layout, "cpu" if settings.device == "cpu" else "cuda", gpus_per_node)
    return merged, merged["zero_optimization"]["stage"]


def _with_layout(settings: PlanSettings, path: str, layout: Layout, recompute: bool, size: int) -> PlanSettings:
    return replace(
        settings,
        deepspeed=path,
        pipeline_stages=layout.pipeline_stages,
        tensor_parallel_size=layout.tensor_parallel_size,
        sequence_parallel_size=layout.sequence_parallel_size,
        recompute=recompute,
        batch=dataclasses.replace(settings.batch, micro_batch_size=size),
    )


def _sizes(settings: PlanSettings, layout: Layout) -> list[int]:
    """Return the micro-batch sizes to try: the divisors of a data rank's share, up to LARGEST_MICRO_BATCH_TOKENS."""
    if settings.batch.micro_batch_size is not None:
        return [settings.batch.micro_batch_size]
    share = settings.batch.global_batch_size // layout.data_parallel_size
    most = max(1, LARGEST_MICRO_BATCH_TOKENS // settings.model.sequence_length)
    return [size for size in range(1, min(share, most) + 1) if share % size == 0]


def _values(settings: PlanSettings, name: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of a setting to try: only that of the user, if there is one."""
    return (getattr(settings, name),) if _is_given(settings, name) else values


def _is_given(settings: PlanSettings, name: str) -> bool:
    return origin_of(settings, name) not in (None, DEFAULT)
