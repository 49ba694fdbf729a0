"""Quantize a model: python launch/quantize.py runs/demo --method gptq --bits 4 --group_size 128 --output quantized/demo"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError, read_settings, run_door
from launch.compressing.settings import CompressionSettings
from launch.training.stopping import leave

if TYPE_CHECKING:
    from launch.compressing.door import Job
    from model.compression.grids import Grid
    from model.compression.packed import Scheme
    from model.compression.statistics import Matrix

MIXED_BITS = (3, 4, 8)
"""What a block may get where the average is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeSettings(CompressionSettings):
    method: Literal["rtn", "gptq"] = "gptq"
    """Each weight to its nearest code (needs no text), or so that the errors of a matrix's columns cancel (arXiv 2210.17323)."""
    scaling: Literal["none", "smoothquant", "awq"] = "none"
    """Before that, factors move between a matrix's inputs and its columns: from inputs with outliers, for int8 activations
    (arXiv 2211.10438), or to columns that matter, found by search (arXiv 2306.00978)."""
    smoothing_strength: float = 0.5
    """Of smoothquant: 0 leaves all outliers to the activations, 1 to the weights."""
    kind: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    """What weights become: integers, E4M3, or E2M1 with a scale each 16 (nvfp4) or 32 (mxfp4) entries, as on Blackwell."""
    bits: int = 4
    """Of an integer, 2 to 8; 8 of fp8 and 4 of the others."""
    group_size: int | None = None
    """Entries of a row that share a scale; 0: the whole row (default: 128 of integers below 8 bits, else the row; nvfp4 16, mxfp4 32)."""
    symmetric: bool = True
    """Zero is a code's middle; else each group has its own zero point."""
    activations: Literal["none", "int8", "fp8"] | None = None
    """What goes into the matrices is rounded too, each token by a scale of its own, while the network runs (default: fp8 beside fp8, else
    none). int8 beside --bits 8 is W8A8."""
    damping: float = 0.01
    """Of gptq: share of the mean diagonal that is added to the second moment's, so that it can be inverted."""
    act_order: bool = False
    """Of gptq: columns with the largest inputs first."""
    average_bits: float | None = None
    """Bits a weight of the matrices on average, with their scales: each block gets 3, 4 or 8, by what it costs alone (default: --bits)."""
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    """Type of what is not quantized, and of scales."""


