"""The configuration that DeepSpeed receives: its JSON file, completed from the recipe.

The rule is Hugging Face's: a training number is "auto" in the JSON and comes from the recipe; a number written in both places must be
the same. Everything that affects the mathematics is written out, so that no default of DeepSpeed's (some changed between versions)
can change a run.
"""

import json
from collections.abc import Iterator

from data.command_line import UserError, describe
from launch.ranks.layout import Layout
from launch.training.deepspeed_json import invalid_values
from launch.training.deepspeed_limits import unsupported
from launch.training.optimizers import OPTIMIZERS, Optimizer, optimizer_for
from launch.training.settings import RunSettings

_PRECISION_DEFAULTS = {  # those of DeepSpeed 0.19
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
_FIXED = {
    "zero_allow_untested_optimizer": True,  # the optimizers are torch's or ours, which DeepSpeed calls untested
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's CPU Adam would have to be compiled on the first start
}
_PIPELINE_DEFAULTS = {"partition": "parameters", "schedule": "1f1b"}
_FIXED_IN_A_PIPELINE = {"activation_checkpoint_interval": 0, "pipe_partitioned": False, "grad_partitioned": False}
PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"partition_type": "column", "patterns": [r".*\.attention\.(query|key|value)\.weight$", r".*\.feed_forward\.(gate|up)\.weight$"]},
        {"partition_type": "row", "patterns": [r".*\.attention\.output\.weight$", r".*\.feed_forward\.down\.weight$"]},
        # Whole on every rank, but each rank computes only its own heads. Without the sum of gradients the replicas drift apart, and the
        # loss hardly shows it.
        {"partition_type": "skip", "patterns": [r".*\.attention\.(query_norm|key_norm)\.weight$"], "grad_allreduce": True},
    ],
}
"""The matrices that tensor parallelism splits, as DeepSpeed's AutoTP reads them (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
Embedding and head stay whole."""


def layout_of(written: dict, settings: RunSettings, world_size: int) -> Layout:
    """Return the grid of ranks that the recipe and the JSON ask for. Raises UserError if the ranks do not divide into it."""
    given = written.get("pipeline", {"stages": 1}).get("stages", "auto")
    in_json = given if type(given) is int else 2
    stages = in_json if settings.pipeline_stages is None else settings.pipeline_stages
    return Layout(world_size, stages, settings.tensor_parallel_size, settings.sequence_parallel_size)


def complete(
    written: dict,
    path: str,
    settings: RunSettings,
    layout: Layout,
    device: str,
    ranks_per_node: int | None = None,
    size: int | None = None,
) -> dict:
    """Return what DeepSpeed receives: the JSON of `path` with every "auto" filled from the recipe and every number that matters.

    `ranks_per_node` (default: all ranks) replaces the "auto" of hpZ. `size` (default: batch.global_batch_size) is the smallest number of
    sequences of a step that the run still takes; the engine changes the number of micro-batches for other sizes.
    Raises UserError with all complaints together: numbers that JSON and recipe give differently, and what is not supported.
    """
    values = _recipe_values(settings, layout, size or settings.batch.global_batch_size)
    merged, complaints = _fill_from_recipe(written, path, values)
    optimizer = optimizer_for(settings.optimizer)
    complaints += _unread_by_the_optimizer(written, path, optimizer, describe(settings, "optimizer.name"))
    merged.pop("optimizer", None)  # DeepSpeed receives the optimizer itself, built from the same numbers
    if layout.pipeline_stages > 1:
        merged["pipeline"] = _PIPELINE_DEFAULTS | merged["pipeline"] | _FIXED_IN_A_PIPELINE
    else:
        merged.pop("pipeline", None)
    for section, defaults in _PRECISION_DEFAULTS.items():
        merged[section] = defaults | merged[section]
    zero = merged.setdefault("zero_optimization", {"stage": 0})
    _fill_zero(zero, settings.model.hidden_size, device, ranks_per_node or layout.world_size)
    complaints += [
        f"{path}: {name} is {json.dumps(merged[name])}; it must be {json.dumps(value)}. Delete it."
        for name, value in _FIXED.items()
        if merged.get(name, value) != value
    ]
    if left := [name for name, value in _leaves(merged) if value == "auto"]:
        complaints.append(f'{path}: "auto" is not supported for {", ".join(left)}. Write a value.')
    complaints += invalid_values(merged, path) or unsupported(merged, path, settings, layout, device)
    if complaints:
        raise UserError("\n".join(complaints))
    zero["stage"] = int(zero.get("stage", 0))
    if layout.tensor_parallel_size > 1 and layout.pipeline_stages == 1:  # with both, DeepSpeed would take the stages for data ranks
        merged["tensor_parallel"] = {"autotp_size": layout.tensor_parallel_size, "partition_config": PARTITION}
    return merged | {
        **_FIXED,
        # DeepSpeed counts each rank's part of a sequence as a sample.
        "train_batch_size": merged["train_batch_size"] * layout.sequence_parallel_size,
        "prescale_gradients": merged.get("prescale_gradients", False),
        "gradient_predivide_factor": merged.get("gradient_predivide_factor", 1.0),
        "communication_data_type": merged.get("communication_data_type", "fp32"),
        "steps_per_print": merged.get("steps_per_print", 2**31),
        "wall_clock_breakdown": merged.get("wall_clock_breakdown", False),
    }


