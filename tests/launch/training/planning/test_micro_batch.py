"""The default micro-batch, and runs that cannot fit."""

import re

import pytest

from data.command_line import UserError
from launch import REPOSITORY
from launch.ranks.layout import Layout
from launch.training.deepspeed_config import complete
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.planning import micro_batch
from launch.training.planning.memory import run_memory
from launch.training.planning.micro_batch import FITS, refuse_what_cannot_fit, share_and_complete
from launch.training.recipe import read_run_settings
from launch.training.settings import share_the_batch

GPT2 = ["--size", "gpt2-124m", "--train_tokens", "1e9", "--batch.global_batch_size", "512"]
ZERO1 = {"zero_optimization": {"stage": 1}}


def default_size(words: list[str], layout: Layout, device: str, memory_bytes: float = 0.0, json: str = "zero1.json") -> int:
    path = str(REPOSITORY / "ds_configs" / json)
    settings = read_run_settings([*words, "--deepspeed", path])
    batches, written = settings.batch_plan, read_deepspeed_json(path)
    shared, merged = share_and_complete(settings, written, layout, device, memory_bytes, layout.world_size, batches, 0)
    size = shared.batch.micro_batch_size
    assert size is not None and merged["train_micro_batch_size_per_gpu"] == size
    assert merged["gradient_accumulation_steps"] * size * layout.data_parallel_size == min(batches.sizes_from(0))
    return size


def test_a_cpu_gets_at_most_8192_tokens():
    assert default_size(GPT2, Layout(1), "cpu") == 8
    assert default_size(GPT2, Layout(128), "cpu") == 4, "the share of a rank"
    assert default_size([*GPT2[:4], "--batch.global_batch_size", "12"], Layout(1), "cpu") == 6, "the largest divisor of 12 up to 8"
    assert default_size(["--size", "llama3-8b", "--train_tokens", "1e9", "--model.sequence_length", "16384"], Layout(1), "cpu") == 1


def test_a_gpu_gets_the_largest_micro_batch_that_fits():
    sizes = {gigabytes: default_size(GPT2, Layout(1), "cuda", gigabytes * 1e9) for gigabytes in (8, 24, 40, 80, 1000)}
    assert list(sizes.values()) == sorted(sizes.values()) and 1 < sizes[8] < sizes[80] < sizes[1000] == 512
    for gigabytes, size in sizes.items():
        totals = [total(size), total(min(512, 2 * size))]
        assert totals[0] <= FITS * gigabytes * 1e9 and (size == 512 or totals[1] > FITS * gigabytes * 1e9)


def total(size: int, *words: str) -> float:
    settings = read_run_settings([*GPT2, "--batch.micro_batch_size", str(size), *words])
    return run_memory(settings, ZERO1, Layout(1), "cuda").total


def test_a_given_micro_batch_is_kept():
    assert default_size([*GPT2, "--batch.micro_batch_size", "64"], Layout(1), "cpu") == 64


def test_other_rules_of_the_default_hold_below_the_limit():
    assert default_size([*GPT2[:4], "--batch.global_batch_size", "8", "--log.noise_scale"], Layout(1), "cpu") == 4, "two micro-batches"
    assert default_size([*GPT2[:4], "--batch.global_batch_size", "48", "--batch.ramp", "0:12 1M:48"], Layout(1), "cpu") == 6
    assert default_size(GPT2, Layout(8, 8), "cpu", json="pipeline_zero1.json") == 8
    assert default_size([*GPT2[:4], "--batch.global_batch_size", "64"], Layout(8, 8), "cpu", json="pipeline_zero1.json") == 2, (
        "four micro-batches a stage"
    )


def refused(words: list[str], layout: Layout, device: str, gigabytes: float, json: str = "zero1.json") -> str | None:
    """The message that refuses a run; None if it is not refused."""
    path = str(REPOSITORY / "ds_configs" / json)
    settings = share_the_batch(read_run_settings(words), layout)
    merged = complete(read_deepspeed_json(path), path, settings, layout, device)
    try:
        refuse_what_cannot_fit(settings, merged, layout, device, gigabytes * 1e9)
    except UserError as error:
        return str(error)
    return None


def test_a_micro_batch_that_cannot_fit_is_refused_with_one_that_fits():
    message = refused([*GPT2, "--batch.micro_batch_size", "512"], Layout(1), "cuda", 80)
    assert message and message.startswith("The run needs at least ")
    assert "with batch.micro_batch_size 512 (command line) (most of it activations: " in message
    assert "the GPU has 80.0 GB. --batch.micro_batch_size " in message
    smaller = re.search(r"--batch\.micro_batch_size (\d+) fits", message)
    assert smaller and refused([*GPT2, "--batch.micro_batch_size", smaller[1]], Layout(1), "cuda", 80) is None
    assert total(int(smaller[1])) <= FITS * 80e9 < total(2 * int(smaller[1]))


@pytest.mark.parametrize(
    ("size", "ranks", "gigabytes", "advice"),
    [
        ("llama-1.1b", 1, 36, "--recompute fits."),
        ("llama2-7b", 8, 40, "--deepspeed ds_configs/zero3.json"),
        ("llama2-7b", 1, 40, "--deepspeed ds_configs/zero3_offload.json"),
        ("llama2-70b", 1, 12, "Use more ranks, or a smaller model"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_smallest_change_that_helps(size, ranks, gigabytes, advice):
    words = ["--size", size, "--train_tokens", "1e9", "--batch.global_batch_size", str(ranks), "--model.sequence_length", "8192"]
    message = refused(words, Layout(ranks), "cuda", gigabytes)
    assert message and f"{gigabytes:.1f} GB. {advice}" in message
    if given := re.search(r"--deepspeed ds_configs/(\w+\.json)( --recompute)?", message):
        assert refused([*words, *(given[2] or "").split()], Layout(ranks), "cuda", gigabytes, given[1]) is None


def test_a_cpu_refuses_only_what_is_far_over_its_memory():
    words = [*GPT2, "--batch.micro_batch_size", "64"]
    settings = share_the_batch(read_run_settings(words), Layout(1))
    needs = run_memory(settings, ZERO1, Layout(1), "cpu").total / 1e9
    assert refused(words, Layout(1), "cpu", needs / 1.9) is None
    message = refused(words, Layout(1), "cpu", needs / 2.1)
    assert message and "this machine has for each rank " in message


def test_memory_of_a_machine_is_shared_by_its_ranks(monkeypatch):
    monkeypatch.setattr(micro_batch, "machine_bytes", lambda: 64e9)
    assert micro_batch.device_bytes("cpu", 4) == 16e9
    monkeypatch.setattr(micro_batch.torch.cuda, "device_count", lambda: 0)
    assert micro_batch.device_bytes("cuda", 4) == float("inf"), "a missing GPU is reported later"