def main(arguments: Sequence[str]) -> int:
    description = (
        "Quantize the matrices of a model's blocks and write a folder that transformers and vLLM load, with a report of what it cost. "
        "One block is in memory at a time; deepspeed, torchrun and srun spread samples and matrices over ranks; started again, it goes on."
    )
    settings = read_settings(QuantizeSettings, arguments, description, positional="model")
    grid, activations = _grid(settings), settings.activations or ("fp8" if settings.kind == "fp8" else "none")
    from launch.compressing import door, plan
    from model import huggingface
    from model.compression.packed import Scheme

    is_calibrated = settings.method == "gptq" or settings.scaling != "none" or settings.average_bits is not None
    if settings.dry_run and (planned := plan.of_named_size(settings, settings.method == "gptq")):
        print(planned)
        return 0
    job = door.open_job(settings, "quantize", arguments, is_calibrated)
    chosen = door.chosen_matrices(job.opened.config, settings.ignore)
    try:
        schemes = {name: Scheme(grid, activations) for name in chosen}
        huggingface.quantization_config(job.opened.config, schemes, job.dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    job.say(plan.of(job, settings.method == "gptq"))
    if settings.dry_run:
        return 0
    return _quantize(job, settings, chosen, schemes)


def _quantize(job: "Job", settings: QuantizeSettings, chosen: Mapping[str, "Matrix"], schemes: "Mapping[str, Scheme]") -> int:
    from launch.compressing import door
    from launch.compressing.driver import Treatment, compress
    from model.compression import quantization, scaling

    divergences, schemes = _sensitivity(job, settings, chosen, schemes)
    grids = {str(chosen[name]): scheme.grid for name, scheme in schemes.items()}

    def change(block, linear, weight, statistics):
        grid = grids.get(f"{block}.{linear}")
        if grid is None:
            return None
        if settings.method == "rtn":
            return quantization.rtn(weight, grid, job.dtype)
        return quantization.gptq(weight, statistics, grid, job.dtype, settings.damping, settings.act_order)

    def scales(block, group, weights, statistics):
        if group.producer is None or not all(f"{block}.{linear}" in grids for linear in group.linears):
            return None
        if settings.scaling == "smoothquant" and group.producer.endswith("_norm"):
            return scaling.smoothquant_scales(weights, statistics, settings.smoothing_strength)
        if settings.scaling == "awq":
            return scaling.awq_scales(weights, statistics, grids[f"{block}.{group.linears[0]}"], job.dtype)
        return None

    treatment = Treatment(change, scales) if settings.scaling != "none" else Treatment(change)
    parts = door.parts_of(job)
    compress(job.opened.config, job.opened.state, treatment, job.samples, parts, job.workers, job.dtype, job.say)
    first = next(iter(schemes.values()))
    result = door.Result(job.opened.config, parts, first.format, _in_words(settings, schemes), schemes, *door.reports(parts, divergences))
    return door.finish(job, result, parts)


def _sensitivity(job, settings, chosen, schemes):
    """What each block costs alone, mean nats a token; and the schemes, which follow from it where an average is given."""
    from launch.compressing import door
    from model.compression import allocation
    from model.compression.grids import round_to

    plain = next(iter(schemes.values())).grid
    candidates = [dataclasses.replace(plain, bits=bits) for bits in MIXED_BITS] if settings.average_bits else [plain]
    places = {str(matrix) for matrix in chosen.values()}

    def rounding(grid):
        return lambda block, linear, weight: round_to(weight, grid, job.dtype).weight() if f"{block}.{linear}" in places else weight

    found = door.divergences(job, [rounding(grid) for grid in candidates])
    if settings.average_bits is None:
        return (None if found is None else found[:, 0].tolist()), schemes
    if found is None:
        raise UserError("average_bits needs what each block costs alone: give sensitivity_samples and calibration_samples above 0.")
    blocks = range(job.opened.config.total_blocks)
    sizes = [
        {grid.bits: sum(_bytes(grid, matrix, job.dtype) for matrix in chosen.values() if matrix.block == block) for grid in candidates}
        for block in blocks
    ]
    costs = [{grid.bits: found[block, place].item() for place, grid in enumerate(candidates)} for block in blocks]
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in chosen.values())
    try:
        bits = allocation.choose(costs, sizes, int(settings.average_bits * weights / 8))
    except ValueError as error:
        raise UserError(f"average_bits {settings.average_bits:g}: {error}") from error
    job.say("Bits of the blocks, by what each costs alone: " + " ".join(map(str, bits)))
    grid_of = {grid.bits: grid for grid in candidates}
    chosen_schemes = {name: dataclasses.replace(schemes[name], grid=grid_of[bits[chosen[name].block]]) for name in schemes}
    return [costs[block][bits[block]] for block in blocks], chosen_schemes


def _bytes(grid: "Grid", matrix: "Matrix", dtype) -> int:
    rows, columns = matrix.shape
    scales = rows * grid.num_groups(columns)
    return rows * columns * grid.bits // 8 + scales * (dtype.itemsize + (0 if grid.symmetric else 1))


def _grid(settings: QuantizeSettings) -> "Grid":
    """Raises UserError for settings that contradict one another."""
    from model.compression.grids import Grid

    fixed = {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}
    complaints = []
    bits, group_size = settings.bits, settings.group_size
    if settings.kind in fixed:
        own_bits, own_group = fixed[settings.kind]
        if bits not in (own_bits, QuantizeSettings.bits):
            complaints.append(f"bits {bits}: {settings.kind} has {own_bits}.")
        if group_size not in (None, own_group or 0):
            complaints.append(f"group_size {group_size}: {settings.kind} has {'a scale a row' if own_group is None else own_group}.")
        bits, group_size = own_bits, own_group
    elif group_size is None:
        group_size = 128 if bits < 8 else None
    elif group_size == 0:
        group_size = None
    if settings.average_bits is not None and (settings.kind != "int" or settings.activations not in (None, "none")):
        complaints.append("average_bits is for integer weights without rounded activations.")
    if settings.method == "rtn" and (settings.act_order or settings.damping != QuantizeSettings.damping):
        complaints.append("act_order and damping are gptq's; method is rtn.")
    if not 0 <= settings.smoothing_strength <= 1:
        complaints.append(f"smoothing_strength is {settings.smoothing_strength:g}; it must be from 0 to 1.")
    if not settings.damping > 0:
        complaints.append(f"damping is {settings.damping:g}; it must be above 0.")
    if complaints:
        raise UserError("\n".join(complaints))
    try:
        return Grid(settings.kind, bits, group_size, settings.symmetric)
    except ValueError as error:
        raise UserError(str(error)) from error


def _in_words(settings: QuantizeSettings, schemes: "Mapping[str, Scheme]") -> str:
    kinds = "; ".join(dict.fromkeys(map(str, schemes.values())))
    scaled = "" if settings.scaling == "none" else f" behind {settings.scaling}"
    return f"{settings.method.upper()}{scaled}, {kinds}"


if __name__ == "__main__":
    run_door(main, leave)
