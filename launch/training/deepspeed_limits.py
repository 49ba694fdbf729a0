"""Limits of DeepSpeed and of the engine: combinations that are refused before a run starts."""

import importlib.metadata
import json
import math
import re
from pathlib import Path

from data.command_line import nearest
from launch.ranks.layout import Layout
from launch.training.settings import RunSettings
from model.transformer import layers

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
_INSTEAD = "Use 1, with ZeRO (ds_configs/zero3.json) or pipeline_stages instead."
_WRONG_GRADIENTS = (  # first wrong version, first right version, combination, the pull requests that fixed it
    ((0, 16, 0), (0, 19, 3), "a pipeline with several micro-batches", "#7665, #8154"),  # first summed, from 0.18.3 on divided too often
    ((0, 0, 0), (0, 19, 0), "ZeRO-1 in bf16", "#7985"),
    ((0, 15, 2), (0, 19, 0), "offload under ZeRO-1 or -2", "#7967, #7981"),
    ((0, 0, 0), (0, 19, 3), "overlap_comm under ZeRO-1 or -2", "#7965, #8080"),
)


def unsupported(merged: dict, path: str, settings: RunSettings, layout: Layout, device: str) -> list[str]:
    """Return a complaint for each part of a completed JSON that this run, layout, device or version of DeepSpeed does not support."""
    return [
        *_unsupported_precision(merged, path, settings, device),
        *_unsupported_zero(merged, path),
        *_unsupported_zero_plus_plus(merged, path, layout, device),
        *_unsupported_groups(settings, layout),
        *(_unsupported_pipeline(merged, path, settings, layout) if layout.pipeline_stages > 1 else []),
        *known_wrong_gradients(importlib.metadata.version("deepspeed"), merged, layout),
    ]


def _stage_of(merged: dict) -> int:
    """Return the ZeRO stage."""
    return int(merged["zero_optimization"].get("stage", 0))


def _offloads(zero: dict, section: str) -> bool:
    """Return True if offload_optimizer or offload_param names a device."""
    return (zero.get(section) or {}).get("device", "none") != "none"


def _unsupported_precision(merged: dict, path: str, settings: RunSettings, device: str) -> list[str]:
    complaints = []
    if settings.precision == "fp16" and device == "cpu":
        complaints.append("precision fp16: DeepSpeed supports no fp16 on a CPU. Use bf16 or float32.")
    if settings.precision != "float32" and _stage_of(merged) == 0:
        complaints.append(
            f"{path}: zero_optimization.stage 0 has no float32 master weights with precision {settings.precision}. "
            "Use stage 1, or precision float32."
        )
    return complaints


def _unsupported_zero(merged: dict, path: str) -> list[str]:
    complaints, zero, stage = [], merged["zero_optimization"], _stage_of(merged)
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section) or {}
        folder = offload.get("nvme_path")
        if offload.get("device") == "nvme" and not (folder and Path(folder).is_dir()):
            complaints.append(f"{path}: zero_optimization.{section}.nvme_path {folder} is not a folder on this machine.")
    if _offloads(zero, "offload_param") and stage != 3:
        complaints.append(f"{path}: zero_optimization.offload_param is supported only with stage 3 (got {stage}).")
    if _offloads(zero, "offload_optimizer") and stage == 0:
        complaints.append(f"{path}: zero_optimization.offload_optimizer is supported only with stage 1, 2 or 3 (got 0).")
    if not zero.get("compute_grad_norm", True):
        complaints.append(
            f"{path}: zero_optimization.compute_grad_norm is false; it must be true: the gradient norm is logged, and shows gradients "
            "that are not finite."
        )
    if (ratio := (zero.get("offload_optimizer") or {}).get("ratio", 1.0)) != 1.0:
        complaints.append(
            f"{path}: zero_optimization.offload_optimizer.ratio is {ratio}; it must be 1.0: other values need DeepSpeed's own CPU "
            "optimizer, which is not used."
        )
    for section in ("zenflow", "super_offload"):
        if zero.get(section) or (zero.get("offload_optimizer") or {}).get(section):
            complaints.append(f"{path}: zero_optimization.{section} needs DeepSpeed's own CPU optimizer, which is not used. Delete it.")
    if zero.get("round_robin_gradients") and stage in (1, 2):
        complaints.append(
            f"{path}: zero_optimization.round_robin_gradients is true; it must be false with stage {stage}: it changes the order of the "
            "parameters, and checkpoints would not find them."
        )
    return complaints


