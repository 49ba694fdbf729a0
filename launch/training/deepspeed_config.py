"""DeepSpeed's JSON: read, checked, and completed from the recipe into the one dictionary that DeepSpeed receives.

The rule is Hugging Face's: a training number is "auto" in the JSON and comes from the recipe; one written in both places must be
the same. DeepSpeed ignores unknown keys at the top, so every key is checked here, and what touches the mathematics is always
written out, so that no default of DeepSpeed's (some changed between versions) can change a run.
"""

import importlib.metadata
import json
import math
import re
import types
import typing
from pathlib import Path

from pydantic import BaseModel, ValidationError

from data.command_line import UserError, nearest
from launch.ranks.layout import Layout
from launch.training.settings import RunSettings
from model.transformer import layers

# Sections that DeepSpeed reads without checking their keys.
_PLAIN_SECTIONS: dict[str, set[str]] = {
    "data_types": {"grad_accum_dtype"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "checkpoint": {"tag_validation"},
    "comms_logger": {"enabled", "verbose", "prof_all", "prof_ops", "debug"},
    "optimizer": {"type", "params"},
    "pipeline": {"stages", "partition", "schedule"},
}
_OPTIMIZER_PARAMETERS = {"lr", "betas", "eps", "weight_decay"}
_PRECISION_DEFAULTS = {  # DeepSpeed 0.19's own, written out
    "bf16": {"immediate_grad_update": False, "check_grad_overflow": True},
    "fp16": {
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    },
}
_OURS = {
    "zero_allow_untested_optimizer": True,  # torch's own AdamW, which DeepSpeed calls untested
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's CPU Adam would have to be compiled on the first start
}
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
_PIPELINE_DEFAULTS = {"partition": "parameters", "schedule": "1f1b"}
_DEEPSPEED_PIPELINE = {"activation_checkpoint_interval": 0, "pipe_partitioned": False, "grad_partitioned": False}
PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"partition_type": "column", "patterns": [r".*\.attention\.(query|key|value)\.weight$", r".*\.feed_forward\.(gate|up)\.weight$"]},
        {"partition_type": "row", "patterns": [r".*\.attention\.output\.weight$", r".*\.feed_forward\.down\.weight$"]},
        # Whole on every rank, but each sees its own heads alone: without the sum the copies drift apart, and the loss hardly shows it.
        {"partition_type": "skip", "patterns": [r".*\.attention\.(query_norm|key_norm)\.weight$"], "grad_allreduce": True},
    ],
}
"""Which matrices tensor parallelism cuts, in DeepSpeed's AutoTP terms (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Embedding and
head stay whole."""
_WRONG_GRADIENTS = (  # from the first version that is wrong to the first that is right; the pull requests that mended it
    ((0, 16, 0), (0, 19, 3), "a pipeline with several micro-batches", "#7665, #8154"),  # first summed, from 0.18.3 on divided too often
    ((0, 0, 0), (0, 19, 0), "ZeRO-1 in bf16", "#7985"),
    ((0, 15, 2), (0, 19, 0), "offload under ZeRO-1 or -2", "#7967, #7981"),
    ((0, 0, 0), (0, 19, 3), "overlap_comm under ZeRO-1 or -2", "#7965, #8080"),
)
_TOP_LEVEL = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    *_PLAIN_SECTIONS,
}
_ELSEWHERE = {
    "scheduler": "The learning rate follows the recipe (schedule.kind, schedule.warmup_steps, ...): delete the section.",
    "tensorboard": "TensorBoard is always written, into the run's folder: delete the section.",
    "activation_checkpointing": "Recomputation is the recipe's: delete the section and set recompute: true.",
    "tensor_parallel": "Which matrices are cut is ours to say, among how many the recipe's: delete the section, set tensor_parallel_size.",
    "sequence_parallel_size": "It is the recipe's: delete it and set sequence_parallel_size.",
    "data_parallel_size": "It follows from the other sizes: delete it.",
}


def read_deepspeed_json(path: str) -> dict:
    """The JSON at `path`; raises UserError where it cannot be read, is not JSON, or holds a key that nothing reads."""
    try:
        written = json.loads(Path(path).read_text(), object_pairs_hook=_refuse_twins)
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not JSON: {error}.") from error
    if not isinstance(written, dict):
        raise UserError(f"--deepspeed {path} holds a {type(written).__name__}; DeepSpeed's JSON is one object.")
    _check_keys(written, path)
    return written


