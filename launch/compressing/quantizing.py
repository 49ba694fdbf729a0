"""Body of launch/quantize.py: the matrices of the blocks become codes on a grid."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor

from data.command_line import UserError, describe
from launch.compressing import plan, report, sensitivity_pass
from launch.compressing.driver import BlockMethod, compress
from launch.compressing.layer_store import LayerStore
from launch.compressing.result import Result, finish
from launch.compressing.settings import QuantizeSettings
from launch.compressing.setup import DTYPES, Job, chosen_matrices, open_job, open_source
from model import huggingface
from model.compression import allocation, quantization, scaling
from model.compression.grids import Byte, Grid, grid_of, round_to, scale_of
from model.compression.packed import CacheScheme, Scheme, describe_schemes
from model.compression.quantization import Changed
from model.compression.statistics import Group, InputStatistics, LargestKeysAndValues, Matrix, matrices
from model.config import ModelConfig

MIXED_BITS = (3, 4, 8)
"""Bits that a block may get if --average_bits is given."""

_DEFAULTS = {"int": (4, 128), "fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}  # bits and group size of each kind


def quantize(settings: QuantizeSettings, arguments: Sequence[str]) -> int:
    """Quantize the model; return the exit status. Raises UserError if the settings do not fit the model or the text."""
    config, opened = open_source(settings)
    try:
        schemes = _schemes_for(config, settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    is_swept = settings.method == "gptq"
    needs = plan.describe_need(config, settings, is_swept)
    if opened is None:
        print(needs)
        return 0
    job = open_job(settings, opened, "quantize", arguments, is_swept or settings.scaling != "none")
    job.log(needs)
    if settings.dry_run:
        return 0
    with job.layer_store() as store:
        return finish(job, _quantize_blocks(job, schemes, store), store)


def _schemes_for(config: ModelConfig, settings: QuantizeSettings) -> dict[str, Scheme]:
    """Return the scheme of each weight by its name; it is the same for all.

    Raises ValueError if the grid, the format or the architecture does not support it.
    """
    bits, group_size = _DEFAULTS[settings.kind]
    bits = bits if settings.bits is None else settings.bits
    if settings.kind == "int" and bits == 8:
        group_size = None
    if settings.group_size is not None:
        group_size = settings.group_size or None
    activations = settings.activations or ("fp8" if settings.kind == "fp8" else "none")
    scheme = Scheme(Grid(settings.kind, bits, group_size, settings.symmetric), activations)
    chosen = chosen_matrices(config, settings.ignore)
    _refuse_indivisible_groups(scheme.grid, chosen)
    if settings.average_bits is not None:
        weights = sum(rows * columns for rows, columns in (matrix.shape for matrix in chosen.values()))
        least = 8 * sum(min(sizes.values()) for sizes in _bytes_of_blocks(config, chosen, scheme.grid, settings)) / weights
        if settings.average_bits < least:
            raise UserError(
                f"{describe(settings, 'average_bits')} must be at least {least:.4g}, the size of {MIXED_BITS[0]}-bit weights with scales."
            )
    schemes = dict.fromkeys(chosen, scheme)
    huggingface.quantization_config(config, schemes, DTYPES[settings.precision], _cache_kind(settings))
    return schemes


def _refuse_indivisible_groups(grid: Grid, chosen: Mapping[str, Matrix]) -> None:
    if grid.group_size is None:
        return
    indivisible = {matrix.linear: matrix.shape[1] for matrix in chosen.values() if matrix.shape[1] % grid.group_size}
    if indivisible:
        named = ", ".join(f"{linear} ({inputs})" for linear, inputs in indivisible.items())
        fitting = [str(size) for size in (128, 64, 32, 16) if not any(matrix.shape[1] % size for matrix in chosen.values())]
        sizes = "" if grid.kind != "int" else f"--group_size {', '.join([*fitting, '0'])} would divide them (0: one scale per row); "
        patterns = " ".join(f"'*.{linear}'" for linear in indivisible)
        raise UserError(
            f"Groups of {grid.group_size} do not divide the inputs of {named}: {sizes}--ignore {patterns} leaves these unchanged."
        )


def _quantize_blocks(job: Job[QuantizeSettings], schemes: Mapping[str, Scheme], store: LayerStore) -> Result:
    settings = job.settings
    divergences, schemes = _sensitivity(job, schemes, store)
    names_in_blocks = {name: str(matrix) for name, matrix in matrices(job.config).items()}
    grids = {names_in_blocks[name]: scheme.grid for name, scheme in schemes.items()}

    def change(block: int, linear: str, weight: Tensor, statistics: InputStatistics | None) -> Changed | None:
        """Quantize a chosen matrix."""
        grid = grids.get(f"{block}.{linear}")
        if grid is None:
            return None
        if settings.method == "rtn":
            return quantization.rtn(weight, grid, job.dtype)
        assert statistics is not None
        return quantization.gptq(weight, statistics, grid, job.dtype, settings.damping, settings.act_order)

    def scales(block: int, group: Group, weights: list[Tensor], statistics: InputStatistics) -> Tensor | None:
        """Return the factors that SmoothQuant or AWQ moves from the inputs of a group into its columns."""
        if group.producer is None or not all(f"{block}.{linear}" in grids for linear in group.linears):
            return None
        if not group.producer.endswith("_norm") and f"{block}.{group.producer}" not in grids:
            return None  # this matrix stays unchanged
        if settings.scaling == "smoothquant" and group.producer.endswith("_norm"):
            return scaling.smoothquant_scales(weights, statistics, settings.smoothing_strength)
        if settings.scaling == "awq":
            return scaling.awq_scales(weights, statistics, grids[f"{block}.{group.linears[0]}"], job.dtype)
        return None

    kind = _cache_kind(settings)
    largest = LargestKeysAndValues(job.config.total_blocks, job.workers.device)
    block_method = BlockMethod(change, scales, largest.watching if kind else None)
    compress(job.config, job.opened.state, block_method, job.samples, store, job.workers, job.dtype, job.log)
    kv_cache = None
    if kind is not None:
        job.workers.max_in_place(largest.sizes)
        block_scales = scale_of(largest.sizes, grid_of(kind), job.dtype).tolist()
        kv_cache = CacheScheme(kind, tuple((keys, values) for keys, values in block_scales))
    artefact = cast(report.Artefact, next(iter(schemes.values())).format)
    scaled = "" if settings.scaling == "none" else f" after {settings.scaling}"
    method = f"{settings.method.upper()}{scaled}, {describe_schemes(schemes.values(), kv_cache)}"
    return Result(job.config, store, artefact, method, schemes, kv_cache, divergences)


def _cache_kind(settings: QuantizeSettings) -> Byte | None:
    return None if settings.kv_cache == "none" else settings.kv_cache


def _sensitivity(
    job: Job[QuantizeSettings], schemes: Mapping[str, Scheme], store: LayerStore
) -> tuple[list[float] | None, Mapping[str, Scheme]]:
    """Return what quantizing each block alone costs, nats per token, and the schemes, which depend on it if --average_bits is given."""
    average, plain = job.settings.average_bits, next(iter(schemes.values())).grid
    grids = [plain] if average is None else [dataclasses.replace(plain, bits=bits) for bits in MIXED_BITS]
    chosen = {name: matrix for name, matrix in matrices(job.config).items() if name in schemes}
    chosen_names = {str(matrix) for matrix in chosen.values()}

    def round_with(grid: Grid) -> Callable[[int, str, Tensor], Tensor]:
        """Return a function that rounds the chosen matrices to their nearest codes."""
        return lambda block, linear, weight: round_to(weight, grid, job.dtype).weight() if f"{block}.{linear}" in chosen_names else weight

    measured = sensitivity_pass.divergences(job, store, [round_with(grid) for grid in grids])
    if measured is None or average is None:
        return None if measured is None else [costs[0] for costs in measured], schemes
    costs_of_bits = [dict(zip(MIXED_BITS, costs, strict=True)) for costs in measured]
    weights = sum(rows * columns for rows, columns in (matrix.shape for matrix in chosen.values()))
    bits = allocation.choose(costs_of_bits, _bytes_of_blocks(job.config, chosen, plain, job.settings), int(average * weights / 8))
    job.log("Bits of the blocks, chosen by the loss that each costs alone: " + " ".join(map(str, bits)))
    grid_of = dict(zip(MIXED_BITS, grids, strict=True))
    mixed = {name: dataclasses.replace(schemes[name], grid=grid_of[bits[chosen[name].block]]) for name in schemes}
    return [costs[bits[block]] for block, costs in enumerate(costs_of_bits)], mixed


def _bytes_of_blocks(config: ModelConfig, chosen: Mapping[str, Matrix], grid: Grid, settings: QuantizeSettings) -> list[dict[int, int]]:
    """Return the bytes of the chosen matrices of each block with their scales, by number of bits."""
    per_scale = DTYPES[settings.precision].itemsize + (0 if grid.symmetric else 1)
    sizes: list[dict[int, int]] = [dict.fromkeys(MIXED_BITS, 0) for _ in range(config.total_blocks)]
    for matrix in chosen.values():
        rows, columns = matrix.shape
        for bits in MIXED_BITS:
            sizes[matrix.block][bits] += rows * columns * bits // 8 + rows * grid.num_groups(columns) * per_scale
    return sizes
