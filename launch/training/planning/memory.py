"""Memory of a rank by part: model states, activations, logits, buffers, and what the process itself takes."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from launch.ranks.layout import Layout
from launch.training.estimates import model_state_bytes, parameters_per_rank
from launch.training.optimizers import optimizer_for
from launch.training.planning.activations import DTYPES, block_bytes, block_input_bytes
from launch.training.settings import RunSettings
from model.config import ModelConfig, Part, count_parameters

DeviceType = Literal["cpu", "cuda"]

ALLOCATOR_FACTOR = 1.02
"""Memory that the allocator reserves for each byte of tensors. Fitted by launch/benchmarks/planner.py on BLOOM's runs, 2026-12-01."""
BASE_BYTES = 7.2e9
"""Memory of a process on a GPU beside that: CUDA's context, NCCL's buffers, workspaces, fragments. Fitted in the same way."""
LEAST_BASE_BYTES = 1e9
"""The same for a run with few tensors; a rough value for CUDA's context and workspaces."""
BASE_SHARE = 0.3
"""Growth of that with each byte of tensors, up to BASE_BYTES. nanotron's runs, whose tensors begin at 5 GB, take 1.2 to 1.6 times as much
memory as tensors."""
CPU_BASE_BYTES = 0.5e9
"""Memory of a process on a CPU beside its tensors: Python with torch and DeepSpeed, measured on the demo."""
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Float32 logits in one chunk of the loss (model/loss.py)."""
_CHUNKS = 3
"""Copies of a chunk that the loss has at one time."""
_BUCKET = 500_000_000
"""DeepSpeed's default of reduce_bucket_size and allgather_bucket_size, in numbers."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank. In a pipeline the model states are a mean over the stages, and activations those of the first."""

    parts: Mapping[str, float]
    """Bytes of tensors by part: weights, gradients, optimizer, and so on."""
    elsewhere: frozenset[str]
    """Parts that are offloaded and take no memory of the device."""
    device: DeviceType

    @property
    def tensors(self) -> float:
        """Bytes of the tensors on the device."""
        return sum(size for name, size in self.parts.items() if name not in self.elsewhere)

    @property
    def least(self) -> float:
        """Bytes that the device needs even if the allocator wastes nothing."""
        return self.tensors + (LEAST_BASE_BYTES if self.device == "cuda" else CPU_BASE_BYTES)

    @property
    def total(self) -> float:
        """Bytes that the device is expected to need."""
        if self.device == "cpu":
            return self.least
        return ALLOCATOR_FACTOR * self.tensors + min(BASE_BYTES, LEAST_BASE_BYTES + BASE_SHARE * self.tensors)


def stack_bytes(
    model: ModelConfig, sequences: int, tokens: int, device: DeviceType, precision: str, recompute: bool, tensor_parallel_size: int
) -> float:
    """Return the bytes that all blocks of a model keep for one micro-batch; with `recompute` the inputs of the blocks."""
    if recompute:
        return model.total_blocks * block_input_bytes(model, sequences, tokens, precision)
    parts: list[tuple[int, Part | None]] = [(model.num_layers, None)]
    if model.num_decoder_layers:
        parts = [(model.num_layers, "encoder"), (model.num_decoder_layers, "decoder")]
    counted = (blocks * block_bytes(model, sequences, tokens, device, precision, tensor_parallel_size, part) for blocks, part in parts)
    return sum(counted)


def micro_batches_in_flight(micro_batches: int, stages: int, schedule: str = "1f1b") -> float:
    """Return the micro-batches whose activations the first stage keeps at one time.

    One forward, one backward: at most one for each stage (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). DualPipeV: 2p + 1 halves
    of a stage.
    """
    return stages + 0.5 if schedule == "dualpipev" and stages > 1 else min(micro_batches, stages)


