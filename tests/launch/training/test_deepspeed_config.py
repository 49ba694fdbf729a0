"""DeepSpeed's JSON: "auto" is filled from the recipe, and what DeepSpeed would silently ignore or decide is refused before a run."""

import dataclasses
import importlib.metadata
import json
import re

import pytest

from data.command_line import UserError, replace
from data.sampling.batch_plan import BatchSettings
from launch.ranks.layout import Layout
from launch.training.deepspeed_config import complete, layout_of
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.deepspeed_limits import known_wrong_gradients
from launch.training.optimizers import OPTIMIZERS
from launch.training.recipe import read_run_settings
from launch.training.settings import OptimizerSettings, RunSettings, share_the_batch
from model.config import ModelConfig
from tests.ranks import REPOSITORY

SETTINGS = RunSettings(
    batch=BatchSettings(global_batch_size=24, micro_batch_size=3),
    optimizer=OptimizerSettings(learning_rate=2e-3, weight_decay=0.05, beta1=0.8, beta2=0.9, epsilon=1e-6, gradient_clipping=0.7),
    model=ModelConfig(hidden_size=64),
    train_steps=10,
)
EVERY_AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
}
# What people bring from Hugging Face's documentation, "DeepSpeed", stage 3 with offload; without its scheduler.
HUGGING_FACE = EVERY_AUTO | {
    "bf16": {"enabled": "auto"},
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


@pytest.fixture
def merge(tmp_path):
    """Write `written` to a JSON file, read it and complete it. Returns what DeepSpeed would receive."""

    def merged(
        written: dict | str,
        settings: RunSettings = SETTINGS,
        ranks: int = 2,
        device: str = "cpu",
        ranks_per_node: int | None = None,
        **changes,
    ) -> dict:
        path = tmp_path / "engine.json"
        path.write_text(written if isinstance(written, str) else json.dumps(written))
        read, settings = read_deepspeed_json(str(path)), replace(settings, **changes)
        layout = layout_of(read, settings, ranks)
        return complete(read, str(path), share_the_batch(settings, layout), layout, device, ranks_per_node)

    return merged


@pytest.fixture
def refusal(merge, tmp_path):
    """The lines of the error that refuses `written`, with FILE for the path."""

    def lines(written: dict | str, **changes) -> list[str]:
        with pytest.raises(UserError) as refused:
            merge(written, **changes)
        return str(refused.value).replace(str(tmp_path / "engine.json"), "FILE").splitlines()

    return lines


def test_auto_is_filled_from_the_recipe_and_defaults_are_written_out(merge):
    merged = merge(EVERY_AUTO | {"zero_optimization": {"stage": 1}})
    assert merged == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True, "immediate_grad_update": False, "check_grad_overflow": True},
        "fp16": {
            "enabled": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def test_a_missing_key_is_filled_like_auto(merge):
    assert merge({"zero_optimization": {"stage": 1}}) == merge(EVERY_AUTO | {"zero_optimization": {"stage": 1}})


def test_values_that_the_json_decides_are_kept(merge):
    chosen = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "communication_data_type": "bf16",
        "prescale_gradients": True,
        "steps_per_print": 7,
        "fp16": {"loss_scale_window": 50},
    }
    merged = merge(chosen)
    assert {name: merged[name] for name in chosen if name != "fp16"} == {name: chosen[name] for name in chosen if name != "fp16"}
    assert merged["fp16"]["loss_scale_window"] == 50


