"""The report of a search: a page for people, and the trials for TensorBoard's HPARAMS page.

The page depends only on the metrics and records in the folder: it has no times and no names of machines, so that a search that was
killed and resumed has the same page as one that never stopped.
"""

import base64
import html
import math
import os
import shlex
import shutil
import socket
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import Discrete, HParam, Metric, RealInterval, hparams_config_pb, hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from data.command_line import UserError
from data.files import new_folder, write_file
from data.preparation.report_page import html_page, table
from launch.searching import pictures
from launch.searching.batch_report import batch_section
from launch.searching.pictures import SearchResult, State, TrialResult, scale_of
from launch.searching.proposals import Known, past_trials
from launch.searching.search import Search
from launch.searching.space import Dimension
from launch.searching.trials import Record, Trial, TrialRun

REPORT, PICTURES, BOARD = "report.html", "pictures", "tb"
BEST_OUTPUT = "runs/best"
"""Folder of the run that the command of the best trial starts."""
TOKENS_TAG = "search/tokens"
_SHOWN_ROWS = 30  # rows of a table that are visible before it is opened
_EDGE = 0.03  # share of a range at each end in which a best value is close to its bound
_FEW_TRIALS = 20
_FEWEST_TRIALS = 4
_PORT = "29500"  # the default port of torch.distributed


def write_report(search: Search) -> Path:
    """Write report.html and its pictures to the folder of a search, and return its path. Several processes may do so at once."""
    result = collect(search)
    sections = [_heading(search, result), _best(search, result), *_tables_of_trials(search, result)]
    batch = batch_section(search)
    shown = [*([batch] if batch else []), *_pictures(search, result)]
    sections += [_picture(search.folder / PICTURES, *one) for one in shown]
    path = search.folder / REPORT
    _write(path, html_page("Hyper-parameter search", sections))
    return path


def _write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_file(path, contents, path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}"))


def collect(search: Search) -> SearchResult:
    """Return the results so far of a search, read from its folder. Trials beyond a number that was lowered are left out."""
    trials = tuple(_read_trial(search, trial) for trial in search.wanted)
    return SearchResult(search.settings.objective, search.settings.maximize, tuple(search.space), trials)


def _read_trial(search: Search, trial: Trial) -> TrialResult:
    objective = search.settings.objective
    scores = search.scores(trial)  # before the records, which may grow meanwhile
    finite = scores[: next((rung for rung, score in enumerate(scores) if not math.isfinite(score)), len(scores))]
    runs = [(run, run.record) for run in trial.runs]
    records = [record for _, record in runs]
    return TrialResult(
        number=trial.number,
        values=trial.values or {},
        state=_state(records, is_finite=finite == scores),
        rung_scores=tuple(-score if search.settings.maximize else score for score in finite),
        run_scores=tuple(record.metrics[len(finite) - 1][objective] for record in records) if finite else (),
        tokens=sum(_tokens(search, run, record) for run, record in runs),
        curves=tuple(tuple(run.curve(objective)) for run, _ in runs),
        reason=_reason(runs, objective),
    )


def _state(records: Sequence[Record], is_finite: bool) -> State:
    states = [record.state for record in records]
    if "failed" in states:
        return "failed"
    if "diverged" in states or not is_finite:
        return "diverged"
    if any(record.has_work for record in records):
        return "open"
    return "finished" if set(states) == {"finished"} else "paused"


def _tokens(search: Search, run: TrialRun, record: Record) -> float:
    """Return the tokens that a run has read up to its last rung or, if it diverged or failed, up to its last step."""
    reached = search.rungs[len(record.metrics) - 1] if record.metrics else 0.0
    if record.state in ("diverged", "failed"):
        return max(reached, run.last_metrics().get("progress/tokens", 0.0))
    return record.metrics[-1].get("progress/tokens", reached) if record.metrics else 0.0


def _reason(runs: Sequence[tuple[TrialRun, Record]], objective: str) -> str:
    """Return the last line of the output of each run that diverged or failed."""
    reasons = []
    for run, record in runs:
        if record.state in ("diverged", "failed"):
            last = (record.reason.strip().splitlines() or ["no output"])[-1]
            reasons.append(f"seed {run.seed}: {last}" if len(runs) > 1 else last)
        elif any(not math.isfinite(metrics.get(objective, 0.0)) for metrics in record.metrics):
            reasons.append(f"{objective} of seed {run.seed} is not finite.")
    return "\n".join(reasons)


