"""The report of a search on folders made by hand: no run is trained."""

import html
import itertools
import json
import math
import re
import shlex
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from launch.searching import pictures
from launch.searching.pictures import scale_of
from launch.searching.report import best_command, collect, write_hparams, write_report
from launch.searching.search import Search
from launch.searching.settings import RungSettings, SearchSettings
from launch.searching.space import read_dimension
from launch.searching.trials import Record
from launch.training.recipe import read_run_settings

RECIPE = """
model: {vocab_size: 64, sequence_length: 16, hidden_size: 16, num_layers: 1, num_attention_heads: 2, intermediate_size: 32}
batch: {global_batch_size: 4}
schedule: {kind: wsd, warmup_steps: 2}
train_steps: 100
"""
TOKENS = 100 * 4 * 16
RATE = "optimizer.learning_rate log 1e-4 1e-2"
NAME = "optimizer.name adamw muon"


@pytest.fixture
def new_search(tmp_path):
    """Function that creates a search in a new folder."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def create(folder="search", space=(RATE,), **settings):
        return Search(SearchSettings(str(tmp_path / folder), space=space, recipe=str(tmp_path / "recipe.yaml"), **settings))

    return create


def metrics(search, score, rung=-1):
    return {"step": 1, search.settings.objective: score, "progress/tokens": search.rungs[rung]}


def add_values(search, number, rate="1e-3", **values):
    trial = search.trials.create(number)
    trial.write({"optimizer.learning_rate": rate} | {name.replace("__", "."): value for name, value in values.items()})
    return trial


def add_run(search, run, record, curve=()):
    """Write a record, and a curve as pairs of share of the tokens and value."""
    run.folder.mkdir()
    lines = [
        {"step": step, "loss/train": 1.0, search.settings.objective: value, "progress/tokens": share * search.tokens}
        for step, (share, value) in enumerate(curve)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write(record)


def finished(search, *scores):
    return Record("finished", len(search.rungs) - 1, tuple(metrics(search, score, rung) for rung, score in enumerate(scores)), seconds=7.25)


def add(search, number, scores, rate="1e-3", **values):
    """Add a trial with a finished run for each seed."""
    for run, score in zip(add_values(search, number, rate, **values).runs, scores, strict=True):
        add_run(search, run, finished(search, score), [(0.5, score + 1), (1.0, score)])


def add_mixed(search):
    """Add a trial of each state to a search without rungs."""
    add(search, 0, [3.0], "2e-3")
    add(search, 1, [2.5], "3e-3")
    lost = Record("diverged", reason="first line\nThe loss is <b>not</b> & never was finite.\n")
    add_run(search, add_values(search, 2, "9e-3").runs[0], lost, [(0.1, 4.0), (0.2, 9.0), (0.3, None)])
    add_run(search, add_values(search, 3, "8e-3").runs[0], Record("failed", reason="RuntimeError: <out of memory>"))
    add_run(search, add_values(search, 4, "1e-4").runs[0], Record(), [(0.1, 5.0)])
    search.trials.create(5)  # its worker has not written the values yet


def page_of(search):
    return write_report(search).read_text(encoding="utf-8")


def rows_of(page):
    """The cells of each row of the tables, as a reader sees them."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def tiles_of(page):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_an_empty_search_has_a_report(new_search):
    page = page_of(new_search(trials=8))
    assert tiles_of(page) == {"trials": "0 of 8", "finished": "0", "open": "0", "diverged": "0", "failed": "0"}
    assert page.count("No trial has a score yet.") == 4
    assert "<img" not in page


def test_a_search_of_one_trial_has_all_pictures_but_the_importance(new_search):
    search = new_search(space=(RATE, NAME))
    add(search, 0, [3.25], optimizer__name="muon")
    page = page_of(search)
    assert "Trials with a score: 1. The importance of settings needs 4 or more." in page
    assert sorted(path.name for path in (search.folder / "pictures").iterdir()) == ["best.svg", "curves.svg", "parallel.svg", "slices.svg"]
    assert page.count("data:image/svg+xml;base64,") == 4
    assert sorted(path.name for path in search.folder.iterdir()) == ["pictures", "report.html", "search.json", "trials"]


