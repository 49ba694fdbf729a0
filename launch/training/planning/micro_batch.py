"""The largest micro-batch that fits a run's device, and the refusal of a run that cannot fit."""

import dataclasses
from collections.abc import Iterator

import torch

from data.command_line import UserError, describe
from data.sampling.batch_plan import BatchPlan
from launch import REPOSITORY
from launch.ranks.layout import Layout
from launch.training.deepspeed_config import complete
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.planning.devices import machine_bytes
from launch.training.planning.memory import DeviceType, Memory, run_memory
from launch.training.settings import RunSettings, share_the_batch

MOST_TOKENS_ON_CPU = 8192
"""Tokens of the largest default micro-batch on a CPU. Larger ones are no faster there, and take memory."""
FITS = 0.94
"""Share of a GPU's memory that a default micro-batch may fill. The rest is a reserve for errors of the estimate."""
HOPELESS_ON_CPU = 2.0
"""A run that needs more than this multiple of a machine's memory is refused. Swap and other processes make it less certain than a GPU's."""


def device_bytes(device: DeviceType, local_ranks: int) -> float:
    """Return the memory that a rank has: of its GPU, or its share of the machine. Infinite if there is no GPU, which is reported later."""
    if device == "cpu":
        return machine_bytes() / local_ranks
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.device_count() else float("inf")


def share_and_complete(
    settings: RunSettings,
    written: dict,
    layout: Layout,
    device: DeviceType,
    memory_bytes: float,
    ranks_per_node: int,
    batches: BatchPlan,
    first_step: int,
) -> tuple[RunSettings, dict]:
    """Return the settings with a micro-batch that fits, if none was given, and DeepSpeed's completed JSON.

    `batches` and `first_step` are those of a run that resumes. Raises UserError as share_the_batch and complete do.
    """

    def shared(most: int | None) -> tuple[RunSettings, dict]:
        """Return both for a default micro-batch of at most `most` sequences."""
        chosen = share_the_batch(settings, layout, batches, first_step, most)
        smallest = min(batches.sizes_from(first_step))
        return chosen, complete(written, settings.deepspeed, chosen, layout, device, ranks_per_node, smallest)

    if device == "cpu":
        return shared(max(1, MOST_TOKENS_ON_CPU // settings.model.sequence_length))
    chosen, merged = shared(None)
    assert chosen.batch.micro_batch_size is not None
    if settings.batch.micro_batch_size is None:
        most = largest_micro_batch(chosen, merged, layout, memory_bytes)
        if most < chosen.batch.micro_batch_size:
            return shared(most)
    return chosen, merged


def largest_micro_batch(settings: RunSettings, merged: dict, layout: Layout, memory_bytes: float) -> int:
    """Return the largest number of sequences of a micro-batch that fits a GPU, up to that of the settings and at least 1."""
    fits = lambda size: _memory(settings, merged, layout, "cuda", size).total <= FITS * memory_bytes  # noqa: E731
    below, above = 1, (settings.batch.micro_batch_size or 1) + 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def refuse_what_cannot_fit(settings: RunSettings, merged: dict, layout: Layout, device: DeviceType, memory_bytes: float) -> None:
    """Raise UserError if a run cannot fit the memory that each rank has, and name what would fit."""
    memory = run_memory(settings, merged, layout, device)
    if memory.least <= memory_bytes * (1.0 if device == "cuda" else HOPELESS_ON_CPU):
        return
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    whose = "the GPU has" if device == "cuda" else "this machine has for each rank"
    raise UserError(
        f"The run needs at least {memory.least / 1e9:.1f} GB on each rank with {describe(settings, 'batch.micro_batch_size')} "
        f"(most of it {largest}: {memory.parts[largest] / 1e9:.1f} GB); {whose} {memory_bytes / 1e9:.1f} GB. "
        f"{next(_ways_to_fit(settings, merged, layout, device, memory_bytes))}"
    )


def _ways_to_fit(settings: RunSettings, merged: dict, layout: Layout, device: DeviceType, memory_bytes: float) -> Iterator[str]:
    """Yield what would fit, the smallest change first, and at the end what may help where nothing is known to fit."""
    most = memory_bytes * (FITS if device == "cuda" else 1.0)
    share = settings.batch.global_batch_size // layout.data_parallel_size
    sizes = [size for size in range((settings.batch.micro_batch_size or 1) - 1, 0, -1) if share % size == 0]
    for size in sizes:
        if _memory(settings, merged, layout, device, size).total <= most:
            yield f"--batch.micro_batch_size {size} fits."
    smallest = sizes[-1] if sizes else 1
    extra = f" --batch.micro_batch_size {smallest}" if sizes else ""
    changes: list[tuple[str, RunSettings, dict]] = []
    again = dataclasses.replace(settings, recompute=True)
    if not settings.recompute:
        changes.append(("--recompute", again, merged))
    if layout.pipeline_stages == 1:
        for name in ("zero3.json", "zero3_offload.json"):
            zero = read_deepspeed_json(str(REPOSITORY / "ds_configs" / name))
            changes.append((f"--deepspeed ds_configs/{name}", settings, zero))
            changes.append((f"--deepspeed ds_configs/{name} --recompute", again, zero))
    for words, changed, json in changes:
        if _memory(changed, json, layout, device, smallest).total <= most:
            yield f"{words}{extra} fits."
    yield "Use more ranks, or a smaller model; launch/plan.py shows the layouts that fit a number of devices."


def _memory(settings: RunSettings, merged: dict, layout: Layout, device: DeviceType, size: int) -> Memory:
    batch = dataclasses.replace(settings.batch, micro_batch_size=size)
    return run_memory(dataclasses.replace(settings, batch=batch), merged, layout, device)