def _heading(search: Search, result: SearchResult) -> str:
    settings = search.settings
    states = Counter(one.state for one in result.trials)
    shown: list[tuple[State, str]] = [("finished", "finished"), ("open", "open"), ("diverged", "diverged"), ("failed", "failed")]
    if len(search.rungs) > 1:
        shown.insert(1, ("paused", "paused at a rung"))
    tiles = {"trials": f"{len(result.trials):,} of {search.num_trials:,}"} | {name: f"{states[state]:,}" for state, name in shown}
    rows = [["objective", f"{settings.objective}, {'maximize' if settings.maximize else 'minimize'}"]]
    rows += [["preset", settings.preset]] if settings.preset else [["method", f"{settings.method}, seed {settings.seed}"]]
    rows += [[one.name, one.text.split(maxsplit=1)[1]] for one in search.space]
    rows += [["runs of each trial", f"{settings.repeat}"], ["tokens of each run", f"{search.tokens:,}"]]
    rows += [["rungs, tokens", ", ".join(f"{rung:,.0f}" for rung in search.rungs)]] if len(search.rungs) > 1 else []
    rows += [["branches of", settings.branch.parent]] if settings.branch.parent else [["recipe", settings.recipe]]
    rows += [["settings of all trials", ", ".join(settings.settings)]] if settings.settings else []
    names = ", ".join(one.name for one in search.space)
    return (
        f"<header><h1>Hyper-parameter search</h1><p>{html.escape(names)}</p></header>\n<section>{_tiles(tiles)}"
        f"{table(['setting', 'value'], rows, text_columns=2)}</section>"
    )


def _tiles(tiles: dict[str, str]) -> str:
    return (
        '<dl class="totals">'
        + "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in tiles.items())
        + "</dl>"
    )


def _best(search: Search, result: SearchResult) -> str:
    if not result.ranked:
        return _section("Best trial", "No trial has a score yet.")
    best = result.ranked[0]
    score = f"{_number(best.rung_scores[-1])}{_spread(best, ' (mean of {} runs, {} to {})')}"
    tiles = {f"trial {best.number}, {html.escape(result.objective)}": _number(best.rung_scores[-1])}
    tiles |= {html.escape(name): value for name, value in best.values.items()}
    remarks = [f"Trial {best.number} has the best {result.objective}: {score}, after {search.rungs[best.rung]:,.0f} tokens of each run."]
    if best.rung + 1 < len(search.rungs):
        remarks.append(f"No trial has finished. The best one has reached rung {best.rung + 1} of {len(search.rungs)}.")
    remarks += [*_remarks_on_noise(result), *_remarks_on_edges(result)]
    if search.parent is None:
        command = '<p class="note">Command that trains it again, to the end:</p>' + f"<pre>{html.escape(best_command(search, best))}</pre>"
    else:
        command = '<p class="note">No command trains it again, because each run resumes from a checkpoint of the parent.</p>'
    return _section(
        "Best trial",
        f"{_tiles(tiles)}<ul>{''.join(f'<li>{html.escape(remark)}</li>' for remark in remarks)}</ul>{command}",
    )


def best_command(search: Search, best: TrialResult) -> str:
    """Return a command that trains the first run of a trial again, without a pause, into a folder of the user."""
    trial = search.trials[best.number]
    run = trial.runs[0]
    words = search.words(run, best.values, len(search.rungs) - 1)
    words = [f"--output={BEST_OUTPUT}" if word == f"--output={run.folder}" else word for word in words]
    launcher = shlex.split(search.settings.launcher.replace("{port}", _PORT)) or ["python"]
    return shlex.join([*launcher, "launch/pretrain.py", *words])


def _remarks_on_noise(result: SearchResult) -> list[str]:
    """Return a remark if other trials cannot be told from the best one by its runs."""
    best, *others = result.ranked
    low, high = min(best.run_scores), max(best.run_scores)
    near = [one for one in others if one.rung == best.rung and low <= one.rung_scores[-1] <= high]
    if len(best.run_scores) < 2 or not near:
        return []
    return [f"Trials whose score lies between its best and its worst run: {_numbers_of(near)}. More runs would tell them apart."]


def _remarks_on_edges(result: SearchResult) -> list[str]:
    """Return a remark for each setting whose best value is at a bound of the space."""
    remarks = []
    for one in result.space:
        scale, value = scale_of(one), result.ranked[0].values[one.name]
        bounds = {"lowest": scale.at(value), "highest": 1 - scale.at(value)} if scale.kind != "words" else {}
        remarks += [
            f"{one.name} {value} is at or near the {bound} value of the space. A wider range may have better ones."
            for bound, distance in bounds.items()
            if distance <= _EDGE
        ]
    return remarks


