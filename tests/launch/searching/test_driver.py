"""Searches with a stand-in for training: workers that are killed, rungs, repeats, failures, and what a second start may change."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.searching.search import Search
from launch.searching.settings import read_search_settings
from tests.launch.searching.searches import GRID, TOKENS_OF_A_STEP, runs, search, start, tiny_settings, words
from tests.ranks import REPOSITORY


def report(folder: Path) -> str:
    return (folder / "report.html").read_text().replace(str(folder), "FOLDER")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Folder of a grid search by one worker that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "search"
    status, printed = search(words(folder))
    assert status == 0 and "14 of 14 trials done" in printed, printed
    return folder


def children_of(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in found.read_text().split()] if found.exists() else []


def search_with_kills(folder: Path, kills: int, seed: int) -> None:
    """Search with three workers; a worker or one of its runs is killed at random, and another worker begins."""
    chance, arguments = random.Random(seed), words(folder)
    workers = [start(arguments) for _ in range(3)]
    try:
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 0.8))
            index = chance.randrange(3)
            children = children_of(workers[index])
            if children and chance.random() < 0.4:
                os.kill(chance.choice(children), signal.SIGKILL)
            else:
                workers[index].kill()
                workers[index].communicate()
                workers[index] = start(arguments)
        printed = [worker.communicate(timeout=300)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0, 0], "\n".join(printed)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def assert_same_search(folder: Path, other: Path) -> None:
    found = runs(words(folder))
    assert [run.trial.values for run in found] == [run.trial.values for run in runs(words(other))]
    for run in found:
        assert run.record.state == "finished"
        assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 13))
    assert report(folder) == report(other)


def test_12_kills_of_three_workers_give_the_undisturbed_search(undisturbed, tmp_path):
    search_with_kills(tmp_path / "search", 12, seed=1)
    assert_same_search(tmp_path / "search", undisturbed)


@pytest.mark.slow
def test_100_kills_of_three_workers_give_the_undisturbed_search(undisturbed, tmp_path):
    """A killed search is nearly done after some 20 kills, so the kills are shared by several."""
    for number in range(5):
        search_with_kills(tmp_path / f"search-{number}", 20, seed=10 + number)
        assert_same_search(tmp_path / f"search-{number}", undisturbed)


def test_random_search_is_the_same_with_one_and_four_workers(tmp_path):
    space = ("optimizer.learning_rate log 1e-4 1e-1", "batch.global_batch_size 16 32")
    values = []
    for workers in (1, 4):
        arguments = words(tmp_path / str(workers), space, method="random", trials=6, workers=workers)
        assert search(arguments)[0] == 0
        values.append([(run.trial.values, run.record.metrics[0]["loss/validation"]) for run in runs(arguments)])
    assert values[0] == values[1] and len(values[0]) == 6


def test_more_trials_continue_a_search_and_another_space_is_refused(tmp_path):
    space = ("optimizer.learning_rate log 1e-4 1e-1",)
    assert "2 of 2 trials done" in search(words(tmp_path / "s", space, method="random", trials=2))[1]
    status, printed = search(words(tmp_path / "s", space, method="random", trials=4, workers=2))
    assert status == 0 and "2 of 4 trials done" in printed and "4 of 4 trials done" in printed
    status, printed = search(words(tmp_path / "s", ("optimizer.learning_rate log 1e-4 1e-2",), method="random", trials=4))
    assert status == 2 and "has another search" in printed and "1e-1'] in the search so far" in printed, printed
    status, printed = search(words(tmp_path / "s", space, method="random", trials=4, settings=["optimizer.momentum 0.9"]))
    assert status == 2 and "recipe, optimizer.momentum: 0.95 in the search so far, 0.9 now" in printed, printed


def test_asha_pauses_at_rungs_and_resumes_the_best(tmp_path):
    arguments = words(tmp_path / "s", GRID[:1], rungs__first_tokens=TOKENS_OF_A_STEP, rungs__factor=3, workers=2)
    status, printed = search(arguments)
    assert status == 0, printed
    found = runs(arguments)
    lengths = {run.trial.values["optimizer.learning_rate"]: run.newest_step for run in found}
    assert sorted(lengths.values()) == [1, 1, 1, 1, 1, 3, 3] or sorted(lengths.values()) == [1, 1, 1, 1, 3, 3, 3], lengths
    assert lengths["0.01"] == 3  # the best rate
    assert all(not run.record.has_work and len(run.record.metrics) == run.record.target + 1 for run in found)


def test_the_score_of_a_trial_is_the_mean_of_its_repeats(tmp_path):
    arguments = words(tmp_path / "s", ("optimizer.learning_rate 1e-3 1e-2",), repeat=3, workers=2, settings=["seed 5"])
    assert search(arguments)[0] == 0
    one = Search(read_search_settings(arguments))
    for trial in one.trials:
        assert [run.seed for run in trial.runs] == [5, 6, 7]
        losses = [run.record.metrics[0]["loss/validation"] for run in trial.runs]
        assert len(set(losses)) == 3 and one.scores(trial) == [pytest.approx(sum(losses) / 3)]


def test_another_objective_ranks_the_same_runs_anew(undisturbed, tmp_path):
    """A name that no run writes is refused, and nothing is lost."""
    folder = shutil.copytree(undisturbed, tmp_path / "s")
    status, printed = search(words(folder, objective="accuracy/validation", maximize="true"))
    assert status == 0 and "best: 1.0000 (trial 8: optimizer.learning_rate 0.01, optimizer.weight_decay 0)" in printed, printed
    status, printed = search(words(folder, objective="loss/validatoin"))
    assert status == 2 and 'Did you mean "loss/validation"? They write: accuracy/validation, loss/validation' in printed, printed
    assert search(words(folder))[0] == 0
    assert_same_search(folder, undisturbed)


def test_diverged_and_failed_trials_are_reported_and_the_others_go_on(tmp_path):
    arguments = words(tmp_path / "s", ("optimizer.learning_rate 1e-2 2 0.5 1e-3",))
    status, printed = search(arguments)
    assert status == 1, printed
    assert "Trial 2 failed: RuntimeError: a rate of 0.5 crashes Its output:" in printed
    assert [(run.record.state, run.record.failures) for run in runs(arguments)] == [
        ("finished", 0),
        ("diverged", 0),
        ("failed", 5),
        ("finished", 0),
    ]
    assert "gradient was not finite" in report(tmp_path / "s")


def test_a_signal_saves_the_runs_and_the_same_command_continues(tmp_path):
    arguments = words(tmp_path / "s", settings=["train_steps 300"])
    process = start(arguments)
    while not list((tmp_path / "s").glob("trials/0000/seed_1/checkpoints/*")):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 85 and "The same command continues the search." in printed, printed
    (run,) = runs(arguments)
    saved = run.newest_step
    assert 0 < saved < 300 and run.record.has_work and run.record.failures == 0
    process = start(arguments)
    while run.newest_step == saved:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted." in printed, printed


MISTAKES = {
    "a setting that does not exist": ({}, ("optimizer.learning_rat 1 2",), 'Did you mean "optimizer.learning_rate"?'),
    "a value that is invalid": ({}, ("optimizer.learning_rate 1e-3 -1",), "A trial with optimizer.learning_rate -1 is invalid:"),
    "one point": ({}, ("optimizer.learning_rate 1e-3",), "one point is not a space"),
    "no space": ({}, (), "Give preset, or space"),
    "a setting twice": ({}, ("seedless 1 2", "seedless 1 2"), "space has seedless twice"),
    "a range in a grid": ({}, ("optimizer.learning_rate log 1e-3 1e-1",), 'Add their number: "optimizer.learning_rate log 1e-3 1e-1 5"'),
    "a rung above the length": ({"rungs__first_tokens": 1e9}, GRID, "must be below the length of a run, which is 98,304 tokens"),
    "a rung in a decay": (
        {"rungs__first_tokens": 1e4, "settings": ["schedule.kind linear"]},
        GRID,
        "with schedule.kind linear",
    ),
    "a factor without rungs": ({"rungs__factor": 4}, GRID, "rungs.factor 4 (command line) has no effect without rungs.first_tokens"),
    "repeats with rungs": ({"rungs__first_tokens": 1e4, "repeat": 2}, GRID, "repeat 2 (command line) is not supported with"),
    "gp with rungs": (
        {"rungs__first_tokens": 1e4, "method": "gp"},
        ("optimizer.learning_rate log 1e-3 1e-1",),
        "method gp (command line) is not supported with rungs",
    ),
    "a quote that does not end": (
        {"settings": ["log.sample_prompt 'def"]},
        GRID,
        'settings "log.sample_prompt \'def": no closing quotation.',
    ),
    "a setting of the search": (
        {"settings": ["output runs/x"]},
        GRID,
        "settings has output, which the search sets for each run (--output is",
    ),
    "an empty text": ({"settings": [""]}, GRID, "settings has an empty text."),
    "a launcher with a quote": ({"launcher": "deepspeed '"}, GRID, 'launcher "deepspeed \'": no closing quotation.'),
    "an empty space": ({}, ("",), 'space "": the text is empty.'),
    "an option that does not exist": ({"settings": ["trainsteps 12"]}, GRID, 'Did you mean "train_steps"?'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence_before_anything_is_written(mistake, tmp_path, capsys):
    chosen, space, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        Search(read_search_settings(words(tmp_path / "s", space, **chosen)))
    assert message in str(error.value)
    assert not (tmp_path / "s").exists()


def test_an_objective_that_no_run_writes_is_refused_by_the_first_run(tmp_path):
    """It is refused when the run validates for the first time, which here is at its end."""
    status, printed = search(words(tmp_path / "s", objective="loss/test"))
    assert status == 2 and "objective loss/test (command line) is not a curve of these runs." in printed, printed
    assert len(list(tmp_path.glob("s/trials/*"))) == 1


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    status, printed = search(words(tmp_path / "s"))
    assert (
        status == 2 and "is not the folder of a search" in printed and [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]
    )


@pytest.mark.slow
def test_runs_start_under_the_launcher_in_the_layout_that_is_given(prepared, tmp_path):
    arguments = ["--space", "optimizer.learning_rate log 1e-3 1e-2", "--trials", "1", "--output", str(tmp_path / "s")]
    arguments += ["--launcher", "deepspeed --num_accelerators 2 --master_port {port}", "--settings", *tiny_settings(prepared)]
    status, printed = search([*arguments, f"deepspeed {REPOSITORY}/ds_configs/zero2.json", "tensor_parallel_size 2"])
    assert status == 0 and "1 of 1 trials done" in printed, printed
    assert "2 ranks" in (tmp_path / "s" / "trials" / "0000" / "seed_1.out").read_text().replace("rank(s)", "ranks")