def test_every_state_is_counted_and_every_trial_and_reason_is_shown(new_search):
    search = new_search(trials=9)
    add_mixed(search)
    page = page_of(search)
    assert tiles_of(page) | {"trials": "6 of 9", "finished": "2", "open": "2", "diverged": "1", "failed": "1"} == tiles_of(page)
    rows = rows_of(page)
    start = rows.index(["trial", "state", "optimizer.learning_rate", "loss/validation", "tokens"])
    assert rows[start + 1 : start + 7] == [
        ["1", "finished", "3e-3", "2.5000", "6,400"],
        ["0", "finished", "2e-3", "3.0000", "6,400"],
        ["4", "open", "1e-4", "", "0"],
        ["5", "open", "", "", "0"],
        ["2", "diverged", "9e-3", "", "1,920"],
        ["3", "failed", "8e-3", "", "0"],
    ]
    assert page.count("Diverged or failed: 2, 3.") == 4
    assert ["2", "diverged", "The loss is <b>not</b> & never was finite."] in rows
    assert ["3", "failed", "RuntimeError: <out of memory>"] in rows
    assert "<b>" not in page and "<out" not in page and "first line" not in page  # the text is escaped


def test_the_best_trial_has_the_best_mean_of_its_runs(new_search):
    search = new_search(repeat=3)
    add(search, 0, [3.0, 3.1, 3.2])
    add(search, 1, [2.0, 3.2, 3.5])
    add(search, 2, [2.9, 2.9, 4.0])
    result = collect(search)
    assert [one.number for one in result.ranked] == [1, 0, 2]
    page = page_of(search)
    assert "Trial 1 has the best loss/validation: 2.9000 (mean of 3 runs, 2.0000 to 3.5000), after 6,400 tokens of each run." in page
    assert "Trials whose score lies between its best and its worst run: 0, 2." in page
    assert ["0", "finished", "1e-3", "3.1000", "3.0000 to 3.2000", "19,200"] in rows_of(page)


def test_a_trial_with_one_diverged_run_of_three_is_not_ranked(new_search):
    search = new_search(repeat=3)
    first, second, third = add_values(search, 0).runs
    for run in (first, third):
        add_run(search, run, finished(search, 1.0))
    add_run(search, second, Record("diverged", reason="not finite"))
    add(search, 1, [3.0, 3.0, 3.0])
    result = collect(search)
    assert [one.number for one in result.ranked] == [1]
    assert result.lost[0].reason == "seed 2: not finite"


def test_a_finished_run_with_an_infinite_score_counts_as_diverged(new_search):
    search = new_search()
    add_run(search, add_values(search, 0).runs[0], finished(search, math.inf))
    assert (collect(search).trials[0].state, collect(search).ranked) == ("diverged", [])
    assert ["0", "diverged", "loss/validation of seed 1 is not finite."] in rows_of(page_of(search))


def test_a_higher_rung_ranks_before_a_better_score(new_search):
    search = new_search(rungs=RungSettings(first_tokens=1000, factor=2))
    assert search.rungs == [1000, 2000, 4000, TOKENS]
    trials = [add_values(search, number) for number in range(4)]
    for trial, scores, target in zip(trials, ([3.5], [6.0, 4.5], [6.5, 4.0], [1.0]), (0, 2, 1, 1), strict=True):
        reached = tuple(metrics(search, score, rung) for rung, score in enumerate(scores))
        add_run(
            search, trial.runs[0], Record("diverged" if trial.number == 3 else "open", target, reached), [(0.1, 6.0), (0.2, scores[-1])]
        )
    result = collect(search)
    assert [(one.state, one.rung, one.score) for one in result.trials] == [
        ("paused", 0, 3.5),
        ("open", 1, 4.5),
        ("paused", 1, 4.0),
        ("diverged", 0, None),
    ]
    assert [one.number for one in result.ranked] == [2, 1, 0]
    page = page_of(search)
    assert "No trial has finished. The best one has reached rung 2 of 4." in page
    assert tiles_of(page)["paused at a rung"] == "2"


def test_maximize_shows_the_metric_itself_and_prefers_the_largest(new_search):
    search = new_search(objective="accuracy", maximize=True)
    add(search, 0, [0.25])
    add(search, 1, [0.75])
    add_run(search, add_values(search, 2).runs[0], Record("diverged"))
    page = page_of(search)
    assert [one.number for one in collect(search).ranked] == [1, 0]
    assert tiles_of(page)["trial 1, accuracy"] == "0.7500"
    assert "-0." not in re.sub(r"base64,[^\"]*", "", page)