def _numbers_of(trials: Sequence[TrialResult]) -> str:
    """Return the numbers of trials as text, at most 20 of them."""
    shown = ", ".join(str(one.number) for one in trials[:20])
    return f"{shown} and {len(trials) - 20:,} more" if len(trials) > 20 else shown


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 0.01 <= abs(value) < 1e5 else f"{value:.4g}"


def _spread(one: TrialResult, form: str) -> str:
    runs = one.run_scores
    return form.format(len(runs), _number(min(runs)), _number(max(runs))) if len(runs) > 1 else ""


def _tables_of_trials(search: Search, result: SearchResult) -> Iterator[str]:
    ranked = result.ranked
    others = [one for one in result.trials if one.score is None]
    ordered = [*ranked, *sorted(others, key=lambda one: (one.is_lost, one.number))]
    has_spread = search.settings.repeat > 1
    rows = []
    for one in ordered:
        spread = [_spread(one, "{1} to {2}") if one.score is not None else ""] if has_spread else []
        score = "" if one.score is None else _number(one.score)
        rung = [f"{one.rung + 1} of {len(search.rungs)}"] if len(search.rungs) > 1 else []
        values = [one.values.get(dimension.name, "") for dimension in result.space]
        rows.append([str(one.number), one.state, *values, score, *spread, *rung, f"{one.tokens:,.0f}"])
    header = ["trial", "state", *(dimension.name for dimension in result.space), result.objective]
    header += [*(["runs"] if has_spread else []), *(["rung"] if len(search.rungs) > 1 else []), "tokens"]
    yield _section("All trials, best first", _folded_table(header, rows, 2) if rows else "There is no trial yet.")
    if lost := result.lost:
        reasons = [[str(one.number), one.state, one.reason] for one in lost]
        yield _section("Diverged and failed trials", _folded_table(["trial", "state", "reason"], reasons, 3))


def _folded_table(header: list[str], rows: list[list[str]], text_columns: int) -> str:
    """Return a table whose first rows are visible; the others appear with a click."""
    text = table(header, rows[:_SHOWN_ROWS], text_columns=text_columns)
    if len(rows) > _SHOWN_ROWS:
        others = table(header, rows[_SHOWN_ROWS:], text_columns=text_columns)
        text += f'<details><summary class="note">{len(rows) - _SHOWN_ROWS:,} more</summary>{others}</details>'
    return text