def layout_of(written: dict, settings: RunSettings, world_size: int) -> Layout:
    """The ranks as a grid. Raises UserError where they do not divide."""
    given = written.get("pipeline", {"stages": 1}).get("stages", "auto")
    in_json = given if type(given) is int else 2
    stages = in_json if settings.pipeline_stages is None else settings.pipeline_stages
    return Layout(world_size, stages, settings.tensor_parallel_size, settings.sequence_parallel_size)


def complete(written: dict, path: str, settings: RunSettings, layout: Layout, device: str, ranks_of_a_node: int | None = None) -> dict:
    """What DeepSpeed receives: every "auto" filled from the recipe, every number that matters written out.

    `ranks_of_a_node` (default: all) is what hpZ's "auto" stands for.
    Raises UserError that lists each number that JSON and recipe give differently, and what this device or DeepSpeed cannot do.
    """
    batch, optimizer = settings.batch, settings.optimizer
    assert batch.micro_batch_size is not None
    owned = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation_steps(layout.data_parallel_size),
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16.enabled": settings.precision == "bf16",
        "fp16.enabled": settings.precision == "fp16",
        "data_types.grad_accum_dtype": "fp16" if settings.precision == "fp16" else "fp32",
        "optimizer.type": "AdamW",
        "optimizer.params.lr": optimizer.learning_rate,
        "optimizer.params.betas": [optimizer.beta1, optimizer.beta2],
        "optimizer.params.eps": optimizer.epsilon,
        "optimizer.params.weight_decay": optimizer.weight_decay,
        "pipeline.stages": layout.pipeline_stages,
    }
    origin = {
        "train_batch_size": "batch.global_batch_size",
        "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
        "gradient_accumulation_steps": "batch.global_batch_size / (batch.micro_batch_size x data_parallel_size)",
        "gradient_clipping": "optimizer.gradient_clipping",
        "bf16.enabled": "precision",
        "fp16.enabled": "precision",
        "data_types.grad_accum_dtype": "precision",
        "optimizer.params.lr": "optimizer.learning_rate",
        "optimizer.params.betas": "optimizer.beta1, beta2",
        "optimizer.params.eps": "optimizer.epsilon",
        "optimizer.params.weight_decay": "optimizer.weight_decay",
        "pipeline.stages": "pipeline_stages",
    }
    complaints = []
    merged = json.loads(json.dumps(written))
    for name, value in owned.items():
        *sections, key = name.split(".")
        if sections and sections[0] == "optimizer" and "optimizer" not in written:
            continue
        place = merged
        for section in sections:
            place = place.setdefault(section, {})
        given = place.get(key, "auto")
        if given != "auto" and given != value:
            complaints.append(
                f"{path}: {name} is {json.dumps(given)}; the recipe's {origin.get(name, 'optimizer')} makes it {json.dumps(value)}. "
                'Write "auto".'
            )
        place[key] = value
    merged.pop("optimizer", None)  # ours is handed over, built from the same numbers
    if layout.pipeline_stages > 1:
        merged["pipeline"] = _PIPELINE_DEFAULTS | merged["pipeline"] | _DEEPSPEED_PIPELINE
    else:
        merged.pop("pipeline", None)
    for section, defaults in _PRECISION_DEFAULTS.items():
        merged[section] = defaults | merged[section]
    zero = merged.setdefault("zero_optimization", {"stage": 0})
    _fill_pinning(zero, device)
    _fill_buckets(zero, settings.model.hidden_size)
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = ranks_of_a_node or layout.world_size
    complaints += [
        f"{path}: {name} is {merged[name]}; it must be {value}." for name, value in _OURS.items() if merged.get(name, value) != value
    ]
    if left := [name for name, value in _leaves(merged) if value == "auto"]:
        complaints.append(f'{path}: nothing fills the "auto" of {", ".join(left)}. Write a value.')
    complaints += _invalid(merged, path) or [
        *_impossible(merged, path, settings, device),
        *_impossible_in_zero_plus_plus(merged, path, layout, device),
        *_impossible_to_share(settings, layout),
        *(_impossible_in_a_pipeline(merged, path, settings, layout) if layout.pipeline_stages > 1 else []),
        *known_wrong_gradients(importlib.metadata.version("deepspeed"), merged, layout),
    ]
    if complaints:
        raise UserError("\n".join(complaints))
    zero["stage"] = int(zero.get("stage", 0))
    if layout.tensor_parallel_size > 1 and layout.pipeline_stages == 1:  # told of both, DeepSpeed takes the stages for data ranks
        merged["tensor_parallel"] = {"autotp_size": layout.tensor_parallel_size, "partition_config": PARTITION}
    return merged | {
        **_OURS,
        "train_batch_size": batch.global_batch_size * layout.sequence_parallel_size,  # to DeepSpeed a part of a sequence is a sample
        "prescale_gradients": merged.get("prescale_gradients", False),
        "gradient_predivide_factor": merged.get("gradient_predivide_factor", 1.0),
        "communication_data_type": merged.get("communication_data_type", "fp32"),
        "steps_per_print": merged.get("steps_per_print", 2**31),
        "wall_clock_breakdown": merged.get("wall_clock_breakdown", False),
    }