def _unsupported_zero_plus_plus(merged: dict, path: str, layout: Layout, device: str) -> list[str]:
    """Return the complaints about hpZ, qwZ and qgZ.  Wang et al. 2023 (ZeRO++), arXiv 2306.10209."""
    zero, stage = merged["zero_optimization"], _stage_of(merged)
    hpz = int(zero.get("zero_hpz_partition_size", 1))
    quantized = [name for name in _QUANTIZED if zero.get(name)]
    chosen = " and ".join((["zero_hpz_partition_size"] if hpz > 1 else []) + quantized)
    complaints = []
    if chosen and stage != 3:
        complaints.append(f"{path}: zero_optimization: {chosen}: supported only with stage 3 (got {stage}).")
    if chosen and layout.tensor_parallel_size > 1:
        complaints.append(
            f"{path}: zero_optimization: {chosen}: not tested with tensor_parallel_size {layout.tensor_parallel_size}. "
            "Use ds_configs/zero3.json."
        )
    if hpz > 1 and _offloads(zero, "offload_param"):
        complaints.append(f"{path}: zero_optimization.zero_hpz_partition_size is not tested with offload_param. Delete one of them.")
    if hpz > 1 and layout.world_size % hpz:
        fitting = max(size for size in range(1, hpz) if layout.world_size % size == 0)
        complaints.append(
            f"{path}: zero_optimization.zero_hpz_partition_size {hpz} does not divide {layout.world_size} rank(s). Nearest: {fitting}."
        )
    if quantized and device == "cpu":
        complaints.append(
            f"{path}: zero_optimization: {' and '.join(quantized)}: DeepSpeed's quantization kernels exist only for CUDA. "
            'Use zero_hpz_partition_size alone, with communication_data_type "fp32".'
        )
    return complaints + (_unsupported_quantized_gradients(merged, path) if zero.get("zero_quantized_gradients") else [])


def _unsupported_quantized_gradients(merged: dict, path: str) -> list[str]:
    complaints = []
    if (given := merged.get("communication_data_type", "fp32")) != "fp16":
        complaints.append(
            f'{path}: communication_data_type is {json.dumps(given)}; it must be "fp16" with zero_quantized_gradients, whose kernels read '
            "every value as half precision without a check."
        )
    if not merged["zero_optimization"].get("reduce_scatter", True):
        complaints.append(f"{path}: zero_optimization.reduce_scatter is false; it must be true with zero_quantized_gradients.")
    return complaints


def _unsupported_groups(settings: RunSettings, layout: Layout) -> list[str]:
    """Return why the model cannot be divided among the ranks of a tensor-parallel or sequence-parallel group."""
    model, tensor, sequence = settings.model, layout.tensor_parallel_size, layout.sequence_parallel_size
    if tensor > 1 and settings.quantization.bits is not None:
        return [
            f"tensor_parallel_size {tensor} is not supported with quantization.bits {settings.quantization.bits}: several ranks would "
            f"share a scale. {_INSTEAD}"
        ]
    if sequence > 1 and settings.distillation.teacher:
        return [
            f"sequence_parallel_size {sequence} is not supported with distillation.teacher: the teacher needs whole sequences. "
            "Use 1, with ZeRO (ds_configs/zero3.json), tensor_parallel_size or pipeline_stages instead."
        ]
    asked = " and ".join(
        f"{name} {size}" for name, size in (("tensor_parallel_size", tensor), ("sequence_parallel_size", sequence)) if size > 1
    )
    if asked and model.architecture == "encoder_decoder":
        return [f"{asked}: not tested with model.architecture encoder_decoder. {_INSTEAD}"]
    if asked and model.positions in ("alibi", "relative"):
        return [f"{asked}: not supported with model.positions {model.positions}, whose values differ by head. {_INSTEAD}"]
    if sequence > 1 and model.num_classes:
        return [
            f"sequence_parallel_size {sequence} is not supported with model.num_classes {model.num_classes}: only one rank has the first "
            f"token. {_INSTEAD}"
        ]
    complaints = [
        f"tensor_parallel_size {tensor} does not divide model.{name} {count}. Nearest: {math.gcd(tensor, model.num_key_value_heads)}."
        for name, count in (("num_attention_heads", model.num_attention_heads), ("num_key_value_heads", model.num_key_value_heads))
        if count % tensor
    ]
    return complaints or _unsupported_sequence_size(settings, layout)


def _unsupported_sequence_size(settings: RunSettings, layout: Layout) -> list[str]:
    model, tensor, sequence = settings.model, layout.tensor_parallel_size, layout.sequence_parallel_size
    heads, key_heads, tokens = model.num_attention_heads // tensor, model.num_key_value_heads // tensor, model.sequence_length

    def divides_keys(size: int) -> bool:
        """Return True if `size` ranks can share the key/value heads."""
        return key_heads % size == 0 or size % key_heads == 0

    complaints = []
    if heads % sequence:
        complaints.append(
            f"sequence_parallel_size {sequence} does not divide the {heads} attention heads "
            f"{'of each rank' if tensor > 1 else '(model.num_attention_heads)'}."
        )
    elif not divides_keys(sequence):
        complaints.append(
            f"sequence_parallel_size {sequence} is neither a divisor nor a multiple of the {key_heads} key/value heads "
            f"{'of each rank' if tensor > 1 else '(model.num_key_value_heads)'}."
        )
    if tokens % sequence:
        complaints.append(f"sequence_parallel_size {sequence} does not divide model.sequence_length {tokens}.")
    common = math.gcd(sequence, heads, tokens)
    fitting = next(size for size in range(common, 0, -1) if common % size == 0 and divides_keys(size))
    return [f"{complaint} Nearest: {fitting}." for complaint in complaints]