def _section(title: str, contents: str, note: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{contents}{note}</section>"


def _picture(folder: Path, name: str, title: str, figure: Figure | None, note: str) -> str:
    """Write a picture to a file, and return the section with it; without a figure, the section with its note alone."""
    if figure is None:
        return _section(title, html.escape(note))
    contents = pictures.svg(figure, name)
    _write(folder / f"{name}.svg", contents)
    image = base64.b64encode(contents).decode()
    return _section(title, f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{image}">', note)


def _pictures(search: Search, result: SearchResult) -> Iterator[tuple[str, str, Figure | None, str]]:
    """Yield name, title, figure and note of each picture."""
    yield ("importance", "Importance of each setting", *_importance(search, result))
    has_score = bool(result.ranked)
    missing = "No trial has a score yet."
    lost = f" Diverged or failed: {_numbers_of(result.lost)}." if result.lost else ""
    rungs = (
        " Trials that stopped at an earlier rung have the score of that rung; their lines are thin, their dots hollow."
        if len(search.rungs) > 1
        else ""
    )
    yield (
        "parallel",
        "Settings and score of each trial",
        pictures.parallel_coordinates(result) if has_score else None,
        f"One line is one trial.{rungs}{lost}" if has_score else missing,
    )
    spread = " Whiskers reach from the lowest to the highest run of a trial." if search.settings.repeat > 1 else ""
    lists = " Dots of the same value of a list are spread sideways." if any(one.values for one in result.space) else ""
    yield (
        "slices",
        "Score against each setting",
        pictures.slices(result) if has_score else None,
        f"One dot is one trial.{spread}{lists}{rungs}{lost}" if has_score else missing,
    )
    yield (
        "best",
        "Best score against tokens",
        pictures.best_so_far(result) if has_score else None,
        f"Tokens of all runs are added in the order of the trials' numbers.{rungs}{lost}" if has_score else missing,
    )
    has_curve = any(len(curve) > 1 for one in result.trials for curve in one.curves)
    without = [one for one in result.lost if not any(one.curves)]
    note = f"One line is one run.{lost}" + (f" Without any value of {result.objective}: {_numbers_of(without)}." if without else "")
    yield (
        "curves",
        "Learning curves",
        pictures.learning_curves(result) if has_curve else None,
        note if has_curve else f"No run has two values of {result.objective} yet.",
    )


def _importance(search: Search, result: SearchResult) -> tuple[Figure | None, str]:
    """Return a picture of the importance of each setting by PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), and a note.

    It compares the scores of one rung: the highest that enough trials have reached, else the first.
    """
    finite = [sum(len(one.rung_scores) > rung for one in result.trials) for rung in range(len(search.rungs))]
    rung = max((rung for rung, count in enumerate(finite) if count >= _FEW_TRIALS), default=0)
    if finite[rung] < _FEWEST_TRIALS:
        return None, f"Trials with a score: {finite[rung]}. The importance of settings needs {_FEWEST_TRIALS} or more."
    if len(result.space) == 1:
        return None, "The importance compares settings, and this search has one."
    known = []
    for one in result.trials:
        if len(one.rung_scores) > rung:
            known.append(Known(one.values, -one.rung_scores[rung] if result.maximize else one.rung_scores[rung]))
        elif one.is_lost and one.values:
            known.append(Known(one.values, math.inf))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials(past_trials(search.space, known))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about experimental features, and trials with equal scores
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError) as error:
        return None, f"Optuna could not compute the importance of settings: {error}"
    if not all(map(math.isfinite, shares.values())):
        return None, "The scores do not differ enough for the importance of settings."
    few = f" This is uncertain, because there are few trials: {finite[rung]}." if finite[rung] < _FEW_TRIALS else ""
    at_rung = f" Scores at {search.rungs[rung]:,.0f} tokens are compared." if len(search.rungs) > 1 else ""
    chance = "Chance gives a share to settings without effect, too."
    note = f"How much each setting decides whether a trial is among the best (PED-ANOVA). {chance}{few}{at_rung}"
    return pictures.importance(shares), note


def write_hparams(search: Search) -> None:
    """Write the trials that have ended to tb/ in the folder of a search, for TensorBoard's HPARAMS page.

    An entry is written once. A trial that a rung has paused gets a new entry when it has reached the next one.
    """
    result = collect(search)
    tag = f"search/{result.objective}"
    board = search.folder / BOARD / result.objective.replace("/", "_")
    metrics = [Metric(tag, display_name=result.objective), Metric(TOKENS_TAG, display_name="tokens of a run")]
    settings = [HParam(one.name, _domain(one)) for one in search.space]
    _write_events(board / "space", [(0, hparams_config_pb(settings, metrics, time_created_secs=0.0))])
    for one in result.trials:
        if one.values and one.state != "open":
            name = f"trial_{one.number:04d}"
            is_paused = one.state == "paused"
            _write_events(board / (f"{name}_rung_{one.rung + 1}" if is_paused else name), _events_of_trial(search, one, tag))
            for earlier in board.glob(f"{name}_rung_*"):
                if not is_paused or earlier.name != f"{name}_rung_{one.rung + 1}":
                    shutil.rmtree(earlier, ignore_errors=True)


def _domain(one: Dimension) -> Discrete | RealInterval:
    if one.values:
        return Discrete([_typed(one, value) for value in one.values])
    return RealInterval(one.low, one.high)


def _typed(one: Dimension, value: str) -> str | float:
    """Return a value as a number where the setting has numbers only."""
    return float(value) if scale_of(one).is_number else value


def _events_of_trial(search: Search, one: TrialResult, tag: str) -> Iterator[tuple[int, Summary]]:
    """Yield steps and summaries: the values, the score at each rung, and how the trial ended. The step is the rung's tokens."""
    values = {dimension.name: _typed(dimension, one.values[dimension.name]) for dimension in search.space}
    yield 0, hparams_pb(values, trial_id=f"trial {one.number}", start_time_secs=float(one.number))
    for rung, score in enumerate(one.rung_scores if not one.is_lost else ()):
        tokens = search.rungs[rung]
        yield int(tokens), Summary(value=[Summary.Value(tag=tag, simple_value=score), Summary.Value(tag=TOKENS_TAG, simple_value=tokens)])
    status = api_pb2.STATUS_FAILURE if one.is_lost else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.HParamsPluginData(session_end_info=plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=float(one.number)))
    about = metadata.create_summary_metadata(end)
    yield 0, Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)])


def _write_events(folder: Path, events: Sequence[tuple[int, Summary]] | Iterator[tuple[int, Summary]]) -> None:
    """Write the events of a new TensorBoard run. Nothing happens if the folder exists."""
    if folder.exists():
        return
    try:
        with new_folder(folder) as temporary:
            writer = EventFileWriter(str(temporary))
            for step, summary in events:
                writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
            writer.close()
    except UserError:
        if not folder.exists():  # otherwise another worker has written it
            raise
