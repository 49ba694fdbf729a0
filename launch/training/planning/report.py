"""The plan that launch/plan.py prints: the best layouts of a run, what each needs, and its command."""

import dataclasses
import math
import shlex
from collections.abc import Sequence

from data.command_line import DEFAULT, UserError, as_text, describe, origin_of, replace
from launch.ranks.layout import Layout
from launch.training.advice import Band, Facts, Rows, batch_band
from launch.training.data import RunData, open_data
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.estimates import parameters_in_blocks
from launch.training.optimizers import optimizer_for
from launch.training.peak import measured_flops
from launch.training.plan import describe_model
from launch.training.planning.cost import checkpoint_interval, run_cost
from launch.training.planning.devices import DEVICES, NETWORKS, cpu
from launch.training.planning.layouts import Candidate, candidates
from launch.training.planning.settings import ALIASES, OWN_OPTIONS, PlanSettings
from launch.training.planning.step_time import Cluster, odd_head_warnings
from model.config import count_parameters, flops_per_token

SHOWN = 5
"""Layouts that are shown."""


def report(settings: PlanSettings, arguments: Sequence[str]) -> str:
    """Return the plan as lines to print. Raises UserError if no layout is possible, or none fits."""
    settings = with_batch(settings)
    if origin_of(settings, "deepspeed") not in (None, DEFAULT):
        read_deepspeed_json(settings.deepspeed)  # a mistake in it is no reason that belongs to one layout
    data = None if origin_of(settings, "data.path") in (None, DEFAULT) else open_data(settings)
    cluster = cluster_of(settings)
    found, reasons = candidates(settings, cluster)
    fitting = [one for one in found if one.memory.total <= cluster.device.memory_bytes]
    if not fitting:
        raise UserError(_why_nothing_fits(settings, cluster, found, reasons))
    rows = _rows_of_run(settings, cluster, fitting[0], data)
    for number, one in enumerate(fitting[:SHOWN], 1):
        rows += [("", ""), (str(number), _describe(one)), *_rows_of_layout(settings, cluster, one), ("", command(one, arguments))]
    return "\n".join(f"{name:>10}{':' if name else ' '} {text}".rstrip() for name, text in rows)


def cluster_of(settings: PlanSettings) -> Cluster:
    """Return the devices and the network that the settings name. The peak is that of --peak_tflops, of the data sheet, or measured."""
    device = DEVICES.get(settings.device)
    if device is None:
        device = cpu(settings.peak_tflops or measured_flops(settings.precision, "cpu") / 1e12)
    elif settings.peak_tflops is not None:
        device = dataclasses.replace(device, tflops=settings.peak_tflops)
    return Cluster(device, NETWORKS[settings.network or device.network], settings.gpus_per_node)


def with_batch(settings: PlanSettings) -> PlanSettings:
    """Return the settings with a global batch for a decoder whose user gave none: a power of two in the band of published laws.

    It has at least one sequence for each device.
    """
    if not _chooses_batch(settings):
        return settings
    band = _published_batch(settings)
    size = 2 ** round(math.log2(max(1.0, math.sqrt(band.low * band.high) / settings.model.sequence_length)))
    size = -(-max(size, settings.gpus) // settings.gpus) * settings.gpus
    return replace(settings, batch=dataclasses.replace(settings.batch, global_batch_size=size))


def _chooses_batch(settings: PlanSettings) -> bool:
    is_given = origin_of(settings, "batch.global_batch_size") not in (None, DEFAULT)
    return not is_given and not settings.batch.ramp and settings.model.architecture == "decoder"


def _published_batch(settings: PlanSettings) -> Band:
    """Return the band of the best batch in tokens by published laws (launch/training/advice.py)."""
    model, tokens = settings.model, settings.batch_plan.tokens_before(settings.batch_plan.steps)
    facts = Facts(
        parameters=count_parameters(model),
        parameters_in_blocks=parameters_in_blocks(model),
        block_flops=flops_per_token(model) - 6 * model.vocab_size * model.hidden_size,
        tokens=tokens,
        batch_tokens=1,
        learning_rate=settings.optimizer.learning_rate,
        decay=0.0,
    )
    return batch_band(facts)


def _rows_of_run(settings: PlanSettings, cluster: Cluster, best: Candidate, data: RunData | None) -> Rows:
    model, device, batches = settings.model, cluster.device, best.settings.batch_plan
    nodes, size = settings.gpus // settings.gpus_per_node, settings.batch.global_batch_size
    chosen = f" (published laws: {_published_batch(settings)}); --batch.global_batch_size sets another" if _chooses_batch(settings) else ""
    rows = [
        ("model", describe_model(model)),
        ("batch", f"{size} sequences of {model.sequence_length:,} tokens, {size * model.sequence_length:,} tokens a step{chosen}"),
        ("length", f"{batches.steps:,} steps, {batches.tokens_before(batches.steps):,} tokens"),
        (
            "devices",
            f"{settings.gpus} {settings.device} ({device.tflops:g} TFLOP/s, {_gb(device.memory_bytes)}) in {nodes} node(s), "
            f"{settings.network or device.network} between them",
        ),
        ("sources", f"{device.source}; {cluster.network.source}; speeds {device.speeds.source}"),
        *(_data_rows(data, batches.position(batches.steps)) if data else []),
        ("checkpoint", _checkpoint(settings, nodes, best.time.total)),
    ]
    rows += [("warning", text) for text in odd_head_warnings(model)]
    return rows


def _data_rows(data: RunData, positions: int) -> Rows:
    """Return a line for each source: its tokens, and how often a run of `positions` samples reads them."""
    epochs = data.sampling.epochs(positions)
    tokens = {name: len(folder.splits["train"]) for name, folder in data.sampling.folders.items()}
    return [("data", f"{name}: {tokens[name]:,} training tokens, read {epochs[name]:.2f} times") for name in tokens]


def _checkpoint(settings: PlanSettings, nodes: int, step_seconds: float) -> str:
    size = optimizer_for(settings.optimizer).checkpoint_bytes * count_parameters(settings.model)
    seconds = size / (nodes * settings.disk_speed * 1e9)
    every = checkpoint_interval(seconds, settings.gpus)
    steps = f"{every / step_seconds:,.0f} steps of layout 1"
    written = f"{_gb(size)}, {seconds:,.0f} s to write at {settings.disk_speed:g} GB/s a node"
    return f"{written}; one every {_duration(every)} ({steps}) loses the least time to failures"


def _describe(one: Candidate) -> str:
    batch, layout = one.settings.batch, one.layout
    parts = [f"ZeRO-{one.zero_stage}", str(layout).partition(": ")[2] or f"data parallel {layout.data_parallel_size}"]
    parts += [f"micro-batch {batch.micro_batch_size} x accumulation {one.micro_batches}"]
    return ", ".join([*parts, *(["recompute"] if one.settings.recompute else [])])


def _rows_of_layout(settings: PlanSettings, cluster: Cluster, one: Candidate) -> Rows:
    time, total, memory = one.time, one.time.total, one.memory
    cost = run_cost(
        total * one.settings.batch_plan.steps, settings.gpus, cluster.device.watts, settings.power_share, settings.pue, settings.price
    )
    price = f", price {cost.price:,.0f}" if cost.price is not None else ""
    shares = f"bubble {time.bubble / total:.1%}, communication {(time.exchange + time.gradients) / total:.1%}"
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in memory.parts.items() if size and name not in memory.elsewhere)
    return [
        ("time", f"{total:.3g} s a step, {one.tokens_per_second:,.0f} tokens/s, MFU {one.mfu:.1%}; {shares}"),
        (
            "memory",
            f"{_gb(memory.total)} of {_gb(cluster.device.memory_bytes)}: {parts}, base and reserve {_gb(memory.total - memory.tensors)}",
        ),
        ("cost", f"{cost.days:.3g} days, {cost.gpu_hours:,.0f} device-hours, {cost.kilowatt_hours:,.0f} kWh{price}"),
    ]


