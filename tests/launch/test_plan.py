"""What a run will need, worked out before it starts."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.training.config import BatchSettings, RunSettings, ScheduleSettings
from launch.training.plan import model_state_bytes, peak_flops, plan
from launch.training.processes import Process
from model.config import ModelConfig, count_parameters

# Bytes a parameter of weights, gradients and optimizer (with its master copy), before anything is divided over the ranks.
BYTES = {"float32": (4, 4, 8), "bf16": (2, 4, 12), "fp16": (2, 2, 12)}


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize(("stage", "divided"), [(0, (1, 1, 1)), (1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_model_states_by_hand_on_four_ranks(precision, stage, divided):
    weights, gradients, optimizer = (1000 * size / by for size, by in zip(BYTES[precision], divided, strict=True))
    assert model_state_bytes(1000, stage, 4, precision) == {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def test_the_papers_example_of_seven_and_a_half_billion_parameters_on_64_ranks():
    """Figure 1 of arXiv 1910.02054, fp16 with Adam: 120, 31.4, 16.6 and 1.9 GB."""
    totals = [sum(model_state_bytes(7_500_000_000, stage, 64, "fp16").values()) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


SETTINGS = RunSettings(
    model=ModelConfig(vocab_size=1000, sequence_length=128, hidden_size=64, num_layers=2, num_attention_heads=4, intermediate_size=172),
    batch=BatchSettings(global_batch_size=64, micro_batch_size=4),
    train_steps=100,
)
TRAIN = type("Stream", (), {"__len__": lambda self: 409_600, "num_documents": 1234})()
HELD_OUT = type("Stream", (), {"__len__": lambda self: 5_000})()


def lines(settings: RunSettings, zero: dict) -> dict[str, str]:
    printed = plan(
        settings,
        {"zero_optimization": zero},
        Process(0, 4, 0, 4),
        "cpu",
        SimpleNamespace(train=TRAIN, validation=HELD_OUT, tokenizer_path=Path("tokenizer.model")),
    )
    return dict(line.strip().split(": ", 1) for line in printed.splitlines())


def test_the_plan_says_everything_that_will_happen():
    shown = lines(SETTINGS, {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}})
    assert list(shown) == ["model", "work", "data", "batch", "length", "rate", "engine", "memory", "output"]
    parameters = count_parameters(SETTINGS.model)
    assert shown["model"].startswith(f"{parameters:,} parameters: 2 blocks, hidden 64, 4 heads (4 key/value), swiglu 172, rmsnorm pre, ")
    assert shown["model"].endswith("rotary positions, vocabulary 1,000, context 128")
    assert shown["data"] == "prepared: 409,600 training tokens in 1,234 documents, 5,000 held out; tokenizer.model"
    assert shown["batch"] == "64 sequences = micro-batch 4 x accumulation 4 x ranks 4; 8,192 tokens a step"
    assert shown["length"] == "100 steps, 819,200 tokens, 2.00 epochs"
    assert shown["rate"] == "0.0003, cosine, warm-up 100 steps, down to 0; clipping 1, decay 0.1"
    assert shown["engine"] == f"ZeRO-2, bf16, 4 rank(s) on cpu, optimizer on cpu; {SETTINGS.deepspeed}"
    mib = parameters / 2**20
    assert shown["memory"] == (
        f"model states per rank {6 * mib:.1f} MiB: weights {2 * mib:.1f} MiB, gradients {mib:.1f} MiB, optimizer {3 * mib:.1f} MiB; "
        "activations not counted"
    )
    assert shown["output"] == "runs/run: checkpoints/, tb/ (TensorBoard), metrics.jsonl, log.txt, run.json"


def test_a_constant_rate_goes_down_to_nothing_else():
    constant = dataclasses.replace(SETTINGS, schedule=ScheduleSettings(kind="constant"))
    assert lines(constant, {"stage": 1})["rate"] == "0.0003, constant, warm-up 100 steps; clipping 1, decay 0.1"


def test_a_given_peak_is_taken():
    assert peak_flops(dataclasses.replace(SETTINGS, peak_tflops=312.5), "cuda") == (312.5e12, "peak_tflops")


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_a_known_device_has_the_peak_of_its_data_sheet(device, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    flops, origin = peak_flops(SETTINGS, "cuda")
    assert flops == tflops * 1e12 and origin.startswith("data sheet of ")


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000"])
def test_a_device_that_is_only_named_like_a_known_one_is_measured(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    product = SimpleNamespace(asked=None)

    def measure(precision, where):
        product.asked = precision, where
        return 7e12

    monkeypatch.setattr("launch.training.plan.measured_flops", measure)
    assert peak_flops(SETTINGS, "cuda") == (7e12, "measured: a matrix product of 1024 x 1024 x 1024")
    assert product.asked == ("bf16", "cuda")


def test_the_peak_of_a_cpu_is_measured():
    torch.set_num_threads(1)
    flops, origin = peak_flops(dataclasses.replace(SETTINGS, precision="float32"), "cpu")
    assert 1e8 < flops < 1e14 and origin.startswith("measured")
