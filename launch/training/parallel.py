"""Tensor and sequence parallelism, applied to the finished model. The layers do not know about it."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed import set_autotp_mode
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from launch.checkpoints.state import Region, whole_region
from launch.ranks.layout import Layout
from launch.training.deepspeed_config import PARTITION
from model.attention import Attention
from model.positions import AbsolutePositions


def split_matrices(model: nn.Module, size: int, group: dist.ProcessGroup) -> None:
    """Split the matrices of a pipeline stage among the tensor-parallel ranks of `group`.

    Asked for it in its JSON, DeepSpeed would take the stages for data ranks.
    """
    set_autotp_mode(training=True)
    splitter = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig.from_dict(PARTITION),
        training_mode=True,
    )
    splitter.mp_group, splitter.mp_size = group, size
    splitter._replace_module(model)
    splitter.register_replicated_grad_hooks(model)


def region_of(parameter: Any, tensor_rank: int) -> tuple[tuple[int, ...], Region]:
    """Return the whole shape of a parameter, and the region of it that a rank of a tensor-parallel group has.

    DeepSpeed adds attributes to parameters, which have no types.
    """
    split = getattr(parameter, DS_AUTOTP_UC_META, None)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: before ZeRO-3 divided it
    if not split or split["partition_dim"] is None:
        return shape, whole_region(shape)
    shape, dimension = tuple(split["logical_shape"]), split["partition_dim"]
    first = sum(split["partition_sizes"][:tensor_rank])
    region = [*whole_region(shape)]
    region[dimension] = first, first + split["partition_sizes"][tensor_rank]
    return shape, tuple(region)


def split_sequences(model: nn.Module, sequence_length: int, layout: Layout, rank: int) -> None:
    """Apply Ulysses (Jacobs et al. 2023, arXiv 2309.14509): a rank has a part of each sequence, and in attention all of it for some heads.

    DeepSpeed does not know about it: to its optimizers a part of a sequence is a sample. With its own setting, version 0.19.8 scales
    some gradients of ZeRO-3 by 1/size, depending on the bucket, and ZeRO-1 in bf16 crashes.
    """
    size, sequence_rank = layout.sequence_parallel_size, layout.sequence_rank(rank)
    created = [(members, dist.new_group(members)) for members in layout.sequence_groups()]  # every rank must create every group
    group = next(group for members, group in created if rank in members)
    for module in model.modules():
        if isinstance(module, AbsolutePositions):
            module.first_position = sequence_length // size * sequence_rank
        if isinstance(module, Attention):
            module.mix = _mix_over_ranks(module.mix, size, group)  # type: ignore[method-assign]  # of this instance only


def _mix_over_ranks(mix: Callable, size: int, group: dist.ProcessGroup) -> Callable:
    """Return the attention `mix` with heads exchanged for parts of sequences among the ranks of `group` before and after it."""
    exchange = DistributedAttention(mix, group, scatter_idx=2, gather_idx=1)

    def mixed(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, cache=None, relative_table=None) -> Tensor:
        """Run the attention over whole sequences, with this rank's share of the heads."""
        assert relative_table is None, "a row of relative positions' table belongs to one head, and each rank has other heads"
        if cache is not None:  # generation: every rank has the whole text
            return mix(query, key, value, segments, cache)
        if key.shape[2] < size:  # each rank needs a key/value head
            key, value = (x.repeat_interleave(size // x.shape[2], dim=2) for x in (key, value))
        return exchange(query, key, value, 0, None, segments)

    return mixed