def test_equal_numbers_in_json_and_recipe_are_accepted(merge):
    alike = {"train_batch_size": 24, "gradient_clipping": 0.7, "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.8, 0.9]}}}
    assert merge(alike | {"zero_optimization": {"stage": 1}}) == merge({"zero_optimization": {"stage": 1}})


def test_all_contradictions_are_reported_together_with_both_sources(refusal):
    lines = refusal(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "fp16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "bf16"},
            "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}},
            "zero_optimization": {"stage": 1},
        }
    )
    expected = {
        ("train_batch_size is 32", "24 (batch.global_batch_size)"),
        ("train_micro_batch_size_per_gpu is 4", "3 (batch.micro_batch_size)"),
        ("gradient_accumulation_steps is 1", "4 (batch.global_batch_size / (batch.micro_batch_size x data_parallel_size))"),
        ("gradient_clipping is 1.0", "0.7 (optimizer.gradient_clipping)"),
        ("bf16.enabled is false", "true (precision)"),
        ("fp16.enabled is true", "false (precision)"),
        ('data_types.grad_accum_dtype is "bf16"', '"fp32" (precision)'),
        ("optimizer.params.lr is 0.001", "0.002 (optimizer.learning_rate)"),
        ("optimizer.params.betas is [0.9, 0.95]", "[0.8, 0.9] (optimizer.beta1, beta2)"),
        ("optimizer.params.eps is 1e-08", "1e-06 (optimizer.epsilon)"),
        ("optimizer.params.weight_decay is 0", "0.05 (optimizer.weight_decay)"),
    }
    named = 'FILE: optimizer.type is "Lamb", but the recipe gives "AdamW" (optimizer.name). Write "auto", or set --optimizer.name lamb.'
    assert set(lines) == {named, *(f'FILE: {in_json}, but the recipe gives {in_recipe}. Write "auto".' for in_json, in_recipe in expected)}


@pytest.mark.parametrize(
    "written, message",
    [
        (
            {"gradient_clipp1ng": 1.0},
            'FILE: unknown key "gradient_clipp1ng". Did you mean "gradient_clipping"? DeepSpeed would ignore it.',
        ),
        (
            {"zero_optimization": {"stge": 3}},
            'FILE: unknown key "zero_optimization.stge". Did you mean "stage"?',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            'FILE: unknown key "zero_optimization.offload_param.devise". Did you mean "device"?',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_dekay": 0.1}}},
            'FILE: unknown key "optimizer.params.weight_dekay". Did you mean "weight_decay"? '
            "Known keys: betas, eps, lr, momentum, weight_decay.",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"nesterov": True}}},
            'FILE: unknown key "optimizer.params.nesterov". Known keys: betas, eps, lr, momentum, weight_decay.',
        ),
        *(
            (
                {"optimizer": {"type": name}},
                f'FILE: optimizer.type is {json.dumps(name)}; it must be "auto", "AdamW", "Lamb", "Lars", "Lion", "Muon" or "SGD".',
            )
            for name in ("Adam", "FusedAdam", "OneBitLamb", "adamw", 5, ["Muon"])
        ),
        ({"optimizer": {"kind": "AdamW"}}, 'FILE: unknown key "optimizer.kind".'),
        ({"optimizer": {"params": "auto"}}, 'FILE: "optimizer.params" is "auto"; it must be an object.'),
        ({"fp16": {"los_scale": 0}}, 'FILE: unknown key "fp16.los_scale". Did you mean "loss_scale"?'),
        ({"aio": {"blok_size": 1}}, 'FILE: unknown key "aio.blok_size". Did you mean "block_size"?'),
        ({"comms_logger": {"enable": True}}, 'FILE: unknown key "comms_logger.enable". Did you mean "enabled"?'),
        ({"bf16": True}, 'FILE: "bf16" is true; it must be an object.'),
        ({"zero_optimization": None}, 'FILE: "zero_optimization" is null; it must be an object.'),
        (
            {"scheduler": {"type": "WarmupLR"}},
            'FILE: "scheduler" is not supported in this file. The learning rate follows the recipe (schedule.kind, '
            "schedule.warmup_steps, ...). Delete the section.",
        ),
        (
            {"tensorboard": {"enabled": True}},
            'FILE: "tensorboard" is not supported in this file. TensorBoard logs are always written into the run\'s folder. '
            "Delete the section.",
        ),
        (
            {"activation_checkpointing": {}},
            'FILE: "activation_checkpointing" is not supported in this file. Delete the section and set recompute: true in the recipe.',
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(refusal, written, message):
    assert refusal(written) == [message]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_the_optimizer_does_not_read_is_refused(refusal, merge, name):
    """The message names where optimizer.name was set, also in the settings that the ranks have shared the batch of."""
    settings = read_run_settings(["--optimizer.name", name, "--train_steps", "10", "--batch.global_batch_size", "4"])
    read, keys = OPTIMIZERS[name].json_parameters, ["lr", "betas", "eps", "momentum", "weight_decay"]
    written = {"optimizer": {"type": OPTIMIZERS[name].json_type, "params": dict.fromkeys(read, "auto")}, "zero_optimization": {"stage": 1}}
    merge(written, settings)
    for key in set(keys) - set(read):
        unread = written | {"optimizer": {"type": "auto", "params": {key: "auto"}}}
        message = f"FILE: optimizer.params.{key} has no effect with optimizer.name {name} (command line). Delete it."
        assert refusal(unread, settings=settings) == [message]


@pytest.mark.parametrize(
    "written, begins",
    [
        ({"zero_optimization": {"stage": 5}}, "FILE: zero_optimization.stage is 5: Input should be 0, 1, 2"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            "FILE: zero_optimization.offload_param.device is \"gpu\": Input should be 'none', 'cpu' or 'nvme'.",
        ),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, 'FILE: zero_optimization.offload_optimizer is "cpu": '),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}}, "FILE: zero_optimization.reduce_bucket_size is -1: "),
        ({"zero_optimization": {"stage": 1}, "fp16": {"loss_scale": "x"}}, 'FILE: fp16.loss_scale is "x": '),
        (
            {"zero_optimization": {"stage": 1}, "communication_data_type": "fp64"},
            'FILE: communication_data_type is "fp64"; it must be "fp32", "bf16" or "fp16".',
        ),
        (
            {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False},
            "FILE: zero_allow_untested_optimizer is false; it must be true. Delete it.",
        ),
        (
            {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}},
            'FILE: "auto" is not supported for zero_optimization.sub_group_size. Write a value.',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "FILE: zero_optimization.offload_param is supported only with stage 3 (got 2).",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/no/such"}}},
            "FILE: zero_optimization.offload_optimizer.nvme_path /no/such is not a folder on this machine.",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "FILE: zero_optimization.offload_param.nvme_path None is not a folder on this machine.",
        ),
        (
            {},
            "FILE: zero_optimization.stage 0 has no float32 master weights with precision bf16. Use stage 1, or precision float32.",
        ),
    ],
)
def test_invalid_and_unsupported_values_are_refused(refusal, written, begins):
    lines = refusal(written)
    assert len(lines) == 1 and lines[0].startswith(begins), lines