def command(one: Candidate, arguments: Sequence[str]) -> str:
    """Return the command that starts the run in a layout: the user's own options, and those that were chosen here."""
    settings, words = one.settings, _run_options(arguments)
    chosen = dict(one.chosen)
    if _chooses_batch(settings):
        chosen["batch.global_batch_size"] = settings.batch.global_batch_size
    chosen["deepspeed"] = _short_path(settings.deepspeed) if "deepspeed" in chosen else None
    words += [word for name, value in chosen.items() if value is not None for word in (f"--{name}", as_text(value))]
    nodes, per_node = settings.gpus // settings.gpus_per_node, settings.gpus_per_node
    start = ["deepspeed", f"--num_{'accelerators' if settings.device == 'cpu' else 'gpus'}", str(per_node), "launch/pretrain.py"]
    if nodes > 1:
        start = ["sbatch", "--nodes", str(nodes), "--ntasks-per-node", str(per_node), "--gpus-per-node", str(per_node)]
        start.append("launch/slurm/pretrain.sbatch")
    return shlex.join([*start, *words])


def _run_options(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line without the options that only launch/plan.py has."""
    kept, keeps = [], True
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            keeps = name not in OWN_OPTIONS
            word = f"{ALIASES.get(name, name)}{equals}{value}"
        kept += [word] if keeps else []
    return kept


def _short_path(path: str) -> str:
    """Return the path of a file in ds_configs/ as it is written from the repository's folder."""
    return "/".join(path.split("/")[-2:])


def _why_nothing_fits(settings: PlanSettings, cluster: Cluster, found: Sequence[Candidate], reasons: Sequence[str]) -> str:
    """Return why there is no layout to show: nothing that is allowed, or nothing that fits. Raises UserError if no grid is possible."""
    if not found:
        Layout(settings.gpus, settings.pipeline_stages or 1, settings.tensor_parallel_size, settings.sequence_parallel_size)  # may refuse
        return "\n".join([f"No layout of {describe(settings, 'gpus')} is possible:", *reasons[:8]])
    least = min(found, key=lambda one: one.memory.total)
    largest = max(least.memory.parts, key=lambda name: least.memory.parts[name])
    memory = cluster.device.memory_bytes
    larger = [name for name, device in DEVICES.items() if device.memory_bytes > max(memory, least.memory.total)]
    advice = ["more --gpus", *([f"--device {larger[0]}"] if larger else []), "a shorter --model.sequence_length", "a smaller model"]
    return (
        f"No layout of {describe(settings, 'gpus')} fits {describe(settings, 'device')} with {_gb(memory)}: the smallest "
        f"({_describe(least)}) needs {_gb(least.memory.total)}, most of it {largest} ({_gb(least.memory.parts[largest])}). "
        f"Use {', '.join(advice[:-1])} or {advice[-1]}."
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