def _impossible(merged: dict, path: str, settings: RunSettings, device: str) -> list[str]:
    complaints = []
    zero = merged["zero_optimization"]
    stage = int(zero.get("stage", 0))
    if settings.precision == "fp16" and device == "cpu":
        complaints.append("precision fp16: DeepSpeed has no fp16 on a CPU. Allowed here: bf16, float32.")
    if settings.precision != "float32" and stage == 0:
        complaints.append(
            f"{path}: zero_optimization.stage 0 keeps no float32 master weights under {settings.precision}. "
            "Nearest: stage 1, or precision float32."
        )
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section) or {}
        folder = offload.get("nvme_path")
        if offload.get("device") == "nvme" and not (folder and Path(folder).is_dir()):
            complaints.append(f"{path}: zero_optimization.{section}.nvme_path {folder} is not a folder on this machine.")
        if section == "offload_param" and offload.get("device", "none") != "none" and stage != 3:
            complaints.append(f"{path}: zero_optimization.offload_param needs stage 3; the stage is {stage}.")
        if section == "offload_optimizer" and offload.get("device", "none") != "none" and stage == 0:
            complaints.append(f"{path}: zero_optimization.offload_optimizer needs stage 1, 2 or 3; the stage is 0.")
    if not zero.get("compute_grad_norm", True):
        complaints.append(f"{path}: zero_optimization.compute_grad_norm is false; the norm is shown, and shows what is not finite: true.")
    if (zero.get("offload_optimizer") or {}).get("ratio", 1.0) != 1.0:
        complaints.append(f"{path}: zero_optimization.offload_optimizer.ratio needs DeepSpeed's own CPU optimizer; it must be 1.0.")
    for section in ("zenflow", "super_offload"):
        if zero.get(section) or (zero.get("offload_optimizer") or {}).get(section):
            complaints.append(f"{path}: zero_optimization.{section} needs DeepSpeed's own CPU optimizer: delete it.")
    if zero.get("round_robin_gradients") and stage in (1, 2):
        complaints.append(
            f"{path}: zero_optimization.round_robin_gradients changes the order in which checkpoints find the parameters; it must be false."
        )
    return complaints