def test_offload_optimizer_is_refused_with_stage_0(refusal):
    alone = dataclasses.replace(SETTINGS, precision="float32")
    assert refusal({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, settings=alone) == [
        "FILE: zero_optimization.offload_optimizer is supported only with stage 1, 2 or 3 (got 0)."
    ]


def test_fp16_is_refused_on_a_cpu_and_accepted_on_a_gpu(refusal, merge):
    half = dataclasses.replace(SETTINGS, precision="fp16")
    written = EVERY_AUTO | {"zero_optimization": {"stage": 2}}
    assert refusal(written, settings=half) == ["precision fp16: DeepSpeed supports no fp16 on a CPU. Use bf16 or float32."]
    merged = merge(written, settings=half, device="cuda")
    assert merged["fp16"]["enabled"] and not merged["bf16"]["enabled"] and merged["data_types"]["grad_accum_dtype"] == "fp16"


def test_complaints_of_every_kind_are_reported_together(refusal):
    lines = refusal(
        {"gradient_clipping": 5, "zero_optimization": {"stage": 0, "sub_group_size": "auto"}, "zero_force_ds_cpu_optimizer": True}
    )
    assert len(lines) == 4, lines


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "--deepspeed FILE is not valid JSON: "),
        ('{"bf16": {"enabled": true, "enabled": false}}', '--deepspeed FILE is not valid JSON: key "enabled" appears twice in one object.'),
        ("[]", "--deepspeed FILE contains a list; it must contain one JSON object."),
    ],
)
def test_a_file_without_one_json_object_is_refused(refusal, text, message):
    assert refusal(text)[0].startswith(message)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(UserError, match=r"^--deepspeed /no/such\.json cannot be read: No such file or directory\.$"):
        read_deepspeed_json("/no/such.json")


def test_the_file_of_hugging_faces_documentation_gets_their_bucket_sizes(merge):
    zero = merge(HUGGING_FACE)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (64 * 64, 3686)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert "auto" not in json.dumps(merge(HUGGING_FACE))


def test_pin_memory_auto_is_true_only_with_a_gpu(merge):
    written = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}}}
    for device, pinned in (("cpu", False), ("cuda", True)):
        assert merge(written, device=device)["zero_optimization"]["offload_optimizer"]["pin_memory"] is pinned


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(refusal):
    assert refusal({"zero_optimization": {"stage": 1}}, ranks=5)[1] == "Nearest: 15 or 30."


FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_every_file_in_ds_configs_is_accepted_by_us_and_by_deepspeed(path, precision, merge, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    written = path.read_text().replace("/local_nvme", str(tmp_path))
    settings = dataclasses.replace(SETTINGS, precision=precision)
    stages = 2 if path.stem.startswith("pipeline") else 1
    device = "cuda" if path.stem == "zero3_plusplus" else "cpu"
    for ranks in (stages, 2, 4):
        merged = merge(written, settings=settings, ranks=ranks, device=device)
        assert merged["train_batch_size"] == merged["gradient_accumulation_steps"] * 3 * ranks // stages
        assert merged.get("pipeline", {"stages": 1})["stages"] == stages
        assert "auto" not in json.dumps(merged)
    alone = DeepSpeedConfig(merge(written, settings=settings, ranks=stages, device=device))
    stage = int(re.search(r"zero(\d)", path.stem)[1]) if "zero" in path.stem else 1
    assert (alone.gradient_clipping, alone.grad_accum_dtype, alone.zero_optimization_stage) == (0.7, "fp32", stage)
    assert alone.bfloat16_config.enabled == (precision == "bf16")


ZERO_1 = {"zero_optimization": {"stage": 1}}
PIPELINE = ZERO_1 | {"pipeline": {"stages": "auto"}}
# Four blocks: seven layers with embedding, norm and head.
DUALPIPEV = ZERO_1 | {"pipeline": {"schedule": "dualpipev"}}


@pytest.mark.parametrize(
    ("written", "settings", "stages"),
    [
        (ZERO_1, {}, 1),
        (ZERO_1, {"pipeline_stages": 2}, 2),
        (ZERO_1 | {"pipeline": {}}, {}, 2),
        (PIPELINE, {}, 2),
        (PIPELINE, {"pipeline_stages": 4}, 4),
        (PIPELINE, {"pipeline_stages": 1}, 1),
        (ZERO_1 | {"pipeline": {"stages": 4}}, {}, 4),
        (ZERO_1 | {"pipeline": {"stages": 4}}, {"pipeline_stages": 4}, 4),
        (ZERO_1 | {"pipeline": {"stages": 1}}, {}, 1),
    ],
)
def test_pipeline_stages_come_from_recipe_or_json_and_default_to_two(merge, written, settings, stages):
    merged = merge(written, ranks=4, **settings)
    if stages == 1:
        assert "pipeline" not in merged
    else:
        never = {"activation_checkpoint_interval": 0, "pipe_partitioned": False, "grad_partitioned": False}
        assert merged["pipeline"] == {"stages": stages, "partition": "parameters", "schedule": "1f1b"} | never
    assert merged["gradient_accumulation_steps"] == 24 // 3 // (4 // stages)


@pytest.mark.parametrize(("in_json", "in_recipe"), [(4, 2), (2, 4), (4, 1), (1, 2), ("4", 2), (True, 2)])
def test_different_stages_in_json_and_recipe_are_refused(refusal, in_json, in_recipe):
    assert refusal(ZERO_1 | {"pipeline": {"stages": in_json}}, ranks=4, pipeline_stages=in_recipe) == [
        f'FILE: pipeline.stages is {json.dumps(in_json)}, but the recipe gives {in_recipe} (pipeline_stages). Write "auto".'
    ]


def test_ranks_that_do_not_divide_into_the_stages_are_refused(refusal):
    assert refusal(PIPELINE, ranks=3) == ["The number of ranks, 3, is not a multiple of pipeline_stages 2. Nearest: 2 or 4 ranks."]


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (0, "gradients would be clipped by the norm of one pipeline stage"),
        (2, "DeepSpeed's pipeline does not support it"),
        (3, "DeepSpeed's pipeline does not support it"),
    ],
)
def test_a_pipeline_is_refused_with_zero_stages_other_than_1(refusal, stage, reason):
    written = PIPELINE | {"zero_optimization": {"stage": stage}}
    assert refusal(written, precision="float32") == [
        f"FILE: zero_optimization.stage {stage} is not supported with pipeline_stages 2: {reason}. "
        "Use ds_configs/pipeline_zero1.json, or pipeline_stages 1."
    ]