def test_the_command_of_the_best_trial_is_one_of_pretrain(new_search):
    search = new_search(settings=('log.sample_prompt "it is"',), launcher="deepspeed --master_port {port}", repeat=2)
    add(search, 0, [3.0, 3.0])
    add(search, 1, [2.0, 2.0], "5e-3")
    command = best_command(search, collect(search).ranked[0])
    assert f"<pre>{html.escape(command)}</pre>" in page_of(search)
    *launcher, script = shlex.split(command)[:4]
    assert (launcher, script) == (["deepspeed", "--master_port", "29500"], "launch/pretrain.py")
    run = read_run_settings(shlex.split(command)[4:])
    assert (run.optimizer.learning_rate, run.output, run.seed, run.log.sample_prompt) == (5e-3, "runs/best", 1, "it is")
    assert (run.pause_tokens, run.batch_plan.steps) == (None, 100)


def test_the_command_of_a_paused_trial_has_no_pause(new_search):
    search = new_search(rungs=RungSettings(first_tokens=1000))
    add_run(search, add_values(search, 0).runs[0], Record("open", 0, (metrics(search, 4.0, 0),)))
    program, script, *words = shlex.split(best_command(search, collect(search).ranked[0]))
    assert (program, script) == ("python", "launch/pretrain.py")
    assert read_run_settings(words).pause_tokens is None


def test_best_values_at_bounds_of_the_space_are_remarked(new_search):
    search = new_search(space=(RATE, "optimizer.weight_decay linear 0 0.1", "schedule.warmup_steps 1 2 3 4", NAME))
    add(search, 0, [3.0], "1.1e-4", optimizer__weight_decay="0.05", schedule__warmup_steps="4", optimizer__name="muon")
    page = page_of(search)
    assert "optimizer.learning_rate 1.1e-4 is at or near the lowest value of the space. A wider range may have better ones." in page
    assert "schedule.warmup_steps 4 is at or near the highest value of the space." in page
    assert page.count("at or near") == 2


def test_importance_names_the_setting_that_decides_and_few_trials(new_search):
    search = new_search(space=(RATE, NAME))
    for number, name in enumerate(("adamw", "muon") * 4):
        add(search, number, [2.0 + (name == "adamw") + 0.01 * number], f"{1e-3 + 1e-4 * (number * 5 % 8):g}", optimizer__name=name)
    assert "This is uncertain, because there are few trials: 8." in page_of(search)
    assert (search.folder / "pictures" / "importance.svg").exists()


def test_equal_scores_have_a_report_with_or_without_importance(new_search):
    search = new_search(space=(RATE, NAME))
    for number in range(5):
        add(search, number, [3.0], optimizer__name="muon")
    assert "Importance of each setting" in page_of(search)


def test_the_report_is_the_same_bytes_whatever_the_order_and_the_time(new_search):
    contents = []
    for folder, order in (("a", (0, 1, 2, 3)), ("b", (3, 1, 0, 2))):
        search = new_search(folder, (RATE, NAME))
        for number in order:
            add(search, number, [3.0 - 0.1 * number], f"{number + 1}e-3", optimizer__name="muon")
        run = search.trials[0].runs[0]
        run.write(Record(**{**vars(run.record), "seconds": len(contents)}))
        contents.append(files_of(search))
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6
    assert files_of(search) == contents[1]


def files_of(search):
    """The page and the pictures, written anew."""
    return [write_report(search).read_bytes(), *(path.read_bytes() for path in sorted((search.folder / "pictures").iterdir()))]


def test_trials_beyond_a_number_that_was_lowered_are_left_out(new_search):
    search = new_search(trials=1)
    add(search, 0, [3.0])
    add(search, 1, [2.0])
    assert [one.number for one in collect(search).trials] == [0]


@pytest.mark.parametrize(
    ("text", "kind", "positions"),
    [
        ("a log 1e-4 1e-2", "log", {"1e-3": 0.5}),
        ("a linear 0 10", "linear", {"5": 0.5}),
        ("a log 1 100 3", "log", {"10": 0.5}),
        ("a 16 4 1", "log", {"1": 0, "4": 0.5, "16": 1}),
        ("a 2 1 3", "linear", {"1": 0, "2": 0.5, "3": 1}),
        ("a 0 1e-4 1e-1", "words", {"0": 0, "1e-4": 0.5, "1e-1": 1}),
        ("a x null 3", "words", {"x": 0, "null": 0.5, "3": 1}),
    ],
)
def test_the_axis_of_a_setting_fits_its_values(text, kind, positions):
    scale = scale_of(read_dimension(text))
    assert scale.kind == kind
    assert {value: scale.at(value) for value in positions} == pytest.approx(positions)


