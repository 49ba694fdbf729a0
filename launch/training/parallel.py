"""Tensor and sequence parallelism, laid over the finished model from outside: the layers know nothing of it."""

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
    """Tensor parallelism within the stages of a pipeline. In its JSON DeepSpeed would take the stages for data ranks."""
    set_autotp_mode(training=True)
    cutter = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig.from_dict(PARTITION),
        training_mode=True,
    )
    cutter.mp_group, cutter.mp_size = group, size
    cutter._replace_module(model)
    cutter.register_replicated_grad_hooks(model)


def region_of(parameter: nn.Parameter, place: int) -> tuple[tuple[int, ...], Region]:
    """The whole shape of a parameter, and the part of it that the rank at `place` in a tensor-parallel group has."""
    about = getattr(parameter, DS_AUTOTP_UC_META, None)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: before ZeRO-3 cut it
    if not about or about["partition_dim"] is None:
        return shape, whole_region(shape)
    shape, cut = tuple(about["logical_shape"]), about["partition_dim"]
    first = sum(about["partition_sizes"][:place])
    region = [*whole_region(shape)]
    region[cut] = first, first + about["partition_sizes"][place]
    return shape, tuple(region)


def split_sequences(model: nn.Module, sequence_length: int, layout: Layout, rank: int) -> None:
    """Ulysses (Jacobs et al. 2023, arXiv 2309.14509): each rank has a part of every sequence, and in attention all of it for some heads.

    DeepSpeed is not told. To its optimizers a part of a sequence is a sample: told, 0.19.8 scales the gradients of ZeRO-3 by 1/size
    or not, by the path that a bucket takes, and ZeRO-1 in bf16 crashes.
    """
    size, place = layout.sequence_parallel_size, layout.sequence_rank(rank)
    made = [(members, dist.new_group(members)) for members in layout.sequence_groups()]  # every rank makes every group
    group = next(group for members, group in made if rank in members)
    for module in model.modules():
        if isinstance(module, AbsolutePositions):
            module.first_position = sequence_length // size * place
        if isinstance(module, Attention):
            module.mix = _mix_over_ranks(module.mix, size, group)


def _mix_over_ranks(mix, size: int, group: dist.ProcessGroup):
    exchange = DistributedAttention(mix, group, scatter_idx=2, gather_idx=1)

    def mixed(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, cache=None, relative_table=None) -> Tensor:
        assert relative_table is None, "a row of relative positions' table is a head's, and each rank has other heads"
        if cache is not None:  # generation: every rank has the whole text
            return mix(query, key, value, segments, cache)
        if key.shape[2] < size:  # each rank needs a key
            key, value = (x.repeat_interleave(size // x.shape[2], dim=2) for x in (key, value))
        return exchange(query, key, value, 0, None, segments)

    return mixed
