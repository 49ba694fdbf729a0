"""launch/plan.py: the layouts that it prints, their commands, and what it refuses."""

import dataclasses
import re
import shlex

import pytest

from data.command_line import UserError
from launch.training.planning.devices import DEVICES
from launch.training.planning.layouts import candidates
from launch.training.planning.report import cluster_of, report, with_batch
from launch.training.planning.settings import OWN_OPTIONS, PlanSettings, read_plan_settings
from launch.training.recipe import read_run_settings

SMALL = ["--size", "gpt2-355m", "--tokens", "1e9", "--gpus", "8", "--device", "a100-40gb"]


def planned(words: list[str]) -> str:
    return report(read_plan_settings(words), words)


@pytest.fixture(scope="module")
def small() -> str:
    return planned([*SMALL, "--price", "2"])


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.strip().startswith(("deepspeed ", "sbatch "))]


def test_five_layouts_are_shown_fastest_first_with_all_their_numbers(small):
    rows = [line.strip() for line in small.splitlines()]
    layouts = [row for row in rows if re.match(r"\d: ZeRO-[123], ", row)]
    assert [row[0] for row in layouts] == ["1", "2", "3", "4", "5"] and len(set(row[3:] for row in layouts)) == 5
    seconds = [
        float(re.match(r"time: ([\d.]+) s a step, [\d,]+ tokens/s, MFU [\d.]+%; bubble ", row)[1]) for row in rows if row[:5] == "time:"
    ]
    assert len(seconds) == 5 and seconds == sorted(seconds)
    for row in (row for row in rows if row.startswith("memory:")):
        total, limit, parts = re.fullmatch(r"memory: ([\d.]+) GB of ([\d.]+) GB: (.*)", row).groups()
        numbers = [float(number) / (1 if unit == "GB" else 1000) for number, unit in re.findall(r"([\d.]+) (GB|MB)", parts)]
        assert float(total) == pytest.approx(sum(numbers), abs=0.05 * len(numbers)) and float(total) <= float(limit) == 40
        assert [part.split(" ")[0] for part in parts.split(", ")][:5] == ["weights", "gradients", "optimizer", "activations", "logits"]
    assert sum(bool(re.match(r"cost: [\d.]+ days, [\d,]+ device-hours, [\d,]+ kWh, price [\d,]+$", row)) for row in rows) == 5
    assert any(
        re.match(r"checkpoint: 4.3 GB, 4 s to write at 1 GB/s a node; one every [\d.]+ h \([\d,]+ steps of layout 1\)", row) for row in rows
    )


def test_every_command_is_read_by_pretrain_and_gives_its_layout(small):
    found = commands(small)
    assert len(found) == 5
    for words, row in zip(found, re.findall(r"\d: (ZeRO-.*)", small), strict=True):
        assert words[:4] == ["deepspeed", "--num_gpus", "8", "launch/pretrain.py"]
        settings = read_run_settings(words[4:])
        assert settings.size == "gpt2-355m" and settings.train_tokens == 1e9
        assert f"micro-batch {settings.batch.micro_batch_size} x" in row and ("recompute" in row) == settings.recompute
        assert f"ZeRO-{re.search(r'zero(.)', settings.deepspeed)[1]}" in row
        assert (settings.pipeline_stages or 1) == int((re.search(r"(\d+) pipeline", row) or [0, 1])[1])
        assert settings.tensor_parallel_size == int((re.search(r"tensor parallel (\d+)", row) or [0, 1])[1])
        assert not set(words) & set(OWN_OPTIONS)


def test_many_nodes_are_started_by_slurm():
    text = planned(["--size=llama-1.1b", "--tokens=1e9", "--gpus=16", "--batch.global_batch_size=64", "--nodes=4", "--seed", "7"])
    for words in commands(text):
        start = ["sbatch", "--nodes", "4", "--ntasks-per-node", "4", "--gpus-per-node", "4", "launch/slurm/pretrain.sbatch"]
        assert words[: len(start)] == start
        settings = read_run_settings(words[len(start) :])
        assert settings.seed == 7 and settings.batch.global_batch_size == 64 and words.count("--batch.global_batch_size") == 0


def test_settings_that_the_user_gives_are_kept():
    words = [*SMALL, "--tensor_parallel_size", "2", "--recompute", "--batch.micro_batch_size=4", "--batch.global_batch_size=64"]
    for command in commands(planned(words)):
        settings = read_run_settings(command[4:])
        assert (settings.tensor_parallel_size, settings.recompute, settings.batch.micro_batch_size) == (2, True, 4)


def test_only_layouts_that_the_project_allows_are_candidates():
    settings = with_batch(read_plan_settings(["--size", "gpt2-124m", "--tokens", "1e9", "--gpus", "8"]))
    found, reasons = candidates(settings, cluster_of(settings))
    assert {one.zero_stage for one in found if one.layout.pipeline_stages > 1} == {1} and {one.zero_stage for one in found} == {1, 2, 3}
    assert max(one.layout.tensor_parallel_size for one in found) == 4, "8 does not divide 12 heads"
    assert any("tensor_parallel_size 8 does not divide model.num_attention_heads 12" in reason for reason in reasons)
    for one in found:
        assert one.micro_batches * one.settings.batch.micro_batch_size * one.layout.data_parallel_size == settings.batch.global_batch_size


