"""Tests of the estimate of memory, disk and time."""

import pytest

from launch.compressing import plan
from launch.compressing.settings import PruneSettings, QuantizeSettings
from model.config import ModelConfig, named_size

LLAMA = ModelConfig(**named_size("llama2-7b"))


def test_need_of_a_7b_model_matches_a_hand_calculation():
    """128 samples of 2,048 tokens, two blocks of 202 M weights, second moments of 4,096 (thrice) and 11,008 inputs."""
    needed = plan.estimate_need(LLAMA, 128 * 2048, is_swept=True, flops_a_second=1e11)
    hidden, blocks, moments = 128 * 2048 * 4096 * 4, 202_375_168 * 4, 3 * 4096**2 + 11008**2
    assert hidden + blocks + 8 * moments < needed.memory_bytes < hidden + 2.5 * blocks + 20 * moments
    forward = 2 * 128 * 2048 * 2 * 202_375_168 * 32
    assert needed.seconds > forward / 1e11


def test_depth_costs_only_time_and_ranks_share_time_and_memory():
    deep = ModelConfig(**named_size("llama2-7b") | {"num_layers": 64})
    once, twice = (plan.estimate_need(config, 100_000, True, 1e11) for config in (LLAMA, deep))
    assert once.memory_bytes == twice.memory_bytes and twice.seconds == pytest.approx(2 * once.seconds)
    shared = plan.estimate_need(LLAMA, 100_000, True, 1e11, world_size=4)
    assert shared.seconds == pytest.approx(once.seconds / 4) and shared.memory_bytes < once.memory_bytes


def test_printed_plan_contains_sizes_and_tokens(monkeypatch):
    monkeypatch.setattr(plan, "measured_flops", lambda precision, device: 1e11)
    text = plan.describe_need(LLAMA, QuantizeSettings(model="llama2-7b", dry_run=True), is_swept=True)
    assert "27.0 GB of disk" in text and "Transformers" in text and "27.0 GB." in text
    assert "262,144 calibration tokens" in text
    short = PruneSettings(model="llama2-7b", dry_run=True, sequence_length=512, calibration_samples=10)
    assert "5,120 calibration tokens" in plan.describe_need(LLAMA, short, is_swept=False)