def test_a_pipeline_is_refused_with_offload_optimizer(refusal):
    written = PIPELINE | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert refusal(written) == ["FILE: zero_optimization.offload_optimizer is not tested with pipeline_stages 2. Delete one of them."]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"schedule": "gpipe"}, 'FILE: pipeline.schedule is "gpipe"; it must be "1f1b" or "dualpipev".'),
        ({"partition": "profile"}, 'FILE: pipeline.partition is "profile"; it must be "parameters", "uniform" or "type:Block".'),
        ({"partition": "uniform:2"}, 'FILE: pipeline.partition is "uniform:2"; it must be "parameters", "uniform" or "type:Block".'),
        ({"partition": "type:"}, 'FILE: pipeline.partition is "type:"; it must be "parameters", "uniform" or "type:Block".'),
        ({"partition": None}, 'FILE: pipeline.partition is null; it must be "parameters", "uniform" or "type:Block".'),
        (
            {"partition": "type:Blocks"},
            'FILE: pipeline.partition type:Blocks: the network has no layer of type Blocks. Did you mean "Block"?',
        ),
        ({"partition": "type:nothing"}, "FILE: pipeline.partition type:nothing: the network has no layer of type nothing."),
        ({"shedule": "1f1b"}, 'FILE: unknown key "pipeline.shedule". Did you mean "schedule"?'),
    ],
)
def test_unknown_values_of_the_pipeline_section_are_refused(refusal, section, message):
    assert refusal(PIPELINE | {"pipeline": section}) == [message]


@pytest.mark.parametrize("partition", ["parameters", "uniform", "type:Block", "type:block"])
def test_more_stages_than_layers_are_refused_with_the_nearest_number(merge, refusal, partition):
    written = ZERO_1 | {"pipeline": {"partition": partition}}
    most, kind = (4, f" of type {partition[5:]}") if partition.startswith("type") else (7, "")
    assert merge(written, ranks=most, pipeline_stages=most)["pipeline"]["partition"] == partition
    for ranks, nearest in ((11, 1), (8, 4)):  # a number of stages that divides the ranks
        assert refusal(written, ranks=ranks, pipeline_stages=ranks) == [
            f"pipeline_stages {ranks}: the network has only {most} layer(s){kind}. Nearest: {nearest}."
        ]


def test_dualpipev_needs_two_layers_for_each_stage(merge, refusal):
    fine = dataclasses.replace(SETTINGS, batch=BatchSettings(24, 1))
    assert merge(DUALPIPEV, settings=fine, ranks=3, pipeline_stages=3)["pipeline"]["schedule"] == "dualpipev"
    message = "pipeline_stages 4: DualPipeV cuts the network into 8 parts, but it has only 7 layer(s). Nearest: 2."
    assert refusal(DUALPIPEV, settings=fine, ranks=4, pipeline_stages=4) == [message]
    one_block = dataclasses.replace(fine, model=ModelConfig(hidden_size=64, num_layers=1))
    written = ZERO_1 | {"pipeline": {"schedule": "dualpipev", "partition": "type:Block"}}
    assert refusal(written, settings=one_block) == [
        "pipeline_stages 2: DualPipeV cuts the network into 4 parts, but it has only 1 layer(s) of type Block. Nearest: 1."
    ]


@pytest.mark.parametrize(
    ("batch", "ranks", "given", "nearest"),
    [
        ((24, 12), 2, 2, "batch.micro_batch_size 6"),
        ((20, 10), 2, 2, "batch.micro_batch_size 5"),
        ((14, 7), 2, 2, "batch.micro_batch_size 2"),
        ((24, 6), 4, 2, "batch.micro_batch_size 3"),
        ((3, 1), 2, 3, "batch.global_batch_size 4"),
        ((12, 3), 4, 2, "batch.micro_batch_size 1"),
        ((6, 3), 2, 2, "batch.micro_batch_size 1"),
        ((3, 3), 2, 1, "batch.global_batch_size 12"),
        ((3, None), 2, 3, "batch.global_batch_size 4"),
    ],
)
def test_dualpipev_needs_two_micro_batches_for_each_stage(merge, refusal, batch, ranks, given, nearest):
    settings = dataclasses.replace(SETTINGS, batch=BatchSettings(*batch))
    assert refusal(DUALPIPEV, settings=settings, ranks=ranks) == [
        "FILE: pipeline.schedule dualpipev needs at least 4 micro-batches per step, two for each stage; batch.micro_batch_size "
        f"{batch[1] or 1} and batch.global_batch_size {batch[0]} give {given}. Nearest: {nearest}."
    ]
    name, size = nearest.removeprefix("batch.").split()
    better = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, **{name: int(size)}))
    assert merge(DUALPIPEV, settings=better, ranks=ranks)["gradient_accumulation_steps"] >= 4


