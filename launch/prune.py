"""Prune a model: python launch/prune.py runs/demo --method wanda --sparsity 2:4 --output pruned/demo"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError, read_settings, run_door
from launch.compressing.settings import CompressionSettings
from launch.training.stopping import leave

if TYPE_CHECKING:
    from launch.compressing.door import Job
    from model.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneSettings(CompressionSettings):
    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "wanda"
    """Which weights become zero: the smallest (needs no text), those that contribute least (arXiv 2306.11695), or those for which the
    others can best make up (arXiv 2301.00774). structured takes whole neurons, heads, channels or blocks out: a smaller dense model."""
    sparsity: str | None = None
    """Share of each matrix that becomes zero, or a pattern such as 2:4, two of each four neighbours (default: 0.5; not of structured)."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """The same share in all blocks, or less in those with more outliers (arXiv 2310.05175)."""
    damping: float = 0.01
    """Of sparsegpt and structured: share of the mean diagonal that is added to the second moment's, so that it can be inverted."""
    parameters: float | None = None
    """Of structured: share of all parameters that is left; the feed-forward's width follows from it."""
    intermediate_size: int | None = None
    """Of structured: width of the feed-forward that is left."""
    num_key_value_heads: int | None = None
    """Of structured: key/value heads that are left, each with the query heads that read it."""
    hidden_size: int | None = None
    """Of structured: width of the residual stream that is left."""
    num_layers: int | None = None
    """Of structured: blocks that are left (of an encoder-decoder those of its encoder)."""
    num_decoder_layers: int | None = None
    """Of structured: blocks of an encoder-decoder's decoder that are left."""
    depth_by: Literal["influence", "loss"] = "influence"
    """Of structured: blocks go that change what passes through them least (arXiv 2403.03853), or without which the loss rises least."""


_SIZES = ("parameters", "intermediate_size", "num_key_value_heads", "hidden_size", "num_layers", "num_decoder_layers")


def main(arguments: Sequence[str]) -> int:
    description = (
        "Prune a model, and write a folder that transformers loads, with a report of what it cost. Masks keep the size of the model; "
        "structured pruning gives a smaller one. launch/pretrain.py --init trains either on. One block is in memory at a time; deepspeed, "
        "torchrun and srun spread samples and matrices over ranks; started again, it goes on."
    )
    settings = read_settings(PruneSettings, arguments, description, positional="model")
    _refuse_contradictions(settings)
    from launch.compressing import door, plan

    is_swept = settings.method in ("sparsegpt", "structured")
    if settings.dry_run and (planned := plan.of_named_size(settings, is_swept)):
        print(planned)
        return 0
    job = door.open_job(settings, "prune", arguments, needs_calibration=settings.method != "magnitude" or settings.allocation == "owl")
    job.say(plan.of(job, is_swept))
    return (_cut if settings.method == "structured" else _mask)(job, settings)


def _mask(job: "Job", settings: PruneSettings) -> int:
    """Weights become zero."""
    from launch.compressing import door
    from launch.compressing.driver import Treatment, compress
    from model.compression import pruning

    try:
        sparsity = pruning.Sparsity.parse(settings.sparsity or "0.5")
        chosen = door.chosen_matrices(job.opened.config, settings.ignore)
        for matrix in chosen.values():
            sparsity.check(matrix.shape[1])
    except ValueError as error:
        raise UserError(str(error)) from error
    if settings.dry_run:
        return 0
    places = {str(matrix) for matrix in chosen.values()}
    sparsities = door.allocated(job, sparsity, settings.allocation, chosen)

    def change(block, linear, weight, statistics):
        if f"{block}.{linear}" not in places:
            return None
        wanted = sparsities[block]
        if settings.method == "magnitude":
            return pruning.magnitude(weight, wanted)
        if settings.method == "wanda":
            return pruning.wanda(weight, statistics, wanted)
        return pruning.sparsegpt(weight, statistics, wanted, settings.damping)

    def smallest(block, linear, weight):
        return pruning.magnitude(weight, sparsities[block]).weight if f"{block}.{linear}" in places else weight

    found = door.divergences(job, [smallest])
    parts = door.parts_of(job)
    compress(job.opened.config, job.opened.state, Treatment(change), job.samples, parts, job.workers, job.dtype, job.say)
    shares = "" if settings.allocation == "uniform" else ", shares by outliers (OWL)"
    method = f"{ {'magnitude': 'magnitude', 'wanda': 'Wanda', 'sparsegpt': 'SparseGPT'}[settings.method] }, {sparsity}{shares}"
    artefact = "2:4" if sparsity.pattern == (2, 4) else "zeros"
    told = door.reports(parts, None if found is None else found[:, 0].tolist())
    return door.finish(job, door.Result(job.opened.config, parts, artefact, method, {}, *told), parts)


def _cut(job: "Job", settings: PruneSettings) -> int:
    """What is left is a smaller dense network: blocks go first, then heads and neurons of the others, then channels."""
    from launch.compressing import door
    from launch.compressing.driver import Treatment, compress
    from launch.compressing.parts import Weights
    from model.compression import structured

    config, state = job.opened.config, job.opened.state
    try:
        smaller = structured.sizes_for(config, **{name: getattr(settings, name) for name in _SIZES})
    except ValueError as error:
        raise UserError(str(error)) from error
    job.say(_said(config, smaller))
    if settings.dry_run:
        return 0
    shallow = dataclasses.replace(config, num_layers=smaller.num_layers, num_decoder_layers=smaller.num_decoder_layers)
    if shallow != config:
        state = structured.shallower(config, state, shallow, door.importance_of_blocks(job, settings.depth_by))
    keep = {"feed_forward.down": (smaller.intermediate_size, 1), "attention.output": (smaller.num_key_value_heads, _group(config))}
    keep["cross_attention.output"] = keep["attention.output"]
    whole = {"feed_forward.down": config.intermediate_size}

    def change(block, linear, weight, statistics):
        if linear not in keep:
            return None
        units, unit = keep[linear]
        if units == whole.get(linear, config.num_key_value_heads):
            return None
        return structured.without_inputs(weight, statistics, units, unit, settings.damping)

    channels = structured.Channels() if smaller.hidden_size < config.hidden_size else None
    treatment = Treatment(change) if channels is None else Treatment(change, watch=channels.watching)
    parts = door.parts_of(job)
    compress(shallow, state, treatment, job.samples, parts, job.workers, _float32(), job.say)
    if channels is not None:
        job.workers.add_up(list(channels.sums.values()))
    told = door.reports(parts, None)
    cut = structured.narrower(shallow, Weights(parts), smaller, channels)
    return door.finish(job, door.Result(smaller, cut, "structured", f"structured: {_said(config, smaller)}", {}, *told), parts)


def _said(config: "ModelConfig", smaller: "ModelConfig") -> str:
    from model.config import count_parameters

    sizes = ("num_layers", "num_decoder_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size")
    changed = [
        f"{name} {getattr(config, name)} -> {getattr(smaller, name)}" for name in sizes if getattr(config, name) != getattr(smaller, name)
    ]
    old, new = count_parameters(config), count_parameters(smaller)
    return f"{', '.join(changed)}; {old:,} -> {new:,} parameters, {new / old:.1%}"


def _group(config: "ModelConfig") -> int:
    """Inputs of attention.output that belong to one key/value head."""
    return config.num_attention_heads // config.num_key_value_heads * config.head_size


def _float32():
    import torch

    return torch.float32


def _refuse_contradictions(settings: PruneSettings) -> None:
    of_structured = [name for name in (*_SIZES, "depth_by") if getattr(settings, name) != getattr(PruneSettings, name, None)]
    complaints = []
    if settings.method == "structured":
        if settings.sparsity is not None or settings.allocation != "uniform":
            complaints.append("sparsity and allocation are of masks; method structured takes sizes.")
        if settings.ignore:
            complaints.append("ignore is of masks; method structured has one shape in all blocks.")
    elif of_structured:
        complaints.append(f"{', '.join(of_structured)}: of method structured; method is {settings.method}.")
    if settings.method in ("magnitude", "wanda") and settings.damping != PruneSettings.damping:
        complaints.append(f"damping is of sparsegpt and structured; method is {settings.method}.")
    if not settings.damping > 0:
        complaints.append(f"damping is {settings.damping:g}; it must be above 0.")
    if complaints:
        raise UserError("\n".join(complaints))


if __name__ == "__main__":
    run_door(main, leave)