def activation_bytes(
    model: ModelConfig,
    sequences: int,
    tokens: int,
    device: DeviceType,
    precision: str,
    recompute: bool = False,
    layout: Layout | None = None,
    in_flight: float = 1,
) -> float:
    """Return the bytes that the first pipeline stage keeps for `in_flight` micro-batches, and with `recompute` one block beside them.

    `tokens` are those of a whole sequence; the ranks of sequence parallelism have a part of it each.
    """
    layout = layout or Layout(1)
    own, tensor = max(1, tokens // layout.sequence_parallel_size), layout.tensor_parallel_size
    kept = stack_bytes(model, sequences, own, device, precision, recompute, tensor) * in_flight / layout.pipeline_stages
    return kept + (block_bytes(model, sequences, own, device, precision, tensor) if recompute else 0)


def logit_bytes(model: ModelConfig, sequences: int, tokens: int, device: DeviceType, precision: str) -> float:
    """Return the bytes of the logits, of the gradient that the loss keeps beside them, and of the loss's chunks (model/loss.py)."""
    if not model.token_head:
        return 0.0
    size = DTYPES[precision].itemsize
    copies = 1 + (model.logit_softcap is not None) + (model.architecture == "encoder")
    of_a_logit = copies * size + (4 if precision == "fp16" else size)
    logits = float(sequences * tokens * model.vocab_size)
    return logits * of_a_logit + _CHUNKS * min(_CHUNK_BYTES[device], 4 * logits)


def run_memory(settings: RunSettings, merged_json: dict, layout: Layout, device: DeviceType, teacher: ModelConfig | None = None) -> Memory:
    """Return the memory of a rank of a run.

    `merged_json` is DeepSpeed's completed JSON, or one whose training numbers are still "auto".
    """
    zero, model, precision = merged_json["zero_optimization"], settings.model, settings.precision
    pipeline = merged_json.get("pipeline", {}) if layout.pipeline_stages > 1 else {}
    schedule = pipeline.get("schedule", "1f1b")
    parameters = parameters_per_rank(model, layout, schedule)
    if layout.pipeline_stages > 1:  # stages are cut by their parameters, but an embedding is in one piece
        parameters = max(parameters, model.vocab_size * model.hidden_size)
    stage = int(zero.get("stage", 0))
    state_bytes = optimizer_for(settings.optimizer).state_bytes
    parts = model_state_bytes(parameters, stage, layout.zero_size, precision, state_bytes)
    group = int(_number(zero, "zero_hpz_partition_size", layout.world_size, 1))
    if group > 1:
        parts["second copy of the weights (hpZ)"] = parts["weights"] * layout.zero_size / group
    if teacher:
        parts["teacher"] = count_parameters(teacher) * DTYPES[precision].itemsize
    sequences, tokens = settings.batch.micro_batch_size or 1, model.sequence_length
    micro_batches = max(1, settings.batch.global_batch_size // (sequences * layout.data_parallel_size))
    in_flight = micro_batches_in_flight(micro_batches, layout.pipeline_stages, schedule)
    parts["activations"] = activation_bytes(model, sequences, tokens, device, precision, settings.recompute, layout, in_flight)
    parts["logits"] = logit_bytes(model, sequences, tokens // layout.sequence_parallel_size, device, precision)
    parts["buffers"] = buffer_bytes(model, zero, parameters, precision, layout)
    # With its states on the host, the optimizer's gradients are there too (ZeRO-Offload: Ren et al. 2021, arXiv 2101.06840, section 3).
    elsewhere = {"optimizer", "gradients"} if _device_of(zero, "offload_optimizer") not in ("none", device) else set()
    elsewhere |= {"weights"} if _device_of(zero, "offload_param") not in ("none", device) else set()
    return Memory(parts, frozenset(elsewhere), device)


def buffer_bytes(model: ModelConfig, zero: dict, parameters: float, precision: str, layout: Layout) -> float:
    """Return the bytes of DeepSpeed's buckets, and under ZeRO-3 of the weights that are whole at one time.

    A bucket of gradients exists in the weights' type and in float32, in which it is summed. Under ZeRO-3 the largest layer is whole,
    with its gradient, and the next ones that are being gathered.
    """
    stage, size = int(zero.get("stage", 0)), DTYPES[precision].itemsize
    if stage == 0 or layout.zero_size == 1:
        return 0.0
    bucket = min(_number(zero, "reduce_bucket_size", model.hidden_size**2, _BUCKET), parameters)
    buckets = bucket * (size + 4)
    if stage < 3:
        return buckets + min(_number(zero, "allgather_bucket_size", _BUCKET, _BUCKET), parameters) * size
    embedding = model.vocab_size * model.hidden_size
    blocks = (count_parameters(model) - embedding * (1 if model.tie_embeddings else 2)) / model.total_blocks / layout.tensor_parallel_size
    prefetched = min(_number(zero, "stage3_prefetch_bucket_size", model.hidden_size**2, 50_000_000), parameters)
    return buckets + (2 * max(embedding, blocks) + prefetched) * size


def _number(zero: dict, name: str, auto: float, default: float) -> float:
    given = zero.get(name, default)
    return float(auto if given == "auto" else given)


def _device_of(zero: dict, section: str) -> str:
    """Return the device type that a section offloads to: "none", "cpu", or "nvme"."""
    return (zero.get(section) or {}).get("device", "none")