def with_heads(heads: int, keys: int, tokens: int = 256) -> RunSettings:
    model = ModelConfig(hidden_size=24, head_size=2, num_attention_heads=heads, num_key_value_heads=keys, sequence_length=tokens)
    return dataclasses.replace(SETTINGS, model=model)


@pytest.mark.parametrize(
    ("settings", "tensor", "sequence", "messages"),
    [
        (with_heads(12, 12), 12, 1, []),
        (with_heads(12, 4), 4, 1, []),
        (with_heads(12, 4), 6, 1, ["tensor_parallel_size 6 does not divide model.num_key_value_heads 4. Nearest: 2."]),
        (
            with_heads(12, 4),
            8,
            1,
            [
                "tensor_parallel_size 8 does not divide model.num_attention_heads 12. Nearest: 4.",
                "tensor_parallel_size 8 does not divide model.num_key_value_heads 4. Nearest: 4.",
            ],
        ),
        (with_heads(12, 4), 1, 2, []),
        (with_heads(12, 4), 1, 4, []),
        (with_heads(12, 3, 240), 1, 12, []),
        (with_heads(12, 1, 240), 1, 12, []),
        (
            with_heads(12, 12),
            1,
            8,
            ["sequence_parallel_size 8 does not divide the 12 attention heads (model.num_attention_heads). Nearest: 4."],
        ),
        (
            with_heads(12, 4, 240),
            1,
            6,
            [
                "sequence_parallel_size 6 is neither a divisor nor a multiple of the 4 key/value heads (model.num_key_value_heads). "
                "Nearest: 2."
            ],
        ),
        (with_heads(12, 12, 250), 1, 4, ["sequence_parallel_size 4 does not divide model.sequence_length 250. Nearest: 2."]),
        (
            with_heads(12, 4, 250),
            1,
            6,
            [
                "sequence_parallel_size 6 is neither a divisor nor a multiple of the 4 key/value heads (model.num_key_value_heads). "
                "Nearest: 2.",
                "sequence_parallel_size 6 does not divide model.sequence_length 250. Nearest: 2.",
            ],
        ),
        (with_heads(12, 4), 2, 4, ["sequence_parallel_size 4 does not divide the 6 attention heads of each rank. Nearest: 2."]),
        (
            with_heads(24, 8, 240),
            2,
            6,
            ["sequence_parallel_size 6 is neither a divisor nor a multiple of the 4 key/value heads of each rank. Nearest: 2."],
        ),
    ],
)
def test_groups_that_do_not_divide_heads_or_tokens_are_refused(merge, refusal, settings, tensor, sequence, messages):
    def start(answer, tensor: int, sequence: int):
        sizes = {"tensor_parallel_size": tensor, "sequence_parallel_size": sequence}
        return answer(ZERO_1, settings=settings, ranks=tensor * sequence, **sizes)

    if messages:
        assert start(refusal, tensor, sequence) == messages
        (nearest,) = {int(re.search(r"Nearest: (\d+)\.", message)[1]) for message in messages}
        tensor, sequence = (nearest, sequence) if "tensor" in messages[0] else (tensor, nearest)
    assert start(merge, tensor, sequence)["train_batch_size"] == 24 * sequence  # to DeepSpeed a part of a sequence is a sample


OVERLAP = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
WITHOUT_FAULT = {"zero_optimization": {"stage": 3, "overlap_comm": True}}


