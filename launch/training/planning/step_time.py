"""Seconds of an optimizer step by part: the work of a rank, over the speeds of its device and network.

A micro-batch takes its computation over the speed of the device and its exchange over the speed of the links. A step takes m + p - 1
micro-batches in a pipeline of p stages (Narayanan et al. 2021, arXiv 2104.04473, section 2.2), and the exchange of its gradients.
"""

import dataclasses

from launch.ranks.layout import Layout
from launch.training.estimates import parameters_per_rank
from launch.training.planning import devices
from launch.training.planning.activations import DTYPES
from launch.training.planning.devices import Device, Network
from launch.training.planning.memory import stack_bytes
from model.config import ModelConfig, flops_per_token

TOKENS_OF_FIT = 2048
"""Tokens of a sequence in the runs that devices.SMALL_BATCH was fitted to."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one rank: of a micro-batch, forward and backward pass, and of the end of a step."""

    products: float
    """FLOPs of matrix products, with those of recomputation."""
    attention: float
    """FLOPs of attention's two products over all keys, with those of recomputation."""
    kept: float
    """Bytes that the blocks keep, and keep again when they are recomputed."""
    exchanged: float
    """Bytes that tensor and sequence parallelism send."""
    gathered: float
    """Bytes of weights and gradients that ZeRO-3 sends."""
    reduced: float
    """Bytes of float32 gradients that the data ranks send in each micro-batch under ZeRO-2, which keeps only its own part of the sum."""
    gradients: float
    """Bytes that the data ranks send at the end of a step: gradients in float32, and new weights."""
    factor: float
    """Factor of the computation's time, for odd heads and for small micro-batches of tensor parallelism."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part."""

    compute: float
    """Forward and backward passes of all micro-batches of a rank."""
    exchange: float
    """Exchange inside micro-batches: tensor and sequence parallelism, gradients under ZeRO-2, weights and gradients under ZeRO-3."""
    bubble: float
    """Waiting of a pipeline stage."""
    gradients: float
    """Sum of the gradients over the data ranks, and the new weights back to them."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.exchange + self.bubble + self.gradients


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The devices of a run and how they are connected."""

    device: Device
    network: Network
    gpus_per_node: int

    def exchange_bandwidth(self, size: int) -> float:
        """Return bytes a second of each rank of a tensor-parallel or sequence-parallel group of `size` ranks side by side."""
        inside = self.device.link_bandwidth * devices.LINK_SHARE
        return inside if size <= self.gpus_per_node else min(inside, self.network.bandwidth * devices.NETWORK_SHARE)

    def data_bandwidth(self, size: int, stride: int) -> float:
        """Return bytes a second at which each of `size` data ranks, `stride` ranks from one another, sums its gradients.

        Inside a node it is the link's. Between nodes the ranks of a group that share a node send through all their adapters.
        """
        between = self.network.bandwidth * max(1, self.gpus_per_node // stride)
        is_inside = size * stride <= self.gpus_per_node
        return devices.NETWORK_SHARE * (self.device.link_bandwidth if is_inside else min(self.device.link_bandwidth, between))

    def gather_bandwidth(self, ranks: int) -> float:
        """Return bytes a second at which ZeRO-3 gathers, as fitted; less in proportion if the network is slower than the fit's."""
        if ranks <= self.gpus_per_node:
            return self.device.speeds.gather_bytes
        of_a_node = self.network.bandwidth * self.gpus_per_node
        return self.device.speeds.gather_bytes * min(1.0, of_a_node / (8 * devices.GATHER_NETWORK))


def has_odd_heads(model: ModelConfig) -> bool:
    """True if the head size is not a multiple of 8, for which tensor cores need padding or other kernels."""
    return model.head_size % 8 != 0


def odd_head_warnings(model: ModelConfig) -> list[str]:
    """Return a warning if the head size makes a GPU slow."""
    if not has_odd_heads(model):
        return []
    times = f"published runs with such heads took {devices.ODD_HEAD_FACTOR} times as long"
    advice = "Choose model.num_attention_heads so that the head size is a multiple of 64"
    return [f"model.head_size {model.head_size} is not a multiple of 8: {times}. {advice}"]


def work_of(
    model: ModelConfig, sequences: int, recompute: bool, layout: Layout, zero_stage: int, precision: str = "bf16", split_head: bool = False
) -> Work:
    """Return the work of a rank for micro-batches of `sequences` sequences, as a mean over the pipeline stages.

    `split_head`: tensor parallelism divides the head too, which ours does not. With recomputation blocks run forward twice.
    """
    tokens, stages, tensor = sequences * model.sequence_length, layout.pipeline_stages, layout.tensor_parallel_size
    own, again = tokens / layout.sequence_parallel_size, 4 / 3 if recompute else 1.0
    head = 6.0 * model.vocab_size * model.hidden_size * model.token_head
    products = flops_per_token(model, 1) - head  # a sequence of one token has no attention to speak of
    attention = flops_per_token(model, causal=False) - products - head
    kept = stack_bytes(model, sequences, model.sequence_length, "cuda", precision, False, 1)
    small = 1 + devices.SMALL_BATCH * TOKENS_OF_FIT / own if tensor > 1 or stages > 1 else 1.0
    whole = parameters_per_rank(model, layout)
    return Work(
        products=own * (products * again / tensor + head / (tensor if split_head else 1)) / stages,
        attention=own * attention * again / tensor / stages,
        kept=kept * again / tensor / stages / layout.sequence_parallel_size,
        exchanged=_exchanged(model, own, recompute, layout, DTYPES[precision].itemsize),
        gathered=3 * _others(layout.zero_size) * whole * DTYPES[precision].itemsize if zero_stage == 3 else 0.0,
        reduced=4 * _others(layout.zero_size) * whole if zero_stage == 2 else 0.0,
        gradients={0: 6, 1: 6, 2: 2, 3: 0}[zero_stage] * _others(layout.zero_size) * whole,
        factor=small * (devices.ODD_HEAD_FACTOR if has_odd_heads(model) else 1.0),
    )


def _exchanged(model: ModelConfig, tokens: float, recompute: bool, layout: Layout, size: int) -> float:
    """Return the bytes that a rank sends inside a micro-batch of `tokens` tokens of its own.

    Tensor parallelism sums the hidden states twice in a block's forward and twice in its backward pass, and twice more if the block is
    computed again (Shoeybi et al. 2019, arXiv 1909.08053, section 3); a sum sends everything twice. Sequence parallelism exchanges
    queries, keys, values and the result in each pass (Jacobs et al. 2023, arXiv 2309.14509, section 3.2).
    """
    tensor, sequence, passes = layout.tensor_parallel_size, layout.sequence_parallel_size, 3 if recompute else 2
    hidden = tokens * model.hidden_size * size * model.total_blocks / layout.pipeline_stages
    keys = 2 * model.num_key_value_heads / model.num_attention_heads
    return hidden * passes * (2 * 2 * _others(tensor) + (2 + keys) / tensor * _others(sequence))


def _others(size: int) -> float:
    """Return the share of something divided among `size` ranks that the other ranks have."""
    return (size - 1) / size


def step_time(work: Work, micro_batches: int, layout: Layout, cluster: Cluster) -> StepTime:
    """Return the time of a step of `micro_batches` micro-batches on each data rank."""
    device, speeds = cluster.device, cluster.device.speeds
    peak, tensor, sequence = device.tflops * 1e12, layout.tensor_parallel_size, layout.sequence_parallel_size
    compute = work.products / (peak * speeds.products) + work.attention / (peak * speeds.attention)
    compute = work.factor * (compute + work.kept * devices.PASSES / device.memory_bandwidth)
    data = cluster.data_bandwidth(layout.zero_size, tensor)
    exchange = work.exchanged / cluster.exchange_bandwidth(tensor * sequence) + work.reduced / data
    exchange += work.gathered / cluster.gather_bandwidth(layout.world_size)
    return StepTime(
        compute=micro_batches * compute,
        exchange=micro_batches * exchange,
        bubble=(layout.pipeline_stages - 1) * (compute + exchange),
        gradients=work.gradients / data,
    )


def utilisation(model: ModelConfig, sequences: int, seconds: float, devices_used: int, device: Device) -> float:
    """Return the model FLOPs utilisation of a step of `sequences` sequences: attention causal, recomputation not counted."""
    return flops_per_token(model) * sequences * model.sequence_length / (seconds * devices_used * device.tflops * 1e12)
