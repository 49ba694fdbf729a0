"""Seconds of an optimizer step by part, from the work of a rank and the speeds of its device and network.

The form is that of published step-time models: a micro-batch takes its computation over the speed of the device and its exchange over the
speed of the links; a step takes m + p - 1 micro-batches in a pipeline of p stages, and the exchange of its gradients.
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
class StepTime:
    """Seconds of one optimizer step by part."""

    compute: float
    """Forward and backward passes of all micro-batches of a rank."""
    exchange: float
    """Exchange inside micro-batches: tensor and sequence parallelism, and the weights and gradients of ZeRO-3."""
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

    def group_bandwidth(self, size: int, stride: int = 1) -> float:
        """Return bytes a second of each rank of a group of `size` ranks, each `stride` ranks from the next.

        Inside a node it is the link's. Between nodes the ranks of a group that share a node send through all their adapters.
        """
        if size * stride <= self.gpus_per_node:
            return self.device.link_bandwidth * devices.LINK_SHARE
        beside = max(1, self.gpus_per_node // stride)
        return min(self.device.link_bandwidth, self.network.bandwidth * beside) * devices.NETWORK_SHARE


def has_odd_heads(model: ModelConfig) -> bool:
    """True if the head size is not a multiple of 8, for which tensor cores need padding or other kernels."""
    return model.head_size % 8 != 0


def micro_batch_seconds(
    model: ModelConfig, sequences: int, recompute: bool, layout: Layout, device: Device, precision: str = "bf16"
) -> float:
    """Return the seconds of a rank's forward and backward pass of a micro-batch, without exchange.

    Products, attention and the movement of the bytes that blocks keep have a speed each. Recomputation adds a third.
    """
    tokens = sequences * model.sequence_length
    ranks = layout.pipeline_stages * layout.tensor_parallel_size * layout.sequence_parallel_size
    again = 4 / 3 if recompute else 1.0
    head = 6.0 * model.vocab_size * model.hidden_size * model.token_head
    products = flops_per_token(model, 1, causal=True) - head  # a sequence of one token has no attention to speak of
    attention = flops_per_token(model, causal=False) - products - head
    kept = stack_bytes(model, sequences, model.sequence_length, "cuda", precision, False, 1)
    peak, speeds = device.tflops * 1e12, device.speeds
    seconds = tokens * (products * again + head) / (peak * speeds.products) + tokens * attention * again / (peak * speeds.attention)
    seconds = (seconds + kept * again * speeds.passes / device.memory_bandwidth) / ranks
    own = sequences * model.sequence_length / TOKENS_OF_FIT / layout.sequence_parallel_size
    split = layout.tensor_parallel_size > 1
    odd = devices.ODD_HEAD_FACTOR if has_odd_heads(model) else 1.0
    return seconds * odd * (1 + devices.SMALL_BATCH / own if split else 1.0)


def exchange_seconds(
    model: ModelConfig, sequences: int, recompute: bool, layout: Layout, cluster: Cluster, zero_stage: int, precision: str
) -> float:
    """Return the seconds of exchange in a micro-batch.

    Tensor parallelism sums the hidden states twice in a block's forward and twice in its backward pass, and twice more if the block is
    computed again (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Sequence parallelism exchanges queries, keys, values and the result
    in each (Jacobs et al. 2023, arXiv 2309.14509, section 3.2). ZeRO-3 gathers the weights twice and reduces the gradients once.
    """
    size, tensor, sequence = DTYPES[precision].itemsize, layout.tensor_parallel_size, layout.sequence_parallel_size
    blocks = model.total_blocks / layout.pipeline_stages
    hidden = sequences * model.sequence_length / sequence * model.hidden_size * size
    passes = 3 if recompute else 2
    seconds = 0.0
    if tensor > 1:
        seconds += 2 * passes * 2 * (tensor - 1) / tensor * hidden * blocks / cluster.group_bandwidth(tensor)
    if sequence > 1:
        keys = 2 * model.num_key_value_heads / model.num_attention_heads
        seconds += passes * (2 + keys) * (sequence - 1) / sequence * hidden * blocks / cluster.group_bandwidth(sequence, tensor)
    if zero_stage == 3 and layout.zero_size > 1:
        whole = parameters_per_rank(model, layout) * size
        speed = cluster.device.speeds.gather_bytes
        if layout.world_size > cluster.gpus_per_node:
            speed *= min(1.0, cluster.network.bandwidth * min(cluster.gpus_per_node, 8) / 8 / devices.GATHER_NETWORK)
        seconds += 3 * (layout.zero_size - 1) / layout.zero_size * whole / speed
    return seconds


def gradient_seconds(model: ModelConfig, layout: Layout, cluster: Cluster, zero_stage: int) -> float:
    """Return the seconds in which the data ranks sum their float32 gradients and share the new weights, at the end of a step."""
    ranks = layout.zero_size
    if ranks == 1 or zero_stage == 3:
        return 0.0
    moved = (4 + 2) * (ranks - 1) / ranks * parameters_per_rank(model, layout)
    return moved / cluster.group_bandwidth(ranks, layout.tensor_parallel_size)


def step_seconds(
    model: ModelConfig,
    sequences: int,
    micro_batches: int,
    recompute: bool,
    layout: Layout,
    cluster: Cluster,
    zero_stage: int,
    precision: str = "bf16",
) -> StepTime:
    """Return the time of a step of `micro_batches` micro-batches of `sequences` sequences on each data rank."""
    compute = micro_batch_seconds(model, sequences, recompute, layout, cluster.device, precision)
    exchange = exchange_seconds(model, sequences, recompute, layout, cluster, zero_stage, precision)
    stages = layout.pipeline_stages
    return StepTime(
        compute=micro_batches * compute,
        exchange=micro_batches * exchange,
        bubble=(stages - 1) * (compute + exchange),
        gradients=gradient_seconds(model, layout, cluster, zero_stage),
    )


def utilisation(model: ModelConfig, sequences: int, seconds: float, devices_used: int, device: Device) -> float:
    """Return the model FLOPs utilisation of a step of `sequences` sequences: attention causal, recomputation not counted."""
    return flops_per_token(model) * sequences * model.sequence_length / (seconds * devices_used * device.tflops * 1e12)