INSTEAD = "Use 1, with ZeRO (ds_configs/zero3.json) or pipeline_stages instead."


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (
            {"architecture": "encoder_decoder"},
            {"tensor_parallel_size": 2, "sequence_parallel_size": 2},
            "tensor_parallel_size 2 and sequence_parallel_size 2: not tested with model.architecture encoder_decoder.",
        ),
        (
            {"positions": "alibi"},
            {"tensor_parallel_size": 2},
            "tensor_parallel_size 2: not supported with model.positions alibi, whose values differ by head.",
        ),
        (
            {"architecture": "encoder", "num_classes": 2},
            {"sequence_parallel_size": 2},
            "sequence_parallel_size 2 is not supported with model.num_classes 2: only one rank has the first token.",
        ),
    ],
)
def test_models_that_a_group_cannot_divide_are_refused_with_alternatives(refusal, merge, model, sizes, message):
    settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, **model))
    assert refusal(ZERO_1, settings=settings, ranks=4, **sizes) == [f"{message} {INSTEAD}"]
    merge(ZERO_1, settings=settings, ranks=4)
    merge(PIPELINE, settings=settings, ranks=4)


@pytest.mark.parametrize(
    ("written", "stages", "wrong", "right", "what"),
    [
        (
            PIPELINE,
            2,
            ("0.16.0", "0.18.2", "0.19.2+cu126"),
            ("0.15.4", "0.19.3", "0.19.8", "1.0.0"),
            "a pipeline with several micro-batches",
        ),
        (ZERO_1, 1, ("0.15.1", "0.18.9"), ("0.19.0", "0.19.8"), "ZeRO-1 in bf16"),
        (OFFLOAD, 1, ("0.15.2", "0.18.9"), ("0.15.1", "0.19.0"), "offload under ZeRO-1 or -2"),
        (OVERLAP, 1, ("0.9.0", "0.19.2"), ("0.19.3", "0.20.0"), "overlap_comm under ZeRO-1 or -2"),
        (WITHOUT_FAULT, 1, (), ("0.15.2", "0.18.9", "0.19.2"), ""),
    ],
)
def test_wrong_gradients_are_known_by_version_and_combination(merge, written, stages, wrong, right, what):
    merged = merge(written)
    for version in (*wrong, *right):
        complaints = [line for line in known_wrong_gradients(version, merged, Layout(2, stages)) if what in line]
        assert bool(complaints) == (version in wrong), version
        assert all(line.startswith(f"DeepSpeed {version} computes wrong gradients with {what} (fixed in 0.19.") for line in complaints)


def test_a_deepspeed_version_with_wrong_gradients_is_refused(refusal, merge, monkeypatch):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.9" if name == "deepspeed" else installed(name))
    assert refusal(PIPELINE) == [
        "DeepSpeed 0.18.9 computes wrong gradients with a pipeline with several micro-batches (fixed in 0.19.3, "
        "github.com/deepspeedai/DeepSpeed #7665, #8154). Install 0.19.3 or newer.",
        "DeepSpeed 0.18.9 computes wrong gradients with ZeRO-1 in bf16 (fixed in 0.19.0, "
        "github.com/deepspeedai/DeepSpeed #7985). Install 0.19.0 or newer.",
    ]
    merge(PIPELINE, precision="float32", batch=BatchSettings(24, 24))  # one micro-batch, no bf16
    merge(WITHOUT_FAULT)