def test_a_batch_in_the_published_band_is_chosen_if_none_is_given():
    def size(*words: str) -> int:
        return with_batch(read_plan_settings(["--size", "llama3-8b", "--gpus", "64", *words])).batch.global_batch_size

    assert size("--tokens", "1e12") == 512 and size("--tokens", "1e9") == 64, "at least one sequence for each device"
    assert size("--tokens", "1e12", "--batch.global_batch_size", "96") == 96


def test_a_head_size_that_8_does_not_divide_is_warned_of():
    words = ["--size", "gpt3-2.7b", "--tokens", "1e9", "--gpus", "8", "--model.head_size", "60", "--model.num_attention_heads", "40"]
    assert "warning: model.head_size 60 is not a multiple of 8: published runs with such heads took 1.3 times as long. " in planned(words)


def test_a_model_that_fits_nowhere_is_refused_with_what_would_help():
    words = ["--size", "llama3-70b", "--tokens", "1e9", "--gpus", "2", "--device", "a100-40gb", "--batch.global_batch_size", "2"]
    with pytest.raises(UserError) as refused:
        planned(words)
    message = str(refused.value)
    assert message.startswith(
        "No layout of gpus 2 (command line) fits device a100-40gb (command line) with 40.0 GB: the smallest (ZeRO-3, "
    )
    assert message.endswith("Use more --gpus, a shorter --model.sequence_length or a smaller model.")


def test_settings_that_allow_no_layout_are_refused_with_the_reasons():
    with pytest.raises(UserError, match=r"The number of ranks, 8, is not a multiple of tensor_parallel_size 5\. Nearest: 5 or 10 ranks\."):
        planned([*SMALL, "--tensor_parallel_size", "5"])
    one = [word for name in ("tensor_parallel_size", "pipeline_stages", "sequence_parallel_size") for word in (f"--{name}", "1")]
    with pytest.raises(UserError, match=r"(?s)No layout of gpus 8 .*\.global_batch_size 3 \(command line\) is not a multiple of data"):
        planned([*SMALL, "--batch.global_batch_size", "3", *one])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "3", "--nodes", "2"], "gpus 3 (command line) is not a multiple of nodes 2 (command line). Nearest: --gpus 2 or 4."),
        (["--gpus", "12"], "gpus 12 (command line) does not fill nodes of 8. Nearest: --gpus 8 or 16; or give --nodes."),
        (["--gpus", "8", "--device", "h101"], 'a100-80gb, b200, mi300x or cpu. Did you mean "h100"? Set on the command line.'),
        (["--gpus", "0"], "gpus is 0; it must be at least 1 and below 1048576."),
        (["--gpus", "8", "--pue", "0.5"], "pue is 0.5; it must be at least 1 and at most 3."),
        ([], "gpus is missing. --help shows how to give it."),
        (["--gpus", "8", "--size", "llama3-9b"], 'Unknown size "llama3-9b". Did you mean "llama3-8b"?'),
        (["--gpus", "8", "--train_steps", "5"], "both set the length of training"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_settings_are_refused_in_a_sentence(words, message):
    with pytest.raises(UserError) as refused:
        read_plan_settings([*([] if "--size" in words else ["--size", "gpt2-124m"]), "--tokens", "1e9", *words])
    assert message in str(refused.value)


def test_own_options_and_devices_are_those_of_the_settings():
    fields = {field.name for field in dataclasses.fields(PlanSettings)}
    assert {name.removeprefix("--") for name in OWN_OPTIONS} < fields
    choices = PlanSettings.__annotations__["device"].__args__
    assert set(choices) == {*DEVICES, "cpu"}


def test_named_data_is_opened_and_its_epochs_are_shown(prepared):
    words = ["--tokens", "1e6", "--gpus", "2", "--device", "h100", "--model.num_layers", "2", "--data", str(prepared)]
    text = planned(words)
    assert re.search(r"data: \w+: [\d,]+ training tokens, read \d+\.\d\d times", text)
    assert all(str(prepared) in command for command in commands(text))
    with pytest.raises(UserError, match=r"nowhere"):
        planned([*words[:-1], "nowhere"])


def test_this_machines_cpu_can_be_planned():
    words = ["--tokens", "1e7", "--gpus", "2", "--device", "cpu", "--peak_tflops", "0.1", "--model.num_layers", "2"]
    text = planned(words)
    assert "devices: 2 cpu (0.1 TFLOP/s, " in text and commands(text)[0][:4] == [
        "deepspeed",
        "--num_accelerators",
        "2",
        "launch/pretrain.py",
    ]
