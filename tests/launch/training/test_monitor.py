"""Log and curves of a run: every number is written once, also after a crash or on a full disk."""

import json
import math
import re
import shutil
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data.sampling.batch_plan import BatchPlan, BatchSettings
from launch.evaluation.score import perplexity
from launch.training.monitor import Monitor


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    """Return the points that TensorBoard shows: tag -> (step, value)."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_the_next_second() -> None:
    """TensorBoard reads a run's files in the order of the second in their names."""
    time.sleep(1.01 - time.time() % 1)


def start(folder, first_step: int, last_step: int, value: float) -> Monitor:
    """Return a monitor, not closed, that has written steps up to `last_step`, each with a loss of `value`."""
    monitor = Monitor(folder, first_step, BatchPlan(BatchSettings(4), 1, 10))
    for step in range(first_step + 1, last_step + 1):
        monitor.step(step, {"loss/train": value, "optimization/learning_rate": value / 100}, seconds=1.0)
    monitor.flush()
    return monitor


def test_every_number_is_in_tensorboard_and_in_metrics_jsonl(tmp_path):
    monitor = start(tmp_path, 0, 2, 3.0)
    monitor.scalars(2, {"loss/validation": 2.5, "optimization/loss_scale": 8.0})
    monitor.text("samples", "def f():\n    <b>1</b>", 2)
    monitor.hyperparameters({"model.hidden_size": 64, "size": None}, {"loss/validation": 0.0})
    monitor.close()
    found = curves(tmp_path / "tb")
    assert found["loss/train"] == [(1, 3.0), (2, 3.0)]
    assert found["optimization/learning_rate"] == [(1, pytest.approx(0.03)), (2, pytest.approx(0.03))]
    assert found["loss/validation"] == [(2, 2.5)]
    assert metrics(tmp_path) == [
        {"step": 1, "loss/train": 3.0, "optimization/learning_rate": 0.03},
        {"step": 2, "loss/train": 3.0, "optimization/learning_rate": 0.03},
        {"step": 2, "loss/validation": 2.5, "optimization/loss_scale": 8.0},
    ]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    def f():\n        <b>1</b>", "indented, so that TensorBoard shows it unchanged"
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= events.PluginTagToContent("hparams").keys()


def test_tags_of_deepspeeds_own_monitor_are_written_over_samples(tmp_path):
    monitor = start(tmp_path, 0, 2, 3.0)
    monitor.scalars(2, {"optimization/loss_scale": 8.0})
    monitor.close()
    assert curves(tmp_path / "tb" / "by_samples") == {
        "Train/Samples/train_loss": [(4, 3.0), (8, 3.0)],
        "Train/Samples/lr": [(4, pytest.approx(0.03)), (8, pytest.approx(0.03))],
        "Train/Samples/loss_scale": [(8, 8.0)],
    }


@pytest.mark.parametrize("saved", [0, 4])
def test_resumed_run_has_every_step_once(saved, tmp_path):
    killed = start(tmp_path, 0, 6, 3.0)
    wait_for_the_next_second()
    start(tmp_path, saved, 8, 2.0).close()
    expected = [(step, 3.0 if step <= saved else 2.0) for step in range(1, 9)]
    assert curves(tmp_path / "tb")["loss/train"] == expected
    assert curves(tmp_path / "tb" / "by_samples")["Train/Samples/train_loss"] == [(4 * step, value) for step, value in expected]
    assert [(line["step"], line["loss/train"]) for line in metrics(tmp_path)] == expected
    killed.close()


def test_later_steps_of_an_earlier_start_are_removed(tmp_path):
    killed = start(tmp_path, 0, 9, 3.0)
    wait_for_the_next_second()
    start(tmp_path, 4, 5, 2.0).close()
    assert [step for step, _ in curves(tmp_path / "tb")["loss/train"]] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    killed.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "loss/tr', "{", '{"loss/train": 1.0}', "3", "\0\0\0\0", "\ud800"])
def test_incomplete_line_is_removed_and_the_others_stay(torn, tmp_path):
    whole = '{"step": 2, "loss/train": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes((whole + torn).encode(errors="surrogatepass"))
    start(tmp_path, 2, 3, 2.0).close()
    assert [(line["step"], line["loss/train"]) for line in metrics(tmp_path)] == [(2, 3.0), (3, 2.0)]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "log.txt", "tb"}


@pytest.mark.parametrize(("use", "mfu"), [(0.4567, " | MFU: 45.7 %"), (None, "")])
def test_console_line_shows_progress_and_speed(use, mfu, tmp_path, capsys):
    monitor = start(tmp_path, 0, 2, 3.0)
    monitor.console(2, loss=2.34567, learning_rate=3e-4, gradient_norm=0.12345, tokens_per_second=12345.6, use=use)
    monitor.close()
    line = f"step: 2/10 | loss: 2.3457 | learning rate: 3.00e-04 | gradient norm: 0.123 | tokens/s: 12,346{mfu} | left: 0:08"
    assert capsys.readouterr().out == line + "\n"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d " + re.escape(line) + "\n", (tmp_path / "log.txt").read_text())


@pytest.mark.parametrize(("seconds", "left"), [(0.05, "0:00"), (7.4999, "1:00"), (450, "1:00:00"), (100_000, "222:13:20")])
def test_time_left_is_formatted_as_a_clock(seconds, left, tmp_path, capsys):
    monitor = Monitor(tmp_path, 0, BatchPlan(BatchSettings(1), 1, 10))
    monitor.step(2, {}, seconds)
    monitor.console(2, 1.0, 1.0, 1.0, 1.0, 1.0)
    monitor.close()
    assert capsys.readouterr().out.endswith(f"left: {left}\n")


def test_full_disk_stops_the_files_with_one_message_not_the_console(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    monitor = Monitor(tmp_path, 0, BatchPlan(BatchSettings(1), 1, 10))
    monitor.log("first")
    monitor.step(1, {"loss/train": 1.0}, 1.0)
    monitor.log("second")
    monitor.close()
    shown = capsys.readouterr()
    assert shown.out == "first\nsecond\n"
    assert shown.err == "The run's curves and log can no longer be written (No space left on device). Training continues.\n"


@pytest.mark.parametrize("operation", ["add_scalar", "add_text", "flush", "close"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("gone")])
def test_failing_tensorboard_operation_does_not_end_training(operation, error, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(SummaryWriter, operation, fail)
    monitor = start(tmp_path, 0, 2, 3.0)
    monitor.text("samples", "x", 2)
    monitor.console(2, 1.0, 1.0, 1.0, 1.0, 1.0)
    monitor.flush()
    monitor.close()
    shown = capsys.readouterr()
    assert shown.out.startswith("step: 2/10 | ")
    assert shown.err == f"The run's curves and log can no longer be written ({error.strerror or error}). Training continues.\n"


def test_perplexity_of_a_diverged_loss_is_infinite():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(4)) == pytest.approx(4)
    assert perplexity(1e6) == math.inf


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_removed_run_folder_gives_one_message_and_no_traceback(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    monitor = start(tmp_path / "run", 0, 1, 3.0)
    shutil.rmtree(tmp_path / "run")
    monitor.step(2, {"loss/train": 3.0, "optimization/learning_rate": 0.1}, seconds=1.0)
    monitor.flush()
    monitor.close()
    printed = capfd.readouterr().err
    assert printed == "The run's curves and log can no longer be written (No such file or directory). Training continues.\n"
