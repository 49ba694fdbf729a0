"""DeepSpeed's JSON: "auto" is filled from the recipe, and whatever DeepSpeed would silently ignore or decide is told before a run."""

import dataclasses
import json

import pytest

from data.command_line import UserError
from launch.training.config import BatchSettings, OptimizerSettings, RunSettings
from launch.training.deepspeed_config import complete, read_deepspeed_json
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
    """Reads `written` as a JSON file and completes it: what DeepSpeed would receive."""

    def merged(written: dict | str, settings: RunSettings = SETTINGS, ranks: int = 2, device: str = "cpu") -> dict:
        path = tmp_path / "engine.json"
        path.write_text(written if isinstance(written, str) else json.dumps(written))
        return complete(read_deepspeed_json(str(path)), str(path), settings, ranks, device)

    return merged


@pytest.fixture
def refusal(merge, tmp_path):
    """The lines of the refusal of `written`, with FILE for the path."""

    def lines(written: dict | str, **how) -> list[str]:
        with pytest.raises(UserError) as refused:
            merge(written, **how)
        return str(refused.value).replace(str(tmp_path / "engine.json"), "FILE").splitlines()

    return lines


def test_every_auto_is_filled_from_the_recipe_and_what_matters_is_written_out(merge):
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


def test_what_is_left_out_is_what_is_auto(merge):
    assert merge({"zero_optimization": {"stage": 1}}) == merge(EVERY_AUTO | {"zero_optimization": {"stage": 1}})


def test_the_file_keeps_its_own_choices(merge):
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


def test_a_number_that_both_write_alike_is_taken(merge):
    alike = {"train_batch_size": 24, "gradient_clipping": 0.7, "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.8, 0.9]}}}
    assert merge(alike | {"zero_optimization": {"stage": 1}}) == merge({"zero_optimization": {"stage": 1}})


def test_every_contradiction_is_named_with_both_places_and_all_at_once(refusal):
    lines = refusal(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "fp16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "bf16"},
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}},
            "zero_optimization": {"stage": 1},
        }
    )
    expected = {
        ("train_batch_size is 32", "batch.global_batch_size makes it 24"),
        ("train_micro_batch_size_per_gpu is 4", "batch.micro_batch_size makes it 3"),
        ("gradient_accumulation_steps is 1", "batch.global_batch_size / (batch.micro_batch_size x ranks) makes it 4"),
        ("gradient_clipping is 1.0", "optimizer.gradient_clipping makes it 0.7"),
        ("bf16.enabled is False", "precision makes it True"),
        ("fp16.enabled is True", "precision makes it False"),
        ("data_types.grad_accum_dtype is bf16", "precision makes it fp32"),
        ("optimizer.type is Adam", "optimizer makes it AdamW"),
        ("optimizer.params.lr is 0.001", "optimizer.learning_rate makes it 0.002"),
        ("optimizer.params.betas is [0.9, 0.95]", "optimizer.beta1, beta2 makes it [0.8, 0.9]"),
        ("optimizer.params.eps is 1e-08", "optimizer.epsilon makes it 1e-06"),
        ("optimizer.params.weight_decay is 0", "optimizer.weight_decay makes it 0.05"),
    }
    assert set(lines) == {f'FILE: {there}; the recipe\'s {here}. Write "auto".' for there, here in expected}


