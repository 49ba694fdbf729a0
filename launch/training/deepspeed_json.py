"""DeepSpeed's JSON file: how it is read, and which keys it may have.

DeepSpeed ignores unknown keys at the top level and in some sections, so every key is checked here.
"""

import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from data.command_line import UserError, joined_by_or, nearest
from launch.training.optimizers import OPTIMIZERS

_TYPED_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
# Sections whose keys DeepSpeed does not check.
_PLAIN_SECTIONS: dict[str, set[str]] = {
    "data_types": {"grad_accum_dtype"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "checkpoint": {"tag_validation"},
    "comms_logger": {"enabled", "verbose", "prof_all", "prof_ops", "debug"},
    "optimizer": {"type", "params"},
    "pipeline": {"stages", "partition", "schedule"},
}
_OPTIMIZER_TYPES = ["auto", *sorted(optimizer.json_type for optimizer in OPTIMIZERS.values())]
_OPTIMIZER_PARAMETERS = {key for optimizer in OPTIMIZERS.values() for key in optimizer.json_parameters}
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
_SET_ELSEWHERE = {
    "scheduler": "The learning rate follows the recipe (schedule.kind, schedule.warmup_steps, ...). Delete the section.",
    "tensorboard": "TensorBoard logs are always written into the run's folder. Delete the section.",
    "activation_checkpointing": "Delete the section and set recompute: true in the recipe.",
    "tensor_parallel": "Which matrices are split is fixed. Delete the section and set tensor_parallel_size in the recipe.",
    "sequence_parallel_size": "Delete it and set sequence_parallel_size in the recipe.",
    "data_parallel_size": "It follows from the other sizes. Delete it.",
}


def read_deepspeed_json(path: str) -> dict:
    """Return the JSON at `path`. Raises UserError if it cannot be read, is not JSON, or has an unsupported key."""
    try:
        written = json.loads(Path(path).read_text(), object_pairs_hook=_refuse_duplicate_keys)
    except OSError as error:
        raise UserError(f"--deepspeed {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not valid JSON: {error}.") from error
    if not isinstance(written, dict):
        raise UserError(f"--deepspeed {path} contains a {type(written).__name__}; it must contain one JSON object.")
    if complaints := [complaint for key, value in written.items() for complaint in _complaints_about_key(key, value, path)]:
        raise UserError("\n".join(complaints))
    return written


def _refuse_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    if duplicates := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f'key "{sorted(duplicates)[0]}" appears twice in one object')
    return dict(pairs)


def _complaints_about_key(key: str, value: typing.Any, path: str) -> list[str]:
    """Return what is wrong with the keys of one top-level entry."""
    if key in _SET_ELSEWHERE:
        return [f'{path}: "{key}" is not supported in this file. {_SET_ELSEWHERE[key]}']
    if key not in _TOP_LEVEL:
        return [_unknown(path, key, key, _TOP_LEVEL) + " DeepSpeed would ignore it."]
    typed = _TYPED_SECTIONS.get(key)
    if (typed or key in _PLAIN_SECTIONS) and not isinstance(value, dict):
        return [f'{path}: "{key}" is {json.dumps(value)}; it must be an object.']
    if typed:
        return _unknown_in_model(typed, value, path, key)
    complaints = _unknown_in(_PLAIN_SECTIONS[key], value, path, key) if key in _PLAIN_SECTIONS else []
    return complaints + (_complaints_about_optimizer(value, path) if key == "optimizer" else [])


def _complaints_about_optimizer(section: dict, path: str) -> list[str]:
    """Return what is wrong with the names in the section optimizer. What the chosen optimizer reads is checked with the recipe."""
    chosen, parameters = section.get("type", "auto"), section.get("params", {})
    complaints = []
    if chosen not in _OPTIMIZER_TYPES:
        allowed = joined_by_or([json.dumps(name) for name in _OPTIMIZER_TYPES])
        complaints.append(f"{path}: optimizer.type is {json.dumps(chosen)}; it must be {allowed}.")
    if not isinstance(parameters, dict):
        return [*complaints, f'{path}: "optimizer.params" is {json.dumps(parameters)}; it must be an object.']
    known = ", ".join(sorted(_OPTIMIZER_PARAMETERS))
    return complaints + [f"{one} Known keys: {known}." for one in _unknown_in(_OPTIMIZER_PARAMETERS, parameters, path, "optimizer.params")]


def _unknown(path: str, name: str, key: str, allowed: Iterable[str]) -> str:
    return f'{path}: unknown key "{name}".{nearest(key, sorted(allowed))}'


def _unknown_in(allowed: set[str], section: dict, path: str, name: str) -> list[str]:
    return [_unknown(path, f"{name}.{key}", key, allowed) for key in section if key not in allowed]


def _unknown_in_model(model: type[BaseModel], section: dict, path: str, name: str) -> list[str]:
    """Return a complaint for each key that DeepSpeed's pydantic model of the section does not have, nested sections included."""
    fields = {(field.alias or key): field.annotation for key, field in model.model_fields.items()}
    fields |= {key: field.annotation for key, field in model.model_fields.items()}
    complaints = []
    for key, inner in section.items():
        if key not in fields:
            complaints.append(_unknown(path, f"{name}.{key}", key, fields))
        elif isinstance(inner, dict):
            for kind in (fields[key], *typing.get_args(fields[key])):
                if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel):
                    complaints += _unknown_in_model(kind, inner, path, f"{name}.{key}")
    return complaints


def invalid_values(merged: dict, path: str) -> list[str]:
    """Return a complaint for each value of a completed JSON that DeepSpeed's own types do not allow."""
    complaints = []
    for section, model in _TYPED_SECTIONS.items():
        try:
            model(**merged[section])
        except ValidationError as error:
            complaints += [
                f"{path}: {'.'.join(map(str, (section, *wrong['loc'])))} is {json.dumps(wrong['input'])}: {wrong['msg']}."
                for wrong in error.errors()
            ]
    if (given := merged.get("communication_data_type", "fp32")) not in ("fp32", "bf16", "fp16"):
        complaints.append(f'{path}: communication_data_type is {json.dumps(given)}; it must be "fp32", "bf16" or "fp16".')
    return complaints