def _recipe_values(settings: RunSettings, layout: Layout, size: int) -> dict[str, tuple[object, str]]:
    """Return the numbers of the JSON that the recipe decides: by their dotted key, the value and the settings it comes from."""
    batch, optimizer = settings.batch, optimizer_for(settings.optimizer)
    assert batch.micro_batch_size is not None
    sizes = "batch.global_batch_size / (batch.micro_batch_size x data_parallel_size)"
    values: dict[str, tuple[object, str]] = {
        "train_batch_size": (size, "batch.ramp" if batch.ramp else "batch.global_batch_size"),
        "train_micro_batch_size_per_gpu": (batch.micro_batch_size, "batch.micro_batch_size"),
        "gradient_accumulation_steps": (batch.accumulation_steps(layout.data_parallel_size, size=size), sizes),
        "gradient_clipping": (settings.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
        "bf16.enabled": (settings.precision == "bf16", "precision"),
        "fp16.enabled": (settings.precision == "fp16", "precision"),
        "data_types.grad_accum_dtype": ("fp16" if settings.precision == "fp16" else "fp32", "precision"),
        "optimizer.type": (optimizer.json_type, "optimizer.name"),
        "pipeline.stages": (layout.pipeline_stages, "pipeline_stages"),
    }
    for key, value in optimizer.json_values().items():
        values[f"optimizer.params.{key}"] = value, "optimizer." + ", ".join(optimizer.json_parameters[key])
    return values


def _fill_from_recipe(written: dict, path: str, values: dict[str, tuple[object, str]]) -> tuple[dict, list[str]]:
    """Return the JSON with the recipe's values in it, and a complaint for each number that it gave differently."""
    merged, complaints = json.loads(json.dumps(written)), []
    others = {optimizer.json_type: name for name, optimizer in OPTIMIZERS.items()}
    for name, (value, origin) in values.items():
        *sections, key = name.split(".")
        if sections and sections[0] == "optimizer" and "optimizer" not in written:
            continue
        target = merged
        for section in sections:
            target = target.setdefault(section, {})
        given = target.get(key, "auto")
        if given != "auto" and given != value:
            advice = f", or set --optimizer.name {others[given]}" if name == "optimizer.type" and given in others else ""
            complaints.append(
                f'{path}: {name} is {json.dumps(given)}, but the recipe gives {json.dumps(value)} ({origin}). Write "auto"{advice}.'
            )
        target[key] = value
    return merged, complaints


def _unread_by_the_optimizer(written: dict, path: str, optimizer: Optimizer, named: str) -> list[str]:
    """Return a complaint for each parameter that the JSON gives to an optimizer that does not read it; `named` describes the setting."""
    return [
        f"{path}: optimizer.params.{key} has no effect with {named}. Delete it."
        for key in written.get("optimizer", {}).get("params", {})
        if key not in optimizer.json_parameters
    ]


def _fill_zero(zero: dict, hidden_size: int, device: str, ranks_per_node: int) -> None:
    """Replace each "auto" of the section zero_optimization; those of bucket sizes as Hugging Face's integration does."""
    values = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_hpz_partition_size": ranks_per_node,
    }
    zero |= {name: value for name, value in values.items() if zero.get(name) == "auto"}
    for section in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(section), dict) and zero[section].get("pin_memory") == "auto":
            zero[section]["pin_memory"] = device != "cpu"


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value of nested objects with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
