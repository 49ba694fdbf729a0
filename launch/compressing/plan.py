"""Estimate of what a compression needs, before it starts: memory, disk and time of each process."""

import dataclasses

from launch.compressing.samples import MAX_SAMPLE_LENGTH
from launch.compressing.settings import CompressionSettings
from launch.ranks.processes import device_name, find_process
from launch.training.peak import measured_flops
from model.compression.statistics import Matrix, matrices
from model.config import ModelConfig, count_parameters

_PROCESS_BYTES = 0.45e9  # Python with torch and the other imports of the script
# Share of the speed of a large matrix product that GPTQ and Wanda reach overall (hidden size 1,024, one CPU core).
_SHARE_OF_PRODUCT_SPEED = 0.7


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory and time that one process needs."""

    memory_bytes: float
    seconds: float


def estimate_need(config: ModelConfig, tokens: int, is_swept: bool, flops_a_second: float, world_size: int = 1) -> Need:
    """Return the need of one pass over the blocks. `tokens`: calibration tokens of all ranks; `is_swept`: GPTQ or SparseGPT.

    Memory: a block twice in float32, the hidden states, second moments of a block's inputs in float64 and the workspace that inverts the
    largest; or the embedding, if that is more. Time: two forward passes, the second moments, and the sweep of each matrix, in which
    swept methods invert second moments.
    """
    all_of_them = list(matrices(config).values())
    groups = _distinct_inputs(all_of_them)
    one_block = [matrix for matrix in all_of_them if matrix.block == 0]
    block_bytes = 4 * sum(rows * columns for rows, columns in (matrix.shape for matrix in one_block))
    moment_bytes = 8 * sum(size**2 for size in groups)
    largest = max(matrix.shape[1] for matrix in one_block)
    work_bytes = 12 * largest**2 if is_swept else 0
    hidden_bytes = 4 * tokens / world_size * config.hidden_size
    embedding_bytes = 8 * config.vocab_size * config.hidden_size
    memory = _PROCESS_BYTES + hidden_bytes + max(2 * block_bytes + max(moment_bytes, moment_bytes / 2 + work_bytes), embedding_bytes)
    parameters = sum(rows * columns for rows, columns in (matrix.shape for matrix in all_of_them))
    operations = 4 * tokens * parameters + 2 * tokens * config.total_blocks * sum(size**2 for size in groups)
    if is_swept:
        operations += sum(2 * rows * columns**2 + 2 * columns**3 for rows, columns in (matrix.shape for matrix in all_of_them))
    return Need(memory, operations / world_size / (_SHARE_OF_PRODUCT_SPEED * flops_a_second))


def describe_need(config: ModelConfig, settings: CompressionSettings, is_swept: bool) -> str:
    """Return the need of a compression as lines to print."""
    device, world_size = device_name(), find_process().world_size
    length = settings.sequence_length or min(config.sequence_length, MAX_SAMPLE_LENGTH)
    tokens = settings.calibration_samples * length
    needed = estimate_need(config, tokens, is_swept, measured_flops("float32", device), world_size)
    hours, minutes = divmod(round(needed.seconds / 60), 60)
    ranks = "" if world_size == 1 else f" on each of {world_size} ranks"
    parameters, item_bytes = count_parameters(config), 4 if settings.precision == "float32" else 2
    return (
        f"{settings.model}: {parameters:,} parameters, {len(matrices(config))} matrices in {config.total_blocks} blocks; "
        f"{tokens:,} calibration tokens.\nNeeds about {needed.memory_bytes / 1e9:.1f} GB of memory{ranks}, up to "
        f"{2 * item_bytes * parameters / 1e9:.1f} GB of disk in addition to the model, and {f'{hours} h ' if hours else ''}{minutes} min "
        f"to compress on this machine ({device}; an estimate from one matrix product). Transformers, which checks the result at the "
        f"end, needs the whole model in memory: {4 * parameters / 1e9:.1f} GB."
    )


def _distinct_inputs(all_of_them: list[Matrix]) -> list[int]:
    """Return the number of inputs of each group of matrices of one block; queries, keys and values share theirs, as gate and up do."""
    shared = ("key", "value", "gate")
    return [matrix.shape[1] for matrix in all_of_them if matrix.block == 0 and matrix.linear.split(".")[-1] not in shared]
