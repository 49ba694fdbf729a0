"""Where DeepSpeed keeps the float32 weights and the optimizer's states under each ZeRO stage. No other module looks inside its optimizers.

As of DeepSpeed 0.19. ZeRO-0 leaves them with the parameters. ZeRO-1 and -2 concatenate the parameters of a group and divide that
vector among the data-parallel ranks; `_hp_mapping` of a parameter gives this rank's slice of it. ZeRO-3 divides every parameter
separately and keeps the parts in sub-groups, which under NVMe offload are on disk between steps.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launch.checkpoints.initial import InitialWeights
from launch.checkpoints.state import WEIGHT, Region, SavedState, ShardSlice
from launch.training.optimizers import Optimizer
from launch.training.optimizers.beta2 import beta2_of, restore, sum_of
from launch.training.optimizers.pieces import Piece

_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _Location(NamedTuple):
    """Where the values of a slice are in memory."""

    tensor: Tensor
    """A tensor that the optimizer updates."""
    offset: int
    """Index of the slice's first value in that tensor, flattened."""
    sub_group: int
    """The sub-group of ZeRO-3 that the tensor belongs to; 0 under other stages."""


class OptimizerState:
    """The weights and optimizer states that this rank's optimizer holds, as views of the memory that it trains in."""

    def __init__(
        self,
        engine: Any,  # a deepspeed.DeepSpeedEngine, of whose optimizers this module reads attributes that have no types
        optimizer: Optimizer,
        region_of: Callable[[str, nn.Parameter], tuple[tuple[int, ...], Region] | None],
        is_replica: Callable[[ShardSlice, nn.Parameter], bool],
    ):
        """Find this rank's slice of every parameter.

        `region_of` returns a parameter's whole shape and the region of it that this rank has before ZeRO divides it; None leaves the
        parameter out. `is_replica` is true for a slice that another rank writes into checkpoints.
        """
        self.optimizer = optimizer
        self._zero = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._built: torch.optim.Optimizer = engine.optimizer if self._stage == 0 else engine.optimizer.optimizer
        self.training_dtype: torch.dtype = next(engine.module.parameters()).dtype
        """Type of the weights that the network computes with."""
        self.slices: list[ShardSlice] = []
        self.owned: list[ShardSlice] = []
        """The slices that this rank writes into checkpoints. Over all ranks every value is in exactly one of them."""
        self._locations: dict[str, _Location] = {}
        for name, parameter in engine.module.named_parameters():
            if (placed := region_of(name, parameter)) and (found := self._find(parameter)):
                (shape, region), (location, start, count) = placed, found
                shard_slice = ShardSlice(name, shape, region, start, count)
                self._locations[name] = location
                self.slices.append(shard_slice)
                if not is_replica(shard_slice, parameter):
                    self.owned.append(shard_slice)
        for slices in (self.slices, self.owned):
            slices.sort(key=self._sub_group)  # stable: in the order of the network within each

    def visit(self, slices: list[ShardSlice], keep_changes: bool = False) -> Iterator[tuple[ShardSlice, dict[str, Tensor]]]:
        """Yield each slice with its tensors by kind, float32 [count]: views, valid until the next slice is asked for."""
        for group, members in itertools.groupby(slices, key=self._sub_group):
            with self._swapped_in(group, keep_changes):
                for shard_slice in members:
                    tensor, offset, _ = self._locations[shard_slice.name]
                    states = self.optimizer.state_of(self._built, tensor)
                    whole = {WEIGHT: tensor} | {kind: states[kind] for kind in self.optimizer.states}
                    yield shard_slice, {kind: one.detach().view(-1)[offset : offset + shard_slice.count] for kind, one in whole.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the optimizer updates, in an order that is the same on every rank of a pipeline stage."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [tensor for group in self._built.param_groups for tensor in group["params"]]

    def pieces(self, place: int, is_replica: Callable[[ShardSlice], bool]) -> list[Piece]:
        """Return the slices of this rank, which is rank `place` of its pipeline stage, with their position in `tensors`."""
        index = {tensor: number for number, tensor in enumerate(self.tensors)}
        located = [(one, self._locations[one.name]) for one in self.slices]
        return [Piece(one, index[at.tensor], at.offset, place, is_replica(one)) for one, at in located]

    @property
    def steps(self) -> int:
        """Number of optimizer steps that changed weights."""
        return self.optimizer.steps(self._built)

    @property
    def counters(self) -> dict:
        """What a checkpoint holds besides tensors, and `resume` takes."""
        built = self._built
        return {"steps": self.steps, "loss_scaler": self.loss_scaler, "beta2": beta2_of(built), "sum_of_weights": sum_of(built)}

    @property
    def loss_scaler(self) -> dict | None:
        """State of fp16's dynamic loss scale; None without one."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in _LOSS_SCALER} if getattr(scaler, "dynamic", False) else None

    @torch.no_grad()
    def read(self, saved: SavedState | InitialWeights) -> None:
        """Copy this rank's slices from a checkpoint or another model, one at a time. Raises UserError if one is missing."""
        for shard_slice, tensors in self.visit(self.slices, keep_changes=True):
            for kind, into in tensors.items():
                saved.read(shard_slice, kind, into)

    @torch.no_grad()
    def resume(self, steps: int, loss_scaler: dict | None = None, beta2: float | None = None, sum_of_weights: float | None = None) -> None:
        """Continue after `steps` steps with what was read. All ranks then update the training weights from the float32 weights."""
        self.optimizer.set_steps(self._built, steps)
        restore(self._built, beta2, sum_of_weights)
        if loss_scaler is not None and self.loss_scaler is not None:
            for name, value in loss_scaler.items():
                setattr(self._zero.loss_scaler, name, value)
        self._refresh_training_weights()

    def _refresh_training_weights(self) -> None:
        """Do what DeepSpeed does with the float32 weights at the end of each step."""
        zero = self._zero
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                with self._swapped_in(group, keep_changes=False):
                    zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def _find(self, parameter: Any) -> tuple[_Location, int, int] | None:
        """Return the location of this rank's slice of a parameter, the index of its first value, and its length; None if there is none."""
        if self._stage == 0:
            return _Location(parameter, 0, 0), 0, parameter.numel()
        if self._stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            size = parameter.partition_numel()
            start = size * self._zero._get_param_partition_rank(parameter)
            count = min(size, parameter.ds_numel - start)  # the last parts are padded
            return (_Location(self._zero.fp32_partitioned_groups_flat[group], int(offset), group), start, count) if count > 0 else None
        if (mapping := parameter._hp_mapping) is None:
            return None
        flat = self._built.param_groups[mapping.param_group_index]["params"][0]
        location = _Location(flat, mapping.hp_fragment_address.start, 0)
        return location, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel

    def _sub_group(self, shard_slice: ShardSlice) -> int:
        return self._locations[shard_slice.name].sub_group

    @contextlib.contextmanager
    def _swapped_in(self, group: int, keep_changes: bool) -> Iterator[None]:
        """Keep a sub-group that is stored on NVMe in memory while the context lasts."""
        zero = self._zero
        if self._stage < 3 or not zero._swappable_optimizer_subgroup(group):
            yield
            return
        zero._optimizer_states_and_gradient_swap_in(group)
        # States created in this context have no file yet. If they were released unwritten, the next swap-in would read a missing file, or
        # one of an earlier run.
        unwritten = not self._built.state.get(zero.fp32_partitioned_groups_flat[group])
        try:
            yield
        finally:  # a full disk during a checkpoint must not keep the swap buffers
            if keep_changes or unwritten:
                zero._optimizer_states_and_gradient_swap_out(group)
            else:
                zero._release_swap_buffers(group)
