"""Where DeepSpeed keeps the float32 weights and AdamW's moments under each ZeRO stage: the only place that looks inside its optimizers.

As of DeepSpeed 0.19. ZeRO-0 leaves them with the parameters. ZeRO-1 and -2 lay the parameters of a group behind one another and cut
that vector among the data-parallel ranks; each parameter knows its shard_slice as `_hp_mapping`. ZeRO-3 cuts every parameter by itself
and keeps the pieces in sub-groups, which under NVMe offload are on the disk between steps.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from launch.checkpoints.initial import InitialWeights
from launch.checkpoints.state import KINDS, Region, SavedState, ShardSlice

_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class OptimizerState:
    """What this rank's optimizer holds, as views of the memory that it trains in."""

    def __init__(
        self,
        engine,
        region_of: Callable[[str, nn.Parameter], tuple[tuple[int, ...], Region] | None],
        is_replica: Callable[[ShardSlice, nn.Parameter], bool],
    ):
        """`region_of` gives a parameter's whole shape and the part of it that this rank has, not counting what ZeRO cuts; or None to
        leave it out. `is_replica` says of a shard_slice that a checkpoint has it from another rank.
        """
        self._optimizer = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._adamw: torch.optim.AdamW = engine.optimizer if self._stage == 0 else engine.optimizer.optimizer
        self.slices: list[ShardSlice] = []
        self.owned: list[ShardSlice] = []
        """Those that go into a checkpoint from this rank; over all ranks every number is there once."""
        self._places: dict[str, tuple[Tensor, int, int]] = {}  # the optimizer's own tensor, where in it, of which sub-group
        for name, parameter in engine.module.named_parameters():
            if (placed := region_of(name, parameter)) and (found := self._find(parameter)):
                (shape, region), (place, start, count) = placed, found
                shard_slice = ShardSlice(name, shape, region, start, count)
                self._places[name] = place
                self.slices.append(shard_slice)
                if not is_replica(shard_slice, parameter):
                    self.owned.append(shard_slice)
        for slices in (self.slices, self.owned):
            slices.sort(key=self._sub_group)  # stable: in the order of the network within each

    def visit(self, slices: list[ShardSlice], keep_changes: bool = False) -> Iterator[tuple[ShardSlice, dict[str, Tensor]]]:
        """Each of the slices with its numbers by kind, float32 [count]: views, good until the next one is asked for."""
        for group, members in itertools.groupby(slices, key=self._sub_group):
            with self._swapped_in(group, keep_changes):
                for shard_slice in members:
                    flat, offset, _ = self._places[shard_slice.name]
                    tensors = {KINDS[0]: flat} | {kind: self._moments(flat)[kind] for kind in KINDS[1:]}
                    yield (
                        shard_slice,
                        {kind: tensor.detach().view(-1)[offset : offset + shard_slice.count] for kind, tensor in tensors.items()},
                    )

    @property
    def steps(self) -> int:
        """Optimizer steps that changed weights."""
        return max((int(state["step"]) for state in self._adamw.state.values() if "step" in state), default=0)

    @property
    def loss_scaler(self) -> dict | None:
        """The state of fp16's dynamic loss scale."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in _LOSS_SCALER} if getattr(scaler, "dynamic", False) else None

    @torch.no_grad()
    def read(self, saved: SavedState | InitialWeights) -> None:
        """Take this rank's slices from a checkpoint or from another model, one at a time. Raises UserError where it lacks one."""
        for shard_slice, values in self.visit(self.slices, keep_changes=True):
            for kind, into in values.items():
                saved.read(shard_slice, kind, into)

    @torch.no_grad()
    def begin_from(self, steps: int, loss_scaler: dict | None) -> None:
        """Go on after so many steps with what was read: all ranks make the training weights from the float32 ones."""
        for state in self._adamw.state.values():
            state["step"].fill_(steps)
        if loss_scaler is not None and self.loss_scaler is not None:
            for name, value in loss_scaler.items():
                setattr(self._optimizer.loss_scaler, name, value)
        self._refresh_training_weights()

    def _refresh_training_weights(self) -> None:
        """What the optimizer does with its float32 weights at the end of each step."""
        optimizer = self._optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                with self._swapped_in(group, keep_changes=False):
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            optimizer.invalidate_secondary_tensor()

    def _find(self, parameter: nn.Parameter) -> tuple[tuple[Tensor, int, int], int, int] | None:
        """The place of this rank's shard_slice of a parameter, its first number, and how many; None where it has none."""
        if self._stage == 0:
            return (parameter, 0, 0), 0, parameter.numel()
        if self._stage == 3:
            group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            size = parameter.partition_numel()
            start = size * self._optimizer._get_param_partition_rank(parameter)
            count = min(size, parameter.ds_numel - start)  # the last pieces are padded
            return ((self._optimizer.fp32_partitioned_groups_flat[group], int(offset), group), start, count) if count > 0 else None
        if (mapping := parameter._hp_mapping) is None:
            return None
        flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]
        place = flat, mapping.hp_fragment_address.start, 0
        return place, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel

    def _sub_group(self, shard_slice: ShardSlice) -> int:
        return self._places[shard_slice.name][2]

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one of its tensors; before the first step that is all zeros, as torch begins it."""
        state = self._adamw.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in KINDS[1:]}
        return state

    @contextlib.contextmanager
    def _swapped_in(self, group: int, keep_changes: bool) -> Iterator[None]:
        """Within it, a sub-group that lives on NVMe is in memory."""
        optimizer = self._optimizer
        if self._stage < 3 or not optimizer._swappable_optimizer_subgroup(group):
            yield
            return
        optimizer._optimizer_states_and_gradient_swap_in(group)
        # Moments made within have no file yet: let go unwritten, the next swap-in would read one that is not there, or a former run's.
        unwritten = not self._adamw.state.get(optimizer.fp32_partitioned_groups_flat[group])
        try:
            yield
        finally:  # a disk that refused a checkpoint must not keep the swap buffers
            if keep_changes or unwritten:
                optimizer._optimizer_states_and_gradient_swap_out(group)
            else:
                optimizer._release_swap_buffers(group)