def _unsupported_pipeline(merged: dict, path: str, settings: RunSettings, layout: Layout) -> list[str]:
    complaints = []
    stage, stages, schedule = _stage_of(merged), layout.pipeline_stages, merged["pipeline"]["schedule"]
    if stage != 1:
        reason = (
            "gradients would be clipped by the norm of one pipeline stage" if stage == 0 else "DeepSpeed's pipeline does not support it"
        )
        complaints.append(
            f"{path}: zero_optimization.stage {stage} is not supported with pipeline_stages {stages}: {reason}. "
            "Use ds_configs/pipeline_zero1.json, or pipeline_stages 1."
        )
    if _offloads(merged["zero_optimization"], "offload_optimizer"):
        complaints.append(f"{path}: zero_optimization.offload_optimizer is not tested with pipeline_stages {stages}. Delete one of them.")
    if schedule not in ("1f1b", "dualpipev"):
        complaints.append(f'{path}: pipeline.schedule is {json.dumps(schedule)}; it must be "1f1b" or "dualpipev".')
    parts = 2 * stages if schedule == "dualpipev" else stages
    complaints += _unsupported_partition(merged["pipeline"]["partition"], parts, path, settings, layout)
    if schedule == "dualpipev" and merged["gradient_accumulation_steps"] < parts:
        complaints.append(_too_few_micro_batches(merged, parts, path, settings, layout))
    return complaints


def _unsupported_partition(partition: object, parts: int, path: str, settings: RunSettings, layout: Layout) -> list[str]:
    """Return why the network cannot be cut into `parts` parts as pipeline.partition asks."""
    names = [layer.module.__name__ for layer in layers(settings.model)]
    kind, _, layer_type = str(partition).partition(":")
    counted = [name for name in names if kind != "type" or name.lower() == layer_type.lower()]
    if kind not in ("parameters", "uniform", "type") or (kind == "type") != bool(layer_type):
        return [f'{path}: pipeline.partition is {json.dumps(partition)}; it must be "parameters", "uniform" or "type:Block".']
    if not counted:
        return [
            f"{path}: pipeline.partition {partition}: the network has no layer of type {layer_type}."
            f"{nearest(layer_type, sorted(set(names)))}"
        ]
    if parts <= len(counted):
        return []
    stages = layout.pipeline_stages
    most = max(1, len(counted) * stages // parts)
    fitting = next(size for size in range(most, 0, -1) if stages * layout.data_parallel_size % size == 0)
    cut = f"DualPipeV cuts the network into {parts} parts, but it" if parts > stages else "the network"
    of_type = f" of type {layer_type}" if layer_type else ""
    return [f"pipeline_stages {stages}: {cut} has only {len(counted)} layer(s){of_type}. Nearest: {fitting}."]


def _too_few_micro_batches(merged: dict, parts: int, path: str, settings: RunSettings, layout: Layout) -> str:
    micro_batches, size = merged["gradient_accumulation_steps"], merged["train_micro_batch_size_per_gpu"]
    share = micro_batches * size
    smaller = next((smaller for smaller in range(share // parts, 0, -1) if share % smaller == 0), None)
    advice = f"micro_batch_size {smaller}" if smaller else f"global_batch_size {parts * size * layout.data_parallel_size}"
    batch = f"batch.global_batch_size {settings.batch.global_batch_size}"
    if settings.batch.ramp:
        batch = f"the smallest size of batch.ramp {settings.batch.ramp}, {share * layout.data_parallel_size},"
        advice = advice.replace("global_batch_size", "ramp with sizes of at least")
    return (
        f"{path}: pipeline.schedule dualpipev needs at least {parts} micro-batches per step, two for each stage; batch.micro_batch_size "
        f"{size} and {batch} give {micro_batches}. Nearest: batch.{advice}."
    )


def known_wrong_gradients(version: str, merged: dict, layout: Layout) -> list[str]:
    """Return why this version of DeepSpeed must not train in this layout: it would silently compute wrong gradients."""
    zero, stage = merged["zero_optimization"], _stage_of(merged)
    chosen = {
        "a pipeline with several micro-batches": layout.pipeline_stages > 1 and merged["gradient_accumulation_steps"] > 1,
        "ZeRO-1 in bf16": stage == 1 and merged["bf16"]["enabled"],
        "offload under ZeRO-1 or -2": stage in (1, 2) and _offloads(zero, "offload_optimizer"),
        "overlap_comm under ZeRO-1 or -2": stage in (1, 2) and bool(zero.get("overlap_comm")),
    }
    installed = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return [
        f"DeepSpeed {version} computes wrong gradients with {combination} (fixed in {'.'.join(map(str, right))}, "
        f"github.com/deepspeedai/DeepSpeed {pull_requests}). Install {'.'.join(map(str, right))} or newer."
        for wrong, right, combination, pull_requests in _WRONG_GRADIENTS
        if chosen[combination] and wrong <= installed < right
    ]