def _impossible_in_zero_plus_plus(merged: dict, path: str, layout: Layout, device: str) -> list[str]:
    """Of hpZ, qwZ and qgZ.  Wang et al. 2023 (ZeRO++), arXiv 2306.10209."""
    zero = merged["zero_optimization"]
    stage, hpz = int(zero.get("stage", 0)), int(zero.get("zero_hpz_partition_size", 1))
    quantized = [name for name in _QUANTIZED if zero.get(name)]
    chosen = " and ".join((["zero_hpz_partition_size"] if hpz > 1 else []) + quantized)
    complaints = []
    if chosen and stage != 3:
        complaints.append(f"{path}: zero_optimization: {chosen} only under stage 3; the stage is {stage}.")
    if chosen and layout.tensor_parallel_size > 1:
        complaints.append(
            f"{path}: zero_optimization: {chosen} with tensor_parallel_size {layout.tensor_parallel_size}: not proved here. "
            "Nearest: ds_configs/zero3.json."
        )
    if hpz > 1 and (zero.get("offload_param") or {}).get("device", "none") != "none":
        complaints.append(f"{path}: zero_optimization.zero_hpz_partition_size with offload_param: not proved here. Delete one of them.")
    if hpz > 1 and layout.world_size % hpz:
        fitting = max(size for size in range(1, hpz) if layout.world_size % size == 0)
        complaints.append(
            f"{path}: zero_optimization.zero_hpz_partition_size {hpz} does not divide {layout.world_size} rank(s). Nearest: {fitting}."
        )
    if quantized and device == "cpu":
        complaints.append(
            f"{path}: zero_optimization: {' and '.join(quantized)}: DeepSpeed's quantizing kernels exist on CUDA alone. "
            'Nearest: zero_hpz_partition_size alone, with communication_data_type "fp32".'
        )
    if zero.get("zero_quantized_gradients"):
        if (given := merged.get("communication_data_type", "fp32")) != "fp16":
            complaints.append(
                f"{path}: communication_data_type is {json.dumps(given)} with zero_quantized_gradients, whose kernels take every number "
                'for half precision, unchecked; it must be "fp16".'
            )
        if not zero.get("reduce_scatter", True):
            complaints.append(f"{path}: zero_optimization.reduce_scatter is false; zero_quantized_gradients needs it true.")
    return complaints


def _impossible_to_share(settings: RunSettings, layout: Layout) -> list[str]:
    """Why the model's heads or tokens do not divide among the ranks of a group."""
    model, tensor, sequence = settings.model, layout.tensor_parallel_size, layout.sequence_parallel_size
    if tensor > 1 and settings.quantization.bits is not None:
        return [
            f"tensor_parallel_size {tensor} with quantization.bits {settings.quantization.bits}: a scale would belong to several ranks. "
            "Nearest: 1, with ZeRO (ds_configs/zero3.json) or pipeline_stages instead."
        ]
    if sequence > 1 and settings.distillation.teacher:
        return [
            f"sequence_parallel_size {sequence} with distillation.teacher: no rank has a whole sequence for it. "
            "Nearest: 1, with ZeRO (ds_configs/zero3.json), tensor_parallel_size or pipeline_stages instead."
        ]
    asked = " and ".join(
        f"{name} {size}" for name, size in (("tensor_parallel_size", tensor), ("sequence_parallel_size", sequence)) if size > 1
    )
    others = "Nearest: 1, with ZeRO (ds_configs/zero3.json) or pipeline_stages instead."
    if asked and model.architecture == "encoder_decoder":
        return [f"{asked} with model.architecture encoder_decoder: not proved here. {others}"]
    if asked and model.positions in ("alibi", "relative"):
        return [f"{asked} with model.positions {model.positions}: each rank would need the numbers of its own heads alone. {others}"]
    if sequence > 1 and model.num_classes:
        return [
            f"sequence_parallel_size {sequence} with model.num_classes {model.num_classes}: one rank alone has the first token. {others}"
        ]
    complaints = [
        f"tensor_parallel_size {tensor} does not divide model.{name} {count}. Nearest: {math.gcd(tensor, model.num_key_value_heads)}."
        for name, count in (("num_attention_heads", model.num_attention_heads), ("num_key_value_heads", model.num_key_value_heads))
        if count % tensor
    ]
    if complaints:
        return complaints
    heads, key_heads, tokens = model.num_attention_heads // tensor, model.num_key_value_heads // tensor, model.sequence_length

    def shares_keys(size: int) -> bool:
        return key_heads % size == 0 or size % key_heads == 0

    if heads % sequence:
        complaints.append(
            f"sequence_parallel_size {sequence} does not divide the {heads} attention heads "
            f"{'of a rank' if tensor > 1 else '(model.num_attention_heads)'}."
        )
    elif not shares_keys(sequence):
        complaints.append(
            f"sequence_parallel_size {sequence} is neither a divisor nor a multiple of the {key_heads} key/value heads "
            f"{'of a rank' if tensor > 1 else '(model.num_key_value_heads)'}."
        )
    if tokens % sequence:
        complaints.append(f"sequence_parallel_size {sequence} does not divide model.sequence_length {tokens}.")
    common = math.gcd(sequence, heads, tokens)
    fitting = next(size for size in range(common, 0, -1) if common % size == 0 and shares_keys(size))
    return [f"{complaint} Nearest: {fitting}." for complaint in complaints]


