"""Body of launch/prune.py: weights become zero, or whole parts of the network are removed."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from data.command_line import UserError
from launch.compressing import plan, report, sensitivity_pass
from launch.compressing.driver import BlockMethod, compress
from launch.compressing.layer_store import DequantizedWeights, LayerStore
from launch.compressing.result import Result, finish
from launch.compressing.settings import PruneSettings
from launch.compressing.setup import Job, chosen_matrices, open_job, open_source
from model.compression import pruning, structured
from model.compression.allocation import owl_sparsities
from model.compression.quantization import Changed
from model.compression.statistics import InputStatistics, Matrix
from model.config import ModelConfig, count_parameters

_NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


@dataclasses.dataclass(frozen=True)
class _Mask:
    """The sparsity, and the matrices that get it."""

    sparsity: pruning.Sparsity
    chosen: Mapping[str, Matrix]


def prune(settings: PruneSettings, arguments: Sequence[str]) -> int:
    """Prune the model; return the exit status. Raises UserError if the settings do not fit the model or the text."""
    config, opened = open_source(settings)
    is_structured = settings.method == "structured"
    try:
        target = structured.sizes_for(config, **settings.sizes) if is_structured else _mask_for(config, settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from error
    needs = plan.describe_need(config, settings, is_swept=settings.method in ("sparsegpt", "structured"))
    sizes = [_describe_sizes(config, target)] if isinstance(target, ModelConfig) else []
    if opened is None:
        print("\n".join([needs, *sizes]))
        return 0
    needs_calibration = settings.method != "magnitude" or settings.allocation == "owl"
    job = open_job(settings, opened, "prune", arguments, needs_calibration)
    job.log("\n".join([needs, *sizes]))
    if settings.dry_run:
        return 0
    with job.layer_store() as store:
        result = _prune_structured(job, target, store) if isinstance(target, ModelConfig) else _prune_to_zeros(job, target, store)
        return finish(job, result, store)


def _mask_for(config: ModelConfig, settings: PruneSettings) -> _Mask:
    sparsity, chosen = pruning.Sparsity.parse(settings.sparsity or "0.5"), chosen_matrices(config, settings.ignore)
    for matrix in chosen.values():
        try:
            sparsity.check(matrix.shape[1])
        except ValueError as error:
            raise UserError(f"{matrix}: {error}. --ignore '*.{matrix.linear}' leaves it unchanged.") from error
    return _Mask(sparsity, chosen)


def _prune_to_zeros(job: Job[PruneSettings], mask: _Mask, store: LayerStore) -> Result:
    """Set weights to zero."""
    settings, sparsities = job.settings, _allocate_sparsities(job, mask, store)
    chosen_names = {str(matrix) for matrix in mask.chosen.values()}

    def change(block: int, linear: str, weight: Tensor, statistics: InputStatistics | None) -> Changed | None:
        """Set weights of a chosen matrix to zero."""
        if f"{block}.{linear}" not in chosen_names:
            return None
        if settings.method == "magnitude":
            return pruning.magnitude(weight, sparsities[block])
        assert statistics is not None
        if settings.method == "wanda":
            return pruning.wanda(weight, statistics, sparsities[block])
        return pruning.sparsegpt(weight, statistics, sparsities[block], settings.damping)

    def prune_by_magnitude(block: int, linear: str, weight: Tensor) -> Tensor:
        """Return the weight pruned by magnitude, which needs no statistics."""
        return pruning.magnitude(weight, sparsities[block]).weight if f"{block}.{linear}" in chosen_names else weight

    measured = sensitivity_pass.divergences(job, store, [prune_by_magnitude])
    compress(job.config, job.opened.state, BlockMethod(change), job.samples, store, job.workers, job.dtype, job.log)
    shares = "" if settings.allocation == "uniform" else ", shares by outliers (OWL)"
    artefact: report.Artefact = "2:4" if mask.sparsity.pattern == (2, 4) else "zeros"
    method = f"{_NAMES[settings.method]}, {mask.sparsity}{shares}"
    return Result(job.config, store, artefact, method, divergences=None if measured is None else [costs[0] for costs in measured])


def _allocate_sparsities(job: Job[PruneSettings], mask: _Mask, store: LayerStore) -> list[pruning.Sparsity]:
    """Return the sparsity of each block."""
    blocks = range(job.config.total_blocks)
    if job.settings.allocation == "uniform":
        return [mask.sparsity for _ in blocks]
    sizes = [sum(rows * columns for rows, columns in (one.shape for one in mask.chosen.values() if one.block == block)) for block in blocks]
    shares = owl_sparsities(sensitivity_pass.outlier_ratios(job, store, mask.chosen), sizes, mask.sparsity.fraction)
    job.log("Sparsities of the blocks: " + " ".join(f"{share:.3f}" for share in shares))
    return [pruning.Sparsity(share) for share in shares]


def _prune_structured(job: Job[PruneSettings], smaller: ModelConfig, store: LayerStore) -> Result:
    """Make a smaller dense network: remove blocks first, then heads and neurons of the others, then channels."""
    config, state = job.config, job.opened.state
    shallow = dataclasses.replace(config, num_layers=smaller.num_layers, num_decoder_layers=smaller.num_decoder_layers)
    if shallow != config:
        state = structured.remove_blocks(config, state, shallow, sensitivity_pass.importance(job, store, job.settings.depth_by))
    units = {"feed_forward.down": (smaller.intermediate_size, 1)} if smaller.intermediate_size < config.intermediate_size else {}
    if smaller.num_key_value_heads < config.num_key_value_heads:
        inputs_per_head = config.num_attention_heads // config.num_key_value_heads * config.head_size
        units |= dict.fromkeys(("attention.output", "cross_attention.output"), (smaller.num_key_value_heads, inputs_per_head))

    def change(block: int, linear: str, weight: Tensor, statistics: InputStatistics | None) -> Changed | None:
        """Remove heads or neurons from the inputs of a matrix."""
        if linear not in units:
            return None
        assert statistics is not None
        return structured.remove_inputs(weight, statistics, *units[linear], job.settings.damping)

    channels = structured.Channels() if smaller.hidden_size < config.hidden_size else None
    method = BlockMethod(change, watch=None if channels is None else channels.watching)
    compress(shallow, state, method, job.samples, store, job.workers, job.dtype, job.log)
    if channels is not None:
        job.workers.sum_in_place(list(channels.sums.values()))
    weights = structured.reduce_widths(shallow, DequantizedWeights(store), smaller, channels)
    return Result(smaller, weights, "structured", f"structured: {_describe_sizes(config, smaller)}")


def _describe_sizes(config: ModelConfig, smaller: ModelConfig) -> str:
    sizes = ("num_layers", "num_decoder_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size")
    pairs = {name: (getattr(config, name), getattr(smaller, name)) for name in sizes}
    changed = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in pairs.items() if before != after)
    old, new = count_parameters(config), count_parameters(smaller)
    return f"{changed}; {old:,} -> {new:,} parameters, {new / old:.1%}"