@pytest.mark.parametrize(
    "written, sentence",
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
            'FILE: unknown key "optimizer.params.weight_dekay". Did you mean "weight_decay"?',
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
            'FILE: "scheduler" is not for this file. The learning rate follows the recipe (schedule.kind, schedule.warmup_steps, ...): '
            "delete the section.",
        ),
        (
            {"tensorboard": {"enabled": True}},
            'FILE: "tensorboard" is not for this file. TensorBoard is always written, into the run\'s folder: delete the section.',
        ),
        (
            {"activation_checkpointing": {}},
            'FILE: "activation_checkpointing" is not for this file. Recomputation is the recipe\'s: delete the section and set '
            "recompute: true.",
        ),
    ],
)
def test_a_key_that_nothing_would_read_is_refused_with_the_nearest(refusal, written, sentence):
    assert refusal(written) == [sentence]


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
            "FILE: communication_data_type is fp64; it must be fp32, bf16 or fp16.",
        ),
        (
            {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False},
            "FILE: zero_allow_untested_optimizer is False; it must be True.",
        ),
        (
            {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}},
            'FILE: nothing fills the "auto" of zero_optimization.sub_group_size. Write a value.',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "FILE: zero_optimization.offload_param needs stage 3; the stage is 2.",
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
            "FILE: zero_optimization.stage 0 keeps no float32 master weights under bf16. Nearest: stage 1, or precision float32.",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_starts(refusal, written, begins):
    lines = refusal(written)
    assert len(lines) == 1 and lines[0].startswith(begins), lines


def test_offloading_needs_a_stage_that_divides_the_optimizer(refusal):
    alone = dataclasses.replace(SETTINGS, precision="float32")
    assert refusal({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, settings=alone) == [
        "FILE: zero_optimization.offload_optimizer needs stage 1, 2 or 3; the stage is 0."
    ]


def test_fp16_is_refused_on_a_cpu_and_taken_on_a_gpu(refusal, merge):
    half = dataclasses.replace(SETTINGS, precision="fp16")
    written = EVERY_AUTO | {"zero_optimization": {"stage": 2}}
    assert refusal(written, settings=half) == ["precision fp16: DeepSpeed has no fp16 on a CPU. Allowed here: bf16, float32."]
    merged = merge(written, settings=half, device="cuda")
    assert merged["fp16"]["enabled"] and not merged["bf16"]["enabled"] and merged["data_types"]["grad_accum_dtype"] == "fp16"


def test_complaints_of_every_kind_come_together(refusal):
    lines = refusal(
        {"gradient_clipping": 5, "zero_optimization": {"stage": 0, "sub_group_size": "auto"}, "zero_force_ds_cpu_optimizer": True}
    )
    assert len(lines) == 4, lines


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "--deepspeed FILE is not JSON: "),
        ('{"bf16": {"enabled": true, "enabled": false}}', '--deepspeed FILE is not JSON: "enabled" stands twice in one object.'),
        ("[]", "--deepspeed FILE holds a list; DeepSpeed's JSON is one object."),
    ],
)
def test_a_file_that_is_no_object_is_refused(refusal, text, sentence):
    assert refusal(text)[0].startswith(sentence)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(UserError, match=r"^--deepspeed /no/such\.json: No such file or directory\.$"):
        read_deepspeed_json("/no/such.json")


def test_a_file_from_hugging_faces_documentation_is_taken_with_their_bucket_sizes(merge):
    zero = merge(HUGGING_FACE)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (64 * 64, 3686)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert "auto" not in json.dumps(merge(HUGGING_FACE))


def test_memory_is_pinned_where_there_is_a_gpu(merge):
    written = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}}}
    for device, pinned in (("cpu", False), ("cuda", True)):
        assert merge(written, device=device)["zero_optimization"]["offload_optimizer"]["pin_memory"] is pinned


def test_a_batch_that_the_ranks_cannot_share_is_refused(refusal):
    assert refusal({"zero_optimization": {"stage": 1}}, ranks=5)[1] == "Nearest: 15 or 30."


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_every_file_of_ours_is_accepted_by_us_and_by_deepspeed_itself(path, precision, merge, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    written = path.read_text().replace("/local_nvme", str(tmp_path))
    settings = dataclasses.replace(SETTINGS, precision=precision)
    for ranks in (1, 2, 4):
        merged = merge(written, settings=settings, ranks=ranks)
        assert merged["train_batch_size"] == merged["gradient_accumulation_steps"] * 3 * ranks
        assert "auto" not in json.dumps(merged)
    alone = DeepSpeedConfig(merge(written, settings=settings, ranks=1))
    assert (alone.gradient_clipping, alone.grad_accum_dtype, alone.zero_optimization_stage) == (0.7, "fp32", int(path.stem[4]))
    assert alone.bfloat16_config.enabled == (precision == "bf16")