def _impossible_in_a_pipeline(merged: dict, path: str, settings: RunSettings, layout: Layout) -> list[str]:
    complaints = []
    section, zero, stages = merged["pipeline"], merged["zero_optimization"], layout.pipeline_stages
    stage = int(zero.get("stage", 0))
    if stage != 1:
        why = "clips by the gradient norm of one stage alone" if stage == 0 else "is not carried by DeepSpeed's pipeline"
        complaints.append(
            f"{path}: zero_optimization.stage {stage} with pipeline_stages {stages}: ZeRO-{stage} {why}. "
            "Take ds_configs/pipeline_zero1.json, or pipeline_stages 1."
        )
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        complaints.append(
            f"{path}: zero_optimization.offload_optimizer with pipeline_stages {stages}: not proved here. Delete one of them."
        )
    if section["schedule"] not in ("1f1b", "dualpipev"):
        complaints.append(f'{path}: pipeline.schedule is {json.dumps(section["schedule"])}; it must be "1f1b" or "dualpipev".')
    parts = stages * (2 if section["schedule"] == "dualpipev" else 1)
    names = [layer.module.__name__ for layer in layers(settings.model)]
    kind, _, pattern = str(section["partition"]).partition(":")
    counted = [name for name in names if kind != "type" or name.lower() == pattern.lower()]
    if kind not in ("parameters", "uniform", "type") or (kind == "type") != bool(pattern):
        complaints.append(
            f'{path}: pipeline.partition is {json.dumps(section["partition"])}; it must be "parameters", "uniform" or "type:Block".'
        )
    elif not counted:
        complaints.append(
            f"{path}: pipeline.partition {section['partition']}: no layer is a {pattern}.{nearest(pattern, sorted(set(names)))}"
        )
    elif parts > len(counted):
        most = max(1, len(counted) * stages // parts)
        fitting = next(size for size in range(most, 0, -1) if stages * layout.data_parallel_size % size == 0)
        complaints.append(
            f"pipeline_stages {stages}: {f'DualPipeV cuts the network into {parts} parts, but it' if parts > stages else 'the network'} "
            f"has {len(counted)} layer(s){f' of type {pattern}' if pattern else ''} to share out. Nearest: {fitting}."
        )
    micro_batches, size = merged["gradient_accumulation_steps"], merged["train_micro_batch_size_per_gpu"]
    if section["schedule"] == "dualpipev" and micro_batches < parts:
        share = micro_batches * size
        smaller = next((smaller for smaller in range(share // parts, 0, -1) if share % smaller == 0), None)
        advice = f"micro_batch_size {smaller}" if smaller else f"global_batch_size {parts * size * layout.data_parallel_size}"
        complaints.append(
            f"{path}: pipeline.schedule dualpipev needs at least {parts} micro-batches a step, two for each stage; batch.micro_batch_size "
            f"{size} makes {micro_batches} of batch.global_batch_size {settings.batch.global_batch_size}. Nearest: batch.{advice}."
        )
    return complaints


def known_wrong_gradients(version: str, merged: dict, layout: Layout) -> list[str]:
    """Why this version of DeepSpeed must not train in this layout: gradients that were wrong without a word."""
    zero = merged["zero_optimization"]
    low = int(zero.get("stage", 0)) in (1, 2)
    chosen = {
        "a pipeline with several micro-batches": layout.pipeline_stages > 1 and merged["gradient_accumulation_steps"] > 1,
        "ZeRO-1 in bf16": int(zero.get("stage", 0)) == 1 and merged["bf16"]["enabled"],
        "offload under ZeRO-1 or -2": low and (zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        "overlap_comm under ZeRO-1 or -2": low and bool(zero.get("overlap_comm")),
    }
    installed = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return [
        f"DeepSpeed {version} computes wrong gradients with {what} (mended in {'.'.join(map(str, right))}, "
        f"github.com/deepspeedai/DeepSpeed {pull_request}). Install {'.'.join(map(str, right))} or newer."
        for wrong, right, what, pull_request in _WRONG_GRADIENTS
        if chosen[what] and wrong <= installed < right
    ]


def _invalid(merged: dict, path: str) -> list[str]:
    """What DeepSpeed's own types say against the values."""
    complaints = []
    for section, model in _typed_sections().items():
        try:
            model(**merged[section])
        except ValidationError as error:
            complaints += [
                f"{path}: {'.'.join(map(str, (section, *wrong['loc'])))} is {json.dumps(wrong['input'])}: {wrong['msg']}."
                for wrong in error.errors()
            ]
    if merged.get("communication_data_type", "fp32") not in ("fp32", "bf16", "fp16"):
        complaints.append(f"{path}: communication_data_type is {merged['communication_data_type']}; it must be fp32, bf16 or fp16.")
    return complaints


def _fill_pinning(zero: dict, device: str) -> None:
    for section in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(section), dict) and zero[section].get("pin_memory") == "auto":
            zero[section]["pin_memory"] = device != "cpu"


def _fill_buckets(zero: dict, hidden_size: int) -> None:
    """The sizes that Hugging Face's integration gives to these when they are "auto"."""
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero |= {name: size for name, size in sizes.items() if zero.get(name) == "auto"}


def _typed_sections() -> dict[str, type[BaseModel]]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}


def _check_keys(written: dict, path: str) -> None:
    models = _typed_sections()
    complaints = []
    for key, value in written.items():
        if key in _ELSEWHERE:
            complaints.append(f'{path}: "{key}" is not for this file. {_ELSEWHERE[key]}')
        elif key not in _TOP_LEVEL:
            complaints.append(_unknown(path, key, key, _TOP_LEVEL) + " DeepSpeed would ignore it.")
        elif (key in models or key in _PLAIN_SECTIONS) and not isinstance(value, dict):
            complaints.append(f'{path}: "{key}" is {json.dumps(value)}; it must be an object.')
        elif key in models:
            complaints += _unknown_in(models[key], value, path, key)
        elif key in _PLAIN_SECTIONS:
            complaints += [
                _unknown(path, f"{key}.{name}", name, _PLAIN_SECTIONS[key]) for name in value if name not in _PLAIN_SECTIONS[key]
            ]
        if key == "optimizer" and isinstance(value, dict):
            parameters = value.get("params", {})
            if not isinstance(parameters, dict):
                complaints.append(f'{path}: "optimizer.params" is {json.dumps(parameters)}; it must be an object.')
                continue
            complaints += [
                _unknown(path, f"optimizer.params.{n}", n, _OPTIMIZER_PARAMETERS) for n in parameters if n not in _OPTIMIZER_PARAMETERS
            ]
    if complaints:
        raise UserError("\n".join(complaints))


def _unknown(path: str, name: str, key: str, allowed: typing.Iterable[str]) -> str:
    return f'{path}: unknown key "{name}".{nearest(key, sorted(allowed))}'


def _unknown_in(model: type[BaseModel], value: dict, path: str, section: str) -> list[str]:
    """Complaints on keys of `value` that DeepSpeed's own pydantic model of the section does not know, sections inside it included."""
    fields = {(field.alias or name): field.annotation for name, field in model.model_fields.items()}
    fields |= {name: field.annotation for name, field in model.model_fields.items()}
    complaints = []
    for key, inner in value.items():
        if key not in fields:
            complaints.append(_unknown(path, f"{section}.{key}", key, fields))
        elif isinstance(inner, dict):
            for kind in (fields[key], *typing.get_args(fields[key])):
                if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel):
                    complaints += _unknown_in(kind, inner, path, f"{section}.{key}")
    return complaints


def _refuse_twins(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    twins = {key for key in keys if keys.count(key) > 1}
    if twins:
        raise ValueError(f'"{sorted(twins)[0]}" stands twice in one object')
    return dict(pairs)


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    leaves: list[tuple[str, object]] = []
    for key, value in tree.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves
