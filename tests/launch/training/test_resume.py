"""A stopped and resumed run equals one that never stopped, bit for bit; no crash loses a published checkpoint."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.sampling.samples import IGNORED
from launch.checkpoints import checkpoint
from launch.checkpoints.opening import AveragedState
from launch.evaluation import evaluating
from launch.evaluation.settings import EvaluateSettings
from launch.ranks.stopping import SAVED_AND_UNFINISHED
from launch.training.data import open_data
from launch.training.recipe import read_run_settings
from model.transformer import Transformer
from tests.ranks import ForkedRank, finish, start_ranks

SCRIPT = Path(__file__).parents[1] / "pretrain_with_faults.py"
CURVES = (
    "loss/train",
    "optimization/gradient_norm",
    "optimization/learning_rate",
    "loss/validation",
    "noise/scale_tokens",
    "noise/variance",
)

SILENT_RANK_IN_SEVERAL_TRANSFERS = """
import os, threading
from datetime import timedelta
import torch, torch.distributed as dist
from launch.ranks.collectives import describe_lost_ranks
store, groups = dist.HashStore(), {}
def join(rank): groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=0.5))
threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for work in [groups[0].allreduce([torch.ones(1)]) for _ in range(5)]:
    try: work.wait()
    except RuntimeError as error: print(error, "->", describe_lost_ranks(error, 0.5), flush=True)
os._exit(0)
"""


def run(world_size: int, arguments: list[str], **environment: str) -> str:
    return "\n---\n".join(finish(start_ranks(world_size, SCRIPT, *arguments, OMP_NUM_THREADS="1", **environment)))


def statuses(world_size: int, arguments: list[str], **environment: str) -> list[int]:
    """Run until every rank has ended and return each rank's status."""
    return [status for status, _ in endings(start_ranks(world_size, SCRIPT, *arguments, OMP_NUM_THREADS="1", **environment))]


def endings(processes: list[ForkedRank]) -> list[tuple[int, str]]:
    """Return each rank's status and output; ranks that still wait for a dead one are killed, as a launcher would."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def listens_to(signal_number: int, process: ForkedRank) -> bool:
    """True if a process has a handler for a signal, see proc_pid_status(5)."""
    caught = re.search(r"^SigCgt:\t(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.M)
    return bool(caught and int(caught[1], 16) >> (signal_number - 1) & 1)


def curves(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name in set(CURVES) & set(entry):
            assert entry["step"] not in found[name], f"{name} of step {entry['step']} is there twice"
            found[name][entry["step"]] = entry[name]
    return found


def entries(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


def board_curve(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/train")]


def assert_same_run(one: Path, other: Path) -> None:
    assert curves(one) == curves(other)
    assert board_curve(one) == board_curve(other)
    ours, theirs = (AveragedState(checkpoint.published(folder / "checkpoints")[:1]) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


CASES = [
    (1, ["--deepspeed", "ds_configs/zero1.json", "--log.noise_scale", "true"]),
    (2, ["--deepspeed", "ds_configs/zero2.json", "--precision", "float32", "--model.dropout", "0.1"]),
    (2, ["--deepspeed", "ds_configs/zero3.json", "--model.tie_embeddings", "false"]),
]


@pytest.mark.parametrize(("world_size", "choice"), CASES)
def test_killed_run_resumes_with_the_numbers_of_a_run_that_never_stopped(world_size, choice, tiny, tmp_path):
    arguments = [*tiny, *choice]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(world_size, [*arguments, "--output", str(whole)])
    assert any(status == -signal.SIGKILL for status in statuses(world_size, [*arguments, "--output", str(stopped)], FAULT="0:step:7"))
    assert "Resuming from step 4 of 12" in run(world_size, [*arguments, "--output", str(stopped)])
    assert_same_run(whole, stopped)


def test_sigterm_to_one_rank_stops_and_saves_all_after_the_same_step(tiny, tmp_path):
    arguments = [*tiny, "--deepspeed", "ds_configs/zero1.json"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(2, [*arguments, "--output", str(whole)])
    assert statuses(2, [*arguments, "--output", str(stopped)], FAULT_TERMINATE="1:6") == [SAVED_AND_UNFINISHED] * 2
    assert checkpoint.step_of(checkpoint.published(stopped / "checkpoints")[0]) == 8  # asked during step 7, all ranks know in step 8
    run(2, [*arguments, "--output", str(stopped), "--resume"])
    assert_same_run(whole, stopped)


def test_paused_runs_have_the_weights_of_a_run_that_never_stopped(tiny, tmp_path):
    """The pauses are between the steps of checkpoints, in a run whose batch grows."""
    arguments = [*tiny, "--batch.ramp", "0:4 300:8", "--log.validation_interval", "0"]
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    run(1, [*arguments, "--output", str(whole)])
    tokens_of_step = dict(entries(whole, "progress/tokens"))
    for step, pause in ((3, tokens_of_step[3]), (3, tokens_of_step[2] + 1), (6, tokens_of_step[6])):
        ((status, output),) = endings(start_ranks(1, SCRIPT, *arguments, "--output", str(paused), "--pause_tokens", str(pause)))
        assert status == SAVED_AND_UNFINISHED and f"this start ends after step {step} (pause_tokens {pause}" in output, output
        assert checkpoint.step_of(checkpoint.published(paused / "checkpoints")[0]) == step
    assert [step for step, _ in entries(paused, "loss/validation")] == [3, 6]
    run(1, [*arguments, "--output", str(paused)])
    assert entries(paused, "loss/train") == entries(whole, "loss/train")
    ours, theirs = (AveragedState(checkpoint.published(folder / "checkpoints")[:1]) for folder in (paused, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_signal_during_start_up_stops_the_run_after_its_first_step(tiny, tmp_path):
    ranks = start_ranks(2, SCRIPT, *tiny, OMP_NUM_THREADS="1")
    while not listens_to(signal.SIGUSR1, ranks[1]):
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGUSR1)
    assert [status for status, _ in endings(ranks)] == [SAVED_AND_UNFINISHED] * 2
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(tmp_path / "run" / "checkpoints")] == [1]


def test_second_sigint_ends_the_process_at_once(tiny):
    (rank,) = start_ranks(1, SCRIPT, *tiny)
    for _ in range(2):
        while rank.poll() is None and not listens_to(signal.SIGUSR1, rank):
            time.sleep(0.01)
        rank.send_signal(signal.SIGINT)
        while rank.poll() is None and listens_to(signal.SIGINT, rank):
            time.sleep(0.01)
    assert endings([rank])[0][0] == -signal.SIGINT


def test_rank_that_loses_the_others_names_the_newest_checkpoint(tiny):
    (status, output), (killed, _) = endings(start_ranks(2, SCRIPT, *tiny, OMP_NUM_THREADS="1", FAULT="1:step:7"))
    assert (status, killed) == (1, -signal.SIGKILL)
    assert re.search(
        r"^Rank 0 on .* lost the other ranks in step 8: .*Connection .*\. The newest checkpoint is step_00000004; ", output, re.M
    ), output
    assert "Traceback" not in output


@pytest.mark.parametrize("engine", ["zero1", "zero3", "pipeline_zero1"])
def test_silent_rank_ends_the_run_after_communication_timeout(engine, tiny, tmp_path):
    """The timeout also holds in groups that DeepSpeed makes."""
    arguments = [*tiny, "--deepspeed", f"ds_configs/{engine}.json", "--train_steps", "100000", "--communication_timeout", "3"]
    ranks = start_ranks(2, SCRIPT, *arguments, OMP_NUM_THREADS="1")
    while ranks[0].poll() is None and not checkpoint.published(tmp_path / "run" / "checkpoints"):
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    output = ranks[0].communicate(timeout=60)[0]
    ranks[1].kill()
    endings(ranks[1:])
    assert ranks[0].returncode == 1
    assert re.search(
        r"^Rank 0 on .* in step \d+: no answer for 3 s \(--communication_timeout\)\. The newest checkpoint is step_", output, re.M
    ), output


def test_every_concurrent_transfer_reports_a_silent_rank():
    """Gloo ends the other transfers with another text than the first that timed out, and that text does not name gloo."""
    command = [sys.executable, "-c", SILENT_RANK_IN_SEVERAL_TRANSFERS]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, env=os.environ | {"RANK": "0"}).stdout.splitlines()
    assert len(output) == 5
    assert any(line.startswith("Application timeout caused pair closure") for line in output), output
    assert all(line.endswith("during start-up: no answer for 0.5 s (--communication_timeout).") for line in output), output


def test_run_whose_gradients_stay_not_finite_ends_with_status_93(tiny):
    arguments = [*tiny, "--precision", "float32", "--optimizer.learning_rate", "1e30", "--train_steps", "80", "--log.sample_interval", "0"]
    ((status, output),) = endings(start_ranks(1, SCRIPT, *arguments, OMP_NUM_THREADS="1"))
    assert status == 93, output
    assert output.splitlines()[-1].startswith("The gradient was not finite in 50 steps in a row")


@pytest.mark.parametrize(
    ("engine", "ruin", "message"),
    [
        ("zero1", "1:8:exp_avg:nan", r"The checkpoint of step 8 .*: \d\.\S+ \(exp_avg\) .* not finite in float32 on rank 1\."),
        ("zero3", "0:8:weight:inf", r"The checkpoint of step 8 .*: \d\.\S+ \(weight\) .* not finite in bfloat16 on rank 0\."),
        ("pipeline_zero1", "1:8:weight:3.4e38", r"The checkpoint of step 8 .*: \d\.\S+ \(weight\) .* not finite in bfloat16 on rank 1\."),
        (
            "zero2",
            "1:4:weight:3e38",
            r"The validation loss of prepared is (nan|inf) after step 6; no checkpoint ",
        ),  # finite when step 4 is saved
    ],
)
def test_model_that_is_not_finite_is_never_published_as_a_checkpoint(engine, ruin, message, tiny, tmp_path):
    arguments = [*tiny, "--deepspeed", f"ds_configs/{engine}.json"]
    ended = endings(start_ranks(2, SCRIPT, *arguments, OMP_NUM_THREADS="1", RUIN=ruin))
    assert [status for status, _ in ended] == [93, 93], ended
    lines = [output.splitlines()[-1] for _, output in ended] + [(tmp_path / "run" / "log.txt").read_text().splitlines()[-1]]
    assert all(re.search(f"{message}.*The newest checkpoint is step_00000004;", line) for line in lines), lines
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_00000004"]


@pytest.fixture
def own_data(tiny, prepared, tmp_path):
    """The arguments of the tiny run on a copy of the data, which may be damaged, and the first training shard of the copy."""
    copy = shutil.copytree(prepared, tmp_path / "data")
    return [str(copy) if word == str(prepared) else word for word in tiny], copy / "train" / "00000.bin"


def test_shard_with_other_tokens_stops_the_run_before_its_next_checkpoint(own_data, tmp_path):
    arguments, shard = own_data
    overwrite = f"dd if=/dev/zero of={shard} bs=64 count=1 conv=notrunc status=none"  # token 0 is valid
    ranks = start_ranks(2, SCRIPT, *arguments, OMP_NUM_THREADS="1", COMMANDS=f"1:touch {shard};5:{overwrite}")
    (first, output), (other, quiet) = endings(ranks)
    assert (first, other) == (2, 2), output
    message = rf"{shard} was changed while it was read: .*newest checkpoint is step_00000004; .* checkpoint of step 8 was not written\."
    assert re.search(message, output.splitlines()[-1]), output
    assert re.search(message, (tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert "was changed" not in quiet
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(tmp_path / "run" / "checkpoints")] == [4]


def test_shard_that_is_truncated_under_a_run_is_named(own_data):
    """A memory map would end the rank with SIGBUS."""
    arguments, shard = own_data
    ((status, output),) = endings(start_ranks(1, SCRIPT, *arguments, OMP_NUM_THREADS="1", COMMANDS=f"5:truncate --size 64 {shard}"))
    assert status == 2, output
    assert re.match(
        rf"Rank 0 on \S+: {shard} was truncated while it was read: it is 64 bytes long; .* The newest checkpoint is step_00000004;",
        output.splitlines()[-1],
    ), output


def test_run_whose_folder_is_removed_saves_what_a_resume_needs(tiny, tmp_path):
    folder = tmp_path / "run"
    ((status, output),) = endings(start_ranks(1, SCRIPT, *tiny, OMP_NUM_THREADS="1", COMMANDS=f"5:rm -r {folder}"))
    assert status == SAVED_AND_UNFINISHED, output
    assert f"output {folder} was removed or renamed" in output.splitlines()[-1]
    assert "was removed or renamed" in (folder / "log.txt").read_text()
    assert [checkpoint.step_of(one) for one in checkpoint.published(folder / "checkpoints")] == [8]
    more = start_ranks(1, SCRIPT, *tiny, "--resume", OMP_NUM_THREADS="1", COMMANDS=f"11:rm -r {folder}")
    ((status, output),) = endings(more)  # a run that saves its last step is finished
    assert status == 0 and "Resuming from step 8 of 12" in output and "was removed or renamed" in output, output
    assert [checkpoint.step_of(one) for one in checkpoint.published(folder / "checkpoints")] == [12]


# A checkpoint of this run is 13 writes on rank 0 and 55 on rank 1.
@pytest.mark.parametrize(("fault", "last_whole"), [("1:write:80", 4), ("0:write:20", 4), ("0:publish:1", 4)])
def test_crash_during_the_second_checkpoint_keeps_the_first(fault, last_whole, tiny, tmp_path):
    arguments = [*tiny, "--deepspeed", "ds_configs/zero2.json"]
    root = tmp_path / "run" / "checkpoints"
    assert any(status == -signal.SIGKILL for status in statuses(2, arguments, FAULT=fault))
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(root)] == [last_whole]
    assert checkpoint.find_damage(checkpoint.published(root)[0]) is None
    run(2, [*arguments, "--resume"])
    assert checkpoint.step_of(checkpoint.published(root)[0]) == 12


def test_full_disk_on_one_rank_costs_one_checkpoint_not_the_run(tiny, tmp_path):
    output = run(2, [*tiny, "--deepspeed", "ds_configs/zero2.json"], FULL_DISK="1:100")
    root = tmp_path / "run" / "checkpoints"
    assert "The checkpoint of step 8 could not be written: OSError: [Errno 28] No space left on device" in output
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(root)] == [12, 4]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000004", "step_00000012"]


def test_run_resumes_in_other_layouts_with_its_own_curves(tiny, tmp_path):
    """ZeRO-3 on two ranks, then a pipeline, then one rank: losses, norms and validation of a run in one layout."""
    arguments = [*tiny, "--precision", "float32", "--model.dropout", "0.1", "--log.validation_samples", "0"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(1, [*arguments, "--deepspeed", "ds_configs/zero1.json", "--output", str(whole)])
    kill_at = {"FAULT": "0:step:5"}
    statuses(2, [*arguments, "--deepspeed", "ds_configs/zero3.json", "--output", str(moved)], **kill_at)
    statuses(2, [*arguments, "--deepspeed", "ds_configs/pipeline_zero1.json", "--output", str(moved), "--resume"], **kill_at)
    output = run(1, [*arguments, "--deepspeed", "ds_configs/zero2.json", "--output", str(moved), "--resume"])
    assert "Resuming from step 8 of 12, read in " in output
    assert "converted from 2 rank(s): 2 pipeline stages under ZeRO-1 in float32 to 1 rank(s) under ZeRO-2 in float32" in output
    expected, found = curves(whole), curves(moved)
    for name in CURVES:
        assert expected[name].keys() == found[name].keys()
        for step, value in expected[name].items():
            assert found[name][step] == pytest.approx(value, rel=1e-5), (name, step)
    evaluation = evaluating.evaluate(EvaluateSettings(str(moved)), show_progress=False)
    assert evaluation.loss == pytest.approx(found["loss/validation"][12], rel=1e-5)


def train_plainly(arguments: list[str], sizes: list[int], rates: list[float] | None = None) -> tuple[list[float], Transformer]:
    """Train in this process, with torch alone, on the next samples of the run's order. Return the losses and the model.

    `rates` are those of the steps (default: the peak in all of them).
    """
    settings = read_run_settings(arguments)
    sampling = open_data(settings).sampling
    model = Transformer(settings.model, settings.seed).train()
    groups = [[weight for weight in model.parameters() if (weight.dim() > 1) == is_matrix] for is_matrix in (True, False)]
    decays = (settings.optimizer.weight_decay, 0.0)
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)],
        settings.optimizer.learning_rate,
        (settings.optimizer.beta1, settings.optimizer.beta2),
        settings.optimizer.epsilon,
    )
    losses, position = [], 0
    for size, rate in zip(sizes, rates or [settings.optimizer.learning_rate] * len(sizes), strict=True):
        drawn = zip(*(column.tolist() for column in sampling.blend.draw(np.arange(position, position + size))), strict=True)
        samples = [sampling.samples[source].sample(sample, epoch) for source, epoch, sample in drawn]
        tokens, segments, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*(sample[:3] for sample in samples), strict=True))
        loss = torch.nn.functional.cross_entropy(model(tokens, segments).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
        position += size
    return losses, model


def test_another_batch_size_reads_the_next_samples_as_one_plain_process(tiny, tmp_path, capsys):
    """Four steps of 8 samples on one rank, then four of 16 on two: no sample is read twice or left out."""
    arguments = [*tiny, "--precision", "float32", "--schedule.kind", "constant", "--schedule.warmup_steps", "0", "--train_steps", "4"]
    changed = ["--train_steps", "8", "--batch.global_batch_size", "16", "--allow_changes"]
    run(1, arguments)
    output = run(2, [*arguments, *changed])
    assert (
        "From step 5 on a step reads 16 samples in place of 8, the first of them at position 32: none is read twice or left out." in output
    )
    assert "; steps 1 to 4 read 8\n" in output, "the plan"
    losses, model = train_plainly(arguments, [8] * 4 + [16] * 4)
    found = curves(tmp_path / "run")["loss/train"]
    assert [found[step] for step in range(1, 9)] == pytest.approx(losses, abs=1e-5)
    newest = checkpoint.published(tmp_path / "run" / "checkpoints")[0]
    for name, weight in AveragedState([newest]).items():
        assert torch.allclose(weight, model.get_parameter(name).detach(), rtol=0, atol=1e-5), name
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(entry.get("progress/tokens", 0) for entry in entries) == (4 * 8 + 4 * 16) * 32
    segments = [{"first_step": 0, "first_position": 0, "size": 8}, {"first_step": 4, "first_position": 32, "size": 16}]
    assert checkpoint.read_manifest(newest)["batch_plan"] == segments
    assert json.loads((tmp_path / "run" / "run.json").read_text())["batch_plan"] == segments


def test_checkpoint_that_is_read_wrongly_is_not_trained_on(tiny):
    arguments = [*tiny, "--deepspeed", "ds_configs/zero2.json"]
    statuses(2, arguments, FAULT="0:step:5")
    processes = start_ranks(2, SCRIPT, *arguments, OMP_NUM_THREADS="1", MISREAD="1")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode not in (0, 2, SAVED_AND_UNFINISHED) for process in processes)
    assert all("1.attention.query.weight" in output and "have other checksums than were saved" in output for output in outputs)