def plus_plus(**zero) -> dict:
    """ZeRO++ with all that it has, changed by `zero`."""
    chosen = {"zero_hpz_partition_size": 2, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    return {"communication_data_type": "fp16", "zero_optimization": {"stage": 3} | chosen | zero}


HPZ_ALONE = {"zero_quantized_weights": False, "zero_quantized_gradients": False}


def test_hpz_auto_is_the_number_of_ranks_of_a_node(merge):
    written = plus_plus(zero_hpz_partition_size="auto")
    for ranks, ranks_per_node, size in ((8, 4, 4), (8, 8, 8), (8, None, 8), (1, 1, 1)):
        zero = merge(written, ranks=ranks, ranks_per_node=ranks_per_node, device="cuda")["zero_optimization"]
        assert zero["zero_hpz_partition_size"] == size


@pytest.mark.parametrize(("size", "ranks", "nearest"), [(3, 8, 2), (16, 8, 8), (5, 4, 4), (2, 1, 1), ("auto", 8, 2)])
def test_hpz_that_does_not_divide_the_ranks_is_refused_with_the_nearest(merge, refusal, size, ranks, nearest):
    written = plus_plus(zero_hpz_partition_size=size)
    assert refusal(written, ranks=ranks, ranks_per_node=3, device="cuda") == [
        f"FILE: zero_optimization.zero_hpz_partition_size {3 if size == 'auto' else size} does not divide {ranks} rank(s). "
        f"Nearest: {nearest}."
    ]
    merge(plus_plus(zero_hpz_partition_size=nearest), ranks=ranks, device="cuda")


def test_on_a_cpu_hpz_is_accepted_and_quantization_is_refused(merge, refusal):
    assert merge(plus_plus(**HPZ_ALONE))["zero_optimization"]["zero_hpz_partition_size"] == 2
    instead = 'Use zero_hpz_partition_size alone, with communication_data_type "fp32".'
    for chosen, names in (
        ({}, "zero_quantized_weights and zero_quantized_gradients"),
        ({"zero_quantized_gradients": False}, "zero_quantized_weights"),
        ({"zero_quantized_weights": False}, "zero_quantized_gradients"),
        (HPZ_ALONE | {"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
    ):
        assert refusal(plus_plus(**chosen)) == [
            f"FILE: zero_optimization: {names}: DeepSpeed's quantization kernels exist only for CUDA. {instead}"
        ]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_plus_plus_is_refused_with_other_stages_than_3(refusal, merge, stage):
    names = "zero_hpz_partition_size and zero_quantized_weights and zero_quantized_gradients"
    assert refusal(plus_plus(stage=stage), device="cuda") == [
        f"FILE: zero_optimization: {names}: supported only with stage 3 (got {stage})."
    ]
    merge(plus_plus(stage=stage, zero_hpz_partition_size=1, **HPZ_ALONE))


@pytest.mark.parametrize("given", ["fp32", "bf16", None])
def test_quantized_gradients_need_fp16_communication(refusal, merge, given):
    written = plus_plus() | {"communication_data_type": given}
    if given is None:
        del written["communication_data_type"]
    assert refusal(written, device="cuda") == [
        f'FILE: communication_data_type is "{given or "fp32"}"; it must be "fp16" with zero_quantized_gradients, whose kernels read '
        "every value as half precision without a check."
    ]
    written["zero_optimization"]["zero_quantized_gradients"] = False
    merge(written, device="cuda")


def test_quantized_gradients_need_reduce_scatter(refusal):
    assert refusal(plus_plus(reduce_scatter=False), device="cuda") == [
        "FILE: zero_optimization.reduce_scatter is false; it must be true with zero_quantized_gradients."
    ]


def test_zero_plus_plus_is_refused_in_untested_combinations(refusal):
    names = "zero_hpz_partition_size and zero_quantized_weights and zero_quantized_gradients"
    assert refusal(plus_plus(), device="cuda", tensor_parallel_size=2) == [
        f"FILE: zero_optimization: {names}: not tested with tensor_parallel_size 2. Use ds_configs/zero3.json."
    ]
    assert refusal(plus_plus(**HPZ_ALONE, offload_param={"device": "cpu"})) == [
        "FILE: zero_optimization.zero_hpz_partition_size is not tested with offload_param. Delete one of them."
    ]


def test_round_robin_gradients_is_refused_with_stages_1_and_2(refusal, merge):
    for stage in (1, 2):
        assert refusal({"zero_optimization": {"stage": stage, "round_robin_gradients": True}}) == [
            f"FILE: zero_optimization.round_robin_gradients is true; it must be false with stage {stage}: it changes the order of the "
            "parameters, and checkpoints would not find them."
        ]
    merge({"zero_optimization": {"stage": 3, "round_robin_gradients": True}})  # where it has no effect
    merge({"zero_optimization": {"stage": 2, "round_robin_gradients": False}})


def test_tensor_parallelism_is_passed_to_deepspeed_except_in_a_pipeline(merge):
    told = merge(ZERO_1, ranks=2, tensor_parallel_size=2)["tensor_parallel"]
    assert told["autotp_size"] == 2
    kinds = {spec["partition_type"]: " ".join(spec["patterns"]) for spec in told["partition_config"]["layer_specs"]}
    assert "query" in kinds["column"] and "output" in kinds["row"] and "query_norm" in kinds["skip"]
    assert "tensor_parallel" not in merge(ZERO_1, ranks=4, tensor_parallel_size=2, pipeline_stages=2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"stage": 1, "compute_grad_norm": False}, "compute_grad_norm"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio"),
    ],
)
def test_unsupported_zero_options_are_refused_by_name(change, name, refusal):
    (message,) = refusal({"zero_optimization": change})
    assert f"zero_optimization.{name}" in message
