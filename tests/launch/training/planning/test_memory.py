"""Memory of a rank by part."""

import dataclasses

import pytest

from data.sampling.batch_plan import BatchSettings
from launch.ranks.layout import Layout
from launch.training.estimates import model_state_bytes, parameters_per_rank
from launch.training.planning.activations import block_bytes
from launch.training.planning.memory import (
    ALLOCATOR_FACTOR,
    BASE_BYTES,
    BASE_SHARE,
    CPU_BASE_BYTES,
    LEAST_BASE_BYTES,
    Memory,
    activation_bytes,
    buffer_bytes,
    logit_bytes,
    micro_batches_in_flight,
    run_memory,
)
from launch.training.settings import OptimizerSettings, RunSettings
from model.config import ModelConfig

MODEL = ModelConfig(vocab_size=1000, sequence_length=128, hidden_size=64, num_layers=4, num_attention_heads=4, intermediate_size=172)
SETTINGS = RunSettings(model=MODEL, batch=BatchSettings(64, 4), train_steps=100)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_parts_add_up_and_model_states_are_the_estimates(stage, optimizer):
    settings = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(name=optimizer))
    memory = run_memory(settings, {"zero_optimization": {"stage": stage}}, Layout(4), "cuda")
    states = model_state_bytes(parameters_per_rank(MODEL, Layout(4)), stage, 4, "bf16", 8 if optimizer == "adamw" else 4)
    assert {name: memory.parts[name] for name in states} == states
    assert list(memory.parts) == [*states, "activations", "logits", "buffers"]
    tensors = sum(memory.parts.values())
    assert memory.tensors == pytest.approx(tensors) and memory.least == pytest.approx(tensors + LEAST_BASE_BYTES)
    assert memory.total == pytest.approx((ALLOCATOR_FACTOR + BASE_SHARE) * tensors + LEAST_BASE_BYTES)


def test_the_base_of_a_process_is_that_of_the_fit_for_large_runs():
    memory = Memory({"weights": 60e9, "optimizer": 40e9}, frozenset({"optimizer"}), "cuda")
    assert memory.total == ALLOCATOR_FACTOR * 60e9 + BASE_BYTES
    assert dataclasses.replace(memory, device="cpu").total == 60e9 + CPU_BASE_BYTES


def test_offloaded_parts_take_no_memory_of_the_gpu():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    on_gpu, on_cpu = (run_memory(SETTINGS, {"zero_optimization": zero}, Layout(2), device) for device in ("cuda", "cpu"))
    assert on_gpu.elsewhere == {"optimizer", "gradients", "weights"} and not on_cpu.elsewhere
    kept = [size for name, size in on_gpu.parts.items() if name not in ("optimizer", "gradients", "weights")]
    assert on_gpu.tensors == pytest.approx(sum(kept)) and on_cpu.tensors == pytest.approx(sum(on_cpu.parts.values()))


def test_micro_batches_in_flight_of_a_pipeline():
    assert [micro_batches_in_flight(m, 4) for m in (1, 3, 8)] == [1, 3, 4]
    assert micro_batches_in_flight(8, 1) == 1 and micro_batches_in_flight(8, 4, "dualpipev") == 4.5
    whole = activation_bytes(MODEL, 4, 128, "cuda", "bf16")
    assert activation_bytes(MODEL, 4, 128, "cuda", "bf16", layout=Layout(4, 4), in_flight=4) == whole
    memory = run_memory(SETTINGS, {"zero_optimization": {"stage": 1}}, Layout(4, 4), "cuda")
    assert memory.parts["activations"] == whole == 4 * block_bytes(MODEL, 4, 128)


def test_a_stage_holds_at_least_an_embedding():
    model = dataclasses.replace(MODEL, vocab_size=100_000)
    memory = run_memory(dataclasses.replace(SETTINGS, model=model), {"zero_optimization": {"stage": 1}}, Layout(4, 4), "cuda")
    assert memory.parts["weights"] >= 2 * model.vocab_size * model.hidden_size


def test_logits_and_their_gradient_by_hand():
    logits = 4 * 128 * 1000
    for precision, size in (("bf16", 4), ("fp16", 6), ("float32", 8)):
        assert logit_bytes(MODEL, 4, 128, "cuda", precision) == logits * (size + 3 * 4), "three chunks of float32, each of all logits here"
    capped = dataclasses.replace(MODEL, logit_softcap=30.0)
    assert logit_bytes(capped, 4, 128, "cuda", "bf16") - logit_bytes(MODEL, 4, 128, "cuda", "bf16") == 2 * logits
    encoder = dataclasses.replace(MODEL, architecture="encoder", num_classes=2, token_head=False)
    assert logit_bytes(encoder, 4, 128, "cuda", "bf16") == 0


def test_buffers_of_each_stage():
    zero = {"stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 2000}
    assert buffer_bytes(MODEL, zero, 1e6, "bf16", Layout(4)) == 1000 * 6 + 2000 * 2
    assert buffer_bytes(MODEL, zero, 1e6, "bf16", Layout(1)) == buffer_bytes(MODEL, {"stage": 0}, 1e6, "bf16", Layout(4)) == 0
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 0}
    assert buffer_bytes(MODEL, zero, 1e6, "bf16", Layout(4)) == 64**2 * 6 + 2 * 1000 * 64 * 2, "the embedding is larger than a block"


def test_a_teacher_is_counted_whole():
    memory = run_memory(SETTINGS, {"zero_optimization": {"stage": 1}}, Layout(4), "cuda", MODEL)
    assert memory.parts["teacher"] == 2 * parameters_per_rank(MODEL, Layout(1))
