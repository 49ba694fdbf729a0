"""How all ranks together write, publish and read the checkpoint of a run. Every function is called by every rank."""

import hashlib
from pathlib import Path

import torch

from data.command_line import UserError
from launch.checkpoints import checkpoint, state
from launch.checkpoints.initial import InitialWeights
from launch.ranks.collectives import CollectedError, Ranks
from launch.training.deepspeed_state import OptimizerState
from model.config import ModelConfig
from model.finite import is_finite
from model.transformer import parameter_shapes


def save(current: OptimizerState, config: ModelConfig, ranks: Ranks, root: Path, step: int, about: dict) -> str | None:
    """Write and publish the checkpoint of `step`, whose manifest begins with `about`. Return the error message of any rank, or None.

    A failure on any rank leaves the checkpoints as they were, and training can continue. Raises FloatingPointError on every rank, and
    writes nothing, if a weight or an optimizer state is not finite: such a model must not replace the checkpoints before it.
    """
    checksums, not_finite = _checksums(current, config, ranks)
    if not_finite:
        raise FloatingPointError(f"The checkpoint of step {step} was not written: {not_finite}. {checkpoint.describe_newest(root)}")
    collected = CollectedError()
    folder = root / f"{checkpoint.folder_name(step)}.tmp-{about['run_id']}"
    if ranks.is_first:
        collected.run(lambda: checkpoint.begin(root, step, about["run_id"]))
    if error := ranks.first_error_of_any_rank(collected.message):
        return error
    collected.run(lambda: _write(current, folder, ranks.process.rank))
    if ranks.all_ranks(collected.message is None) and ranks.is_first:
        manifest = about | current.optimizer.record() | {"optimizer": current.counters, "checksums": checksums}
        collected.run(lambda: checkpoint.publish(folder, step, manifest))
    if (error := ranks.first_error_of_any_rank(collected.message)) and ranks.is_first:
        checkpoint.discard(folder)
    return error


def load(current: OptimizerState, config: ModelConfig, ranks: Ranks, folder: Path) -> None:
    """Read weights, optimizer states and loss scale from a checkpoint of any layout.

    Raises, on every rank, UserError if it does not hold this model with this optimizer or a value is not finite, and RuntimeError if the
    values in memory then have other checksums than the saved values.
    """
    manifest = checkpoint.read_manifest(folder)
    if refusal := current.optimizer.refusal_of(folder, manifest):
        raise UserError(refusal)
    _read(current, ranks, state.SavedState(folder))
    current.resume(**manifest["optimizer"])
    checksums, not_finite = _checksums(current, config, ranks)
    if wrong := [name for name, sums in checksums.items() if sums != manifest["checksums"].get(name)]:
        raise RuntimeError(f"{folder} was read, but {len(wrong)} parameters have other checksums than were saved, for example {wrong[0]}.")
    if not_finite:  # an earlier version wrote it
        raise UserError(f"{folder} cannot be resumed: {not_finite}. Move it away to resume from an earlier checkpoint.")


def start_from(current: OptimizerState, config: ModelConfig, ranks: Ranks, weights: InitialWeights) -> str:
    """Read the weights of another model before the first step. Return a hash of the resulting weights, the same on every rank.

    Raises UserError on every rank if a shape differs or a weight is not finite.
    """
    _read(current, ranks, weights)
    current.resume(0)
    checksums, not_finite = _checksums(current, config, ranks)
    if not_finite:
        raise UserError(f"init {weights.path} cannot be trained: {not_finite}. The file is damaged, or its training diverged.")
    return hashlib.sha256(repr(checksums).encode()).hexdigest()


def _write(current: OptimizerState, folder: Path, rank: int) -> None:
    """Write the file of one rank, and its entry for the manifest."""
    entries = {}
    if current.owned:
        file = checkpoint.HashingFile(folder / f"rank_{rank:05d}.safetensors")
        state.write(file, current.owned, current.optimizer.kinds, current.visit(current.owned))
        entries[file.path.name] = file.finish()
    checkpoint.write_part(folder, rank, entries)


def _read(current: OptimizerState, ranks: Ranks, saved: state.SavedState | InitialWeights) -> None:
    collected = CollectedError()
    collected.run(lambda: current.read(saved))
    if error := ranks.first_error_of_any_rank(collected.message):
        raise UserError(error)


def _checksums(current: OptimizerState, config: ModelConfig, ranks: Ranks) -> tuple[dict[str, list[int]], str | None]:
    """Return the checksums of each parameter, one for each kind of tensor, and the first tensor of any rank that is not finite, or None.

    Both are the same on every rank.
    """
    kinds = current.optimizer.kinds
    rows = {name: row for row, name in enumerate(parameter_shapes(config))}
    sums = torch.zeros(len(rows), len(kinds), dtype=torch.int64)
    not_finite = None
    for shard_slice, tensors in current.visit(current.owned):
        sums[rows[shard_slice.name]] += torch.tensor([state.checksum(tensors[kind], shard_slice) for kind in kinds])
        for kind in kinds:
            dtype = current.training_dtype if kind == state.WEIGHT else torch.float32
            if not_finite is None and not is_finite(tensors[kind], dtype):
                named = f"{shard_slice.name} ({kind})"
                not_finite = f"{named} has values that are not finite in {str(dtype).removeprefix('torch.')} on rank {ranks.process.rank}"
    sums = sums.to(ranks.device)
    ranks.sum_in_place([sums])
    return dict(zip(rows, sums.tolist(), strict=True)), ranks.first_error_of_any_rank(not_finite)
