"""The scripts of launch/: they agree with one another, and refuse a user's mistake with one message and status 2."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.command_line import UserError
from launch import convert, export, generate, pretrain
from launch.checkpoints import checkpoint
from launch.evaluation import evaluating
from launch.evaluation.settings import EvaluateSettings
from launch.ranks.launchers import free_port
from launch.ranks.stopping import SAVED_AND_UNFINISHED
from tests.ranks import REPOSITORY, clean_environment, finish, start_ranks
from tests.words import over

PRETRAIN = REPOSITORY / "launch" / "pretrain.py"
BINARIES = Path(sys.executable).parent
LAYOUTS = {
    "zero1-bf16": (1, ["--deepspeed", "ds_configs/zero1.json"]),
    "zero2": (2, ["--deepspeed", "ds_configs/zero2.json", "--precision", "float32"]),
    "zero3": (2, ["--deepspeed", "ds_configs/zero3.json", "--precision", "float32"]),
}


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def launched(command: list[str], **more) -> subprocess.Popen:
    environment = clean_environment(TERM="dumb")
    return subprocess.Popen(
        [str(BINARIES / command[0]), *command[1:]],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prepared):
    """A finished tiny run of each layout, by name; its last validation covers the whole held-out split."""
    folders = {}
    for name, (world_size, choice) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("runs") / name
        arguments = ["--data", str(prepared), "--output", str(folder), "--model.vocab_size", "800", "--model.sequence_length", "32"]
        arguments += ["--model.hidden_size", "32", "--model.num_layers", "2", "--model.num_attention_heads", "2", "--train_steps", "6"]
        arguments += ["--schedule.warmup_steps", "1", "--batch.global_batch_size", "8", "--batch.micro_batch_size", "2"]
        arguments += ["--log.validation_samples", "0", "--log.sample_interval", "3", *choice]
        finish(start_ranks(world_size, PRETRAIN, *arguments, OMP_NUM_THREADS="1"))
        folders[name] = folder
    return folders


def validation_loss(run: Path) -> float:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(entry["loss/validation"] for entry in reversed(entries) if "loss/validation" in entry)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_of_a_checkpoint_gives_the_validation_loss(layout, runs, prepared):
    result = evaluating.evaluate(EvaluateSettings(str(runs[layout])), show_progress=False)
    # Training validates in bf16 where it trains in bf16; the checkpoint holds the float32 master weights.
    assert result.loss == pytest.approx(validation_loss(runs[layout]), abs=0.01 if "bf16" in layout else 1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / 0.6931471805599453 / result.bytes)


def test_sliding_window_predicts_every_token_once_with_more_context(runs):
    side_by_side = evaluating.evaluate(EvaluateSettings(str(runs["zero2"])), show_progress=False)
    sliding = evaluating.evaluate(EvaluateSettings(str(runs["zero2"]), stride=8), show_progress=False)
    assert sliding.tokens == side_by_side.tokens
    assert sliding.loss == pytest.approx(side_by_side.loss, rel=0.01)
    assert sliding.loss != side_by_side.loss


def test_samples_of_one_token_can_be_trained_on_and_generated_from(tiny, tmp_path):
    arguments = [*tiny, "--model.sequence_length", "1", "--train_steps", "2", "--schedule.warmup_steps", "1", "--log.sample_interval", "1"]
    assert "Done: 2 steps." in finish(start_ranks(1, PRETRAIN, *arguments, OMP_NUM_THREADS="1"))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_loaded_by_transformers_and_generates_as_the_run(layout, runs, tmp_path, capsys, prepared):
    folder = tmp_path / "exported"
    assert export.main([str(runs[layout]), "--output", str(folder)]) == 0
    assert "no missing or unexpected key" in capsys.readouterr().out
    generated = []
    for model in (runs[layout], checkpoint.published(runs[layout] / "checkpoints")[0], folder):
        assert generate.main([str(model), "--prompt", "abc", "--max_new_tokens", "12", "--temperature", "0"]) == 0
        generated.append(capsys.readouterr().out)
    assert generated[0] == generated[1] == generated[2]
    exported = evaluating.evaluate(EvaluateSettings(str(folder), str(prepared)), show_progress=False)
    assert exported.loss == pytest.approx(evaluating.evaluate(EvaluateSettings(str(runs[layout])), False).loss, abs=1e-5)
    before = tree(folder)
    with pytest.raises(UserError, match="nothing is overwritten"):
        export.main([str(runs[layout]), "--output", str(folder)])
    assert tree(folder) == before


def test_converted_run_evaluates_exports_and_generates_as_the_run(runs, tmp_path, capsys):
    folder = tmp_path / "whole"
    assert convert.main([str(runs["zero3"]), "--output", str(folder)]) == 0
    assert "2 files -> 1" in capsys.readouterr().out
    losses = [evaluating.evaluate(EvaluateSettings(str(run)), show_progress=False).loss for run in (runs["zero3"], folder)]
    assert losses[0] == losses[1]
    assert export.main([str(folder), "--output", str(tmp_path / "exported")]) == 0
    generated = []
    for run in (runs["zero3"], folder):
        capsys.readouterr()
        assert generate.main([str(run), "--prompt", "abc", "--max_new_tokens", "12", "--temperature", "0"]) == 0
        generated.append(capsys.readouterr().out)
    assert generated[0] == generated[1]


MISTAKES = [
    (["--deepspeed", "nowhere.json"], "No such file"),
    (["--data", "nowhere"], "is not a prepared data folder"),
    (["--modle.hidden_size", "64"], 'Did you mean "model.hidden_size"'),
    (["--batch.global_batch_size", "7"], "Nearest: 6 or 8"),
    (["--model.vocab_size", "700"], "Nearest: 800"),
    (["--precision", "fp16"], "no fp16 on a CPU"),
    (["--size", "gpt2-124"], 'Did you mean "gpt2-124m"'),
    (["--train_steps", "null", "--train_tokens", "100"], "less than one step"),
    (["--optimizer.learning_rate", "fast"], "optimizer.learning_rate"),
    (["--checkpoint.keep", "1"], "At least 2|at least 2"),
    (["--resume"], "has no run to resume"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistake_is_refused_before_any_file_is_made(arguments, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what the script sets
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=message):
        pretrain.main(over(tiny, arguments))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train" / "00000.bin").write_bytes((folder / "train" / "00000.bin").read_bytes()[:-2]), "bytes long"),
        (lambda folder: (folder / "train" / "00000.idx").write_bytes(b"nonsense" * 9), "is not a Megatron index"),
        (lambda folder: (folder / "train" / "00000.bin").unlink(), "No such file"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
    ],
)
def test_damaged_data_is_refused_with_the_file_name(damage, message, tiny, prepared, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(REPOSITORY)
    copy = shutil.copytree(prepared, tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError, match=message):
        pretrain.main(over(tiny, ["--data", str(copy), "--dry_run"]))


def test_only_the_first_rank_reports_a_mistake_and_both_end_with_2(tiny):
    processes = start_ranks(2, PRETRAIN, *tiny, "--batch.global_batch_size", "6")
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "Nearest: 4 or 8" in outputs[0] and "Traceback" not in outputs[0]
    assert outputs[1].strip() == ""


def test_folder_of_another_run_is_refused_and_not_changed(runs, tiny):
    folder = runs["zero1-bf16"]
    before = tree(folder)
    processes = start_ranks(1, PRETRAIN, *tiny, "--output", str(folder))
    output = processes[0].communicate(timeout=60)[0]
    assert processes[0].returncode == 2
    assert "has another run" in output and "train_steps: 6 -> 12" in output
    assert tree(folder) == before


def test_dry_run_prints_the_plan_and_makes_no_files(tiny, tmp_path):
    output = finish(start_ranks(1, PRETRAIN, *tiny, "--dry_run"))[0]
    for line in ("parameters", "micro-batch 2 x accumulation 4 x data parallel 1", "12 steps", "model states per rank", "checkpoints/"):
        assert line in output
    assert not (tmp_path / "run").exists()


def test_ctrl_c_under_the_deepspeed_launcher_saves_and_can_resume(tiny, tmp_path):
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), str(PRETRAIN), *tiny]
    command += ["--train_steps", "80", "--checkpoint.interval", "0", "--log.validation_interval", "0", "--log.sample_interval", "0"]
    process = launched(command, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while (not metrics.is_file() or not metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=60)[0]
    assert "saved. The same command resumes from it" in output, output
    (saved,) = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert checkpoint.find_damage(saved) is None
    again = launched(command)
    output = again.communicate(timeout=180)[0]
    assert f"Resuming from step {checkpoint.step_of(saved)} of 80" in output, output
    assert again.returncode == 0


def test_signal_ends_the_run_with_status_85(tiny):
    process = start_ranks(1, PRETRAIN, *tiny, "--train_steps", "400")[0]
    while "step: 4/400" not in (line := process.stdout.readline()):
        assert line, "ended too early"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == SAVED_AND_UNFINISHED