@pytest.mark.parametrize(
    "text", ["a log 1e-4 1e-2", "a log 3 5", "a linear 0 60", "a linear 0.1 0.11", f"a {' '.join(map(str, range(40)))}"]
)
def test_ticks_lie_on_the_axis_and_keep_their_distance(text):
    ticks = scale_of(read_dimension(text)).ticks(0.1)
    assert 2 <= len(ticks) <= 11
    assert all(0 <= position <= 1 for position, _ in ticks)
    assert all(after[0] - before[0] >= 0.1 for before, after in itertools.pairwise(ticks))


def test_long_curves_are_thinned_and_keep_their_last_point(new_search):
    search = new_search()
    add_run(search, add_values(search, 0).runs[0], finished(search, 1.0), [(step / 1000, 2.0 - step / 1000) for step in range(1, 1001)])
    (axes,) = pictures.learning_curves(collect(search)).axes
    points = [path.vertices for collection in axes.collections for path in collection.get_paths()]
    longest = max(points, key=len)
    assert 100 < len(longest) <= 201
    assert longest[-1].tolist() == [TOKENS, 1.0]


def events_of(folder):
    """The HPARAMS data by tag and the scalars by tag of a run of TensorBoard."""
    events = EventAccumulator(str(folder)).Reload()
    contents = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.Tags()["tensors"]}
    data = {tag: HParamsPluginData.FromString(content) for tag, content in contents.items() if tag.startswith("_hparams_/")}
    return data, {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_values_and_the_score_of_each_trial(new_search):
    search = new_search(space=(RATE, NAME), trials=4)
    add(search, 0, [3.0], "2e-3", optimizer__name="muon")
    add_run(search, add_values(search, 1, optimizer__name="adamw").runs[0], Record("diverged"))
    add_run(search, add_values(search, 2, optimizer__name="adamw").runs[0], Record())
    write_hparams(search)
    board = search.folder / "tb" / "loss_validation"
    assert sorted(path.name for path in board.iterdir()) == ["space", "trial_0000", "trial_0001"]
    experiment = events_of(board / "space")[0]["_hparams_/experiment"].experiment
    assert [info.name for info in experiment.hparam_infos] == ["optimizer.learning_rate", "optimizer.name"]
    data, scalars = events_of(board / "trial_0000")
    values = data["_hparams_/session_start_info"].session_start_info.hparams
    assert values["optimizer.learning_rate"].number_value == 2e-3
    assert values["optimizer.name"].string_value == "muon"
    assert scalars == {"search/loss/validation": [(TOKENS, 3.0)], "search/tokens": [(TOKENS, TOKENS)]}
    data, scalars = events_of(board / "trial_0001")
    assert (data["_hparams_/session_end_info"].session_end_info.status, scalars) == (2, {})  # 2 is STATUS_FAILURE


def test_writing_for_tensorboard_again_adds_only_new_trials(new_search):
    search = new_search()
    add(search, 0, [3.0])
    write_hparams(search)
    before = {path: path.stat().st_mtime_ns for path in search.folder.rglob("*tfevents*")}
    add(search, 1, [2.0])
    write_hparams(search)
    after = {path: path.stat().st_mtime_ns for path in search.folder.rglob("*tfevents*")}
    assert len(before) == 2 and before.items() <= after.items() and len(after) == 3


def test_tensorboard_gets_a_paused_trial_anew_at_its_next_rung(new_search):
    search = new_search(rungs=RungSettings(first_tokens=1000, factor=4))
    run = add_values(search, 0).runs[0]
    board = search.folder / "tb" / "loss_validation"
    reached = [metrics(search, 5.0, 0), metrics(search, 4.0, 1)]
    add_run(search, run, Record("open", 0, tuple(reached[:1])))
    write_hparams(search)
    assert sorted(path.name for path in board.iterdir()) == ["space", "trial_0000_rung_1"]
    run.write(Record("open", 1, tuple(reached)))
    write_hparams(search)
    assert sorted(path.name for path in board.iterdir()) == ["space", "trial_0000_rung_2"]
    assert events_of(board / "trial_0000_rung_2")[1]["search/loss/validation"] == [(1000, 5.0), (4000, 4.0)]
    run.write(finished(search, 5.0, 4.0, 3.5))
    write_hparams(search)
    assert sorted(path.name for path in board.iterdir()) == ["space", "trial_0000"]


def test_the_report_does_not_import_torch():
    code = "import sys, launch.searching.report; sys.exit(bool({'torch', 'tensorflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
