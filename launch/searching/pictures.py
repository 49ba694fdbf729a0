"""The pictures of a search, and the scales of their axes."""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import matplotlib
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from data.preparation.report_page import short_number
from launch.evaluation.pictures import COLOURS, new_figure, style, use_logarithm_for_wide_range
from launch.searching.space import Dimension, Values

_BLUE, _ORANGE = COLOURS[0], COLOURS[1]
_GREY = "#9aa5ae"
_WIDTH = 10.5  # inches, the same for all pictures, so that the page shows their texts in one size
_WIDE_RANGE = 8  # largest / smallest value from which an axis is logarithmic
_CURVE_POINTS = 200
_PANELS_IN_ROW = 3
State = Literal["finished", "paused", "open", "diverged", "failed"]
"""State of a trial; paused: it has reached its rung and may be promoted."""
_BEYOND = 1.12
"""Place of diverged and failed trials on the score axis of parallel coordinates, whose scores lie between 0 and 1."""


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """What is known about a trial, for people: scores are values of the objective, with their own sign."""

    number: int
    values: Values
    """The values by setting; empty if they are not written yet."""
    state: State
    rung_scores: tuple[float, ...]
    """Mean over the runs at each rung that all of them have reached with a finite value."""
    run_scores: tuple[float, ...]
    """Score of each run at the last of these rungs, in the order of the seeds."""
    tokens: float
    """Tokens of all runs together."""
    curves: tuple[tuple[tuple[float, float], ...], ...]
    """Objective of each run as pairs of tokens and value."""
    reason: str = ""
    """Last lines of the output of a run that diverged or failed."""

    @property
    def rung(self) -> int:
        """Index of the last rung with a score; -1 without one."""
        return len(self.rung_scores) - 1

    @property
    def score(self) -> float | None:
        """The score at the last rung; None before the first one, and for a trial that diverged or failed."""
        return self.rung_scores[-1] if self.rung_scores and not self.is_lost else None

    @property
    def is_lost(self) -> bool:
        """True if the trial diverged or failed."""
        return self.state in ("diverged", "failed")


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The trials of a search, in the order of their numbers."""

    objective: str
    maximize: bool
    space: tuple[Dimension, ...]
    trials: tuple[TrialResult, ...]

    @property
    def ranked(self) -> list[TrialResult]:
        """The trials with a score, best first: those at a higher rung before all others."""
        sign = -1 if self.maximize else 1
        scored = [(-one.rung, sign * one.score, one.number) for one in self.trials if one.score is not None]
        by_number = {one.number: one for one in self.trials}
        return [by_number[number] for _, _, number in sorted(scored)]

    @property
    def lost(self) -> list[TrialResult]:
        """The trials that diverged or failed."""
        return [one for one in self.trials if one.is_lost]


@dataclasses.dataclass(frozen=True)
class Scale:
    """An axis from 0 to 1 for the values of a setting or for scores."""

    kind: Literal["log", "linear", "words"]
    low: float = 0.0
    high: float = 1.0
    words: tuple[str, ...] = ()
    """The values of a list in the order of the axis; empty for a range."""
    is_whole: bool = False

    @property
    def is_number(self) -> bool:
        """True if every value is a finite number."""
        return self.kind != "words" or all(_is_finite_number(word) for word in self.words)

    def at(self, value: str | float) -> float:
        """Return the position of a value, from 0 to 1."""
        if self.kind == "words":
            return self.words.index(str(value)) / (len(self.words) - 1)
        low, high, number = (math.log(one) if self.kind == "log" else one for one in (self.low, self.high, float(value)))
        return min(max((number - low) / (high - low), 0.0), 1.0) if low < high else 0.5

    def ticks(self, distance: float) -> list[tuple[float, str]]:
        """Return positions and texts of ticks that are at least `distance` apart; the first tick is always there."""
        texts = [(self.at(word), word) for word in self.words] or [(self.at(one), short_number(one)) for one in self._round_numbers()]
        kept: list[tuple[float, str]] = []
        for position, text in sorted(texts):
            if not kept or position >= kept[-1][0] + distance:
                kept.append((position, text))
        return kept

    def _round_numbers(self) -> list[float]:
        if self.low == self.high:
            return [self.low]
        if self.kind == "linear":
            numbers = list(MaxNLocator(5, integer=self.is_whole).tick_values(self.low, self.high))
        else:
            factors = (1,) if self.high > 300 * self.low else (1, 3) if self.high > 20 * self.low else (1, 2, 5)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            numbers = [float(f"{factor}e{power}") for power in powers for factor in factors]
        found = [number for number in numbers if self.low <= number <= self.high]
        return found if len(found) > 1 else [self.low, self.high]


def scale_of(one: Dimension) -> Scale:
    """Return the axis of a setting: logarithmic for a log range and for a list of numbers that spans a wide range."""
    if not one.values:
        return Scale("log" if one.is_log else "linear", one.low, one.high, is_whole=one.is_whole)
    if not all(map(_is_finite_number, one.values)):
        return Scale("words", words=one.values)
    words = tuple(sorted(one.values, key=float))
    numbers = [float(word) for word in words]
    positive = [number for number in numbers if number > 0]
    is_wide = bool(positive) and positive[-1] >= _WIDE_RANGE * positive[0]
    if numbers[0] == numbers[-1] or (is_wide and len(positive) < len(numbers)):
        return Scale("words", words=words)
    return Scale("log" if is_wide or (one.is_log and numbers[0] > 0) else "linear", numbers[0], numbers[-1], words)


def _is_finite_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def scale_of_scores(scores: Sequence[float]) -> Scale:
    """Return the axis of scores: logarithmic if they span a wide range."""
    low, high = min(scores), max(scores)
    return Scale("log" if low > 0 and high > _WIDE_RANGE * low else "linear", low, high)


def svg(figure: Figure, name: str) -> bytes:
    """Return a figure as an SVG file; the same figure and name give the same bytes."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": name}):  # otherwise the identifiers inside are random
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def importance(shares: Mapping[str, float]) -> Figure:
    """Return a picture with a bar for the importance of each setting, 0 to 1, the largest first."""
    figure, axes = new_figure(_WIDTH, height=0.9 + 0.32 * len(shares), grid="x")
    ordered = sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))
    bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], height=0.6, color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_xlim(0, 1.08)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_xlabel("importance; all together are 1")
    return figure


def parallel_coordinates(result: SearchResult) -> Figure:
    """Return a picture with an axis for each setting and one for the score, and a line for each trial with a score or that was lost."""
    ranked, lost = result.ranked, [one for one in result.lost if one.values]
    scales = {one.name: scale_of(one) for one in result.space}
    of_scores = scale_of_scores([one.score for one in ranked if one.score is not None])
    figure, axes = new_figure(_WIDTH, height=4.6, grid="x")
    beyond = 1 - _BEYOND if result.maximize else _BEYOND

    def _line(one: TrialResult, end: float) -> list[tuple[float, float]]:
        places = [scale.at(one.values[name]) + (_sideways(one, 0.03) if scale.words else 0.0) for name, scale in scales.items()]
        return [*enumerate(places), (len(places), end)]

    opacity = min(0.9, max(0.3, 40 / len(ranked)))
    colours = _colours_of_rank(len(ranked))
    is_at_best_rung = [one.rung == ranked[0].rung for one in ranked]
    lines = [_line(one, of_scores.at(one.score if one.score is not None else math.nan)) for one in ranked]
    axes.add_collection(LineCollection([_line(one, beyond) for one in lost], colors=_GREY, linewidths=0.9, linestyles="--", alpha=opacity))
    widths = [1.3 if is_best else 0.6 for is_best in is_at_best_rung]
    axes.add_collection(LineCollection(lines[:0:-1], colors=colours[:0:-1], linewidths=widths[:0:-1], alpha=opacity))
    axes.plot(*zip(*lines[0], strict=True), color=_ORANGE, linewidth=2.6, solid_capstyle="round")
    for index, scale in enumerate([*scales.values(), of_scores]):
        _draw_scale(axes, index, scale, is_last=index == len(scales))
    if lost:
        axes.text(len(scales) + 0.03, beyond, "diverged or failed", va="center", fontsize=8.5, color="#5f6b76")
    names = [*(name.replace(".", ".\n", 1) for name in scales), result.objective.replace("/", "/\n", 1)]
    axes.set_xticks(range(len(names)), names, fontsize=9, rotation=0 if len(names) < 9 else 30)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(xlim=(-0.25, len(scales) + 0.45), ylim=(min(beyond, 0) - 0.05, max(beyond, 1) + 0.05))
    figure.legend(handles=_legend(ranked, bool(lost)), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw_scale(axes: Axes, index: int, scale: Scale, is_last: bool) -> None:
    axes.plot([index, index], [0, 1], color="#1c2329", linewidth=1)
    for position, text in scale.ticks(0.06):
        axes.plot([index - 0.012, index + 0.012], [position, position], color="#1c2329", linewidth=1)
        axes.text(
            index + (0.03 if is_last else -0.03),
            position,
            text,
            va="center",
            ha="left" if is_last else "right",
            fontsize=8.5,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.8},
        )


def _legend(ranked: Sequence[TrialResult], has_lost: bool) -> list[Line2D]:
    handles = [Line2D([], [], color=_ORANGE, linewidth=2.6, label=f"best: trial {ranked[0].number}")]
    if len(ranked) > 1:
        handles.append(Line2D([], [], color=_colours_of_rank(3)[1], linewidth=1.3, label="other trials, dark is better"))
    if has_lost:
        handles.append(Line2D([], [], color=_GREY, linewidth=0.9, linestyle="--", label="diverged or failed"))
    return handles


def _colours_of_rank(count: int) -> list[tuple[float, float, float, float]]:
    """Return a colour for each rank, dark for the best."""
    colours = matplotlib.colormaps["viridis"]
    return [colours(0.92 * rank / max(count - 1, 1)) for rank in range(count)]


def slices(result: SearchResult) -> Figure:
    """Return a picture with a panel for each setting: the score of each trial against its value."""
    columns = 2 if len(result.space) == 4 else min(len(result.space), _PANELS_IN_ROW)
    rows = math.ceil(len(result.space) / columns)
    figure = Figure(figsize=(_WIDTH, 0.4 + 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes, dimension in zip(panels, result.space, strict=False):
        style(axes, "both")
        _slice(axes, result, dimension)
    for axes in panels[len(result.space) :]:
        axes.set_visible(False)
    figure.supylabel(result.objective, fontsize=10)
    figure.legend(handles=_legend_of_dots(result), loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return figure


def _slice(axes: Axes, result: SearchResult, dimension: Dimension) -> None:
    scale, ranked = scale_of(dimension), result.ranked
    jitter = min(0.1, 0.35 / max(len(scale.words) - 1, 1)) if scale.words else 0.0

    def _place(one: TrialResult) -> float:
        return scale.at(one.values[dimension.name]) + _sideways(one, jitter)

    opacity = min(1.0, max(0.35, 60 / max(len(ranked), 1)))
    for is_at_best_rung, facecolour in ((False, "none"), (True, _BLUE)):
        shown = [one for one in ranked[1:] if (one.rung == ranked[0].rung) == is_at_best_rung]
        axes.scatter(
            [_place(one) for one in shown], [_score(one) for one in shown], 22, facecolor=facecolour, edgecolor=_BLUE, alpha=opacity
        )
    for one in ranked:
        colour = _ORANGE if one is ranked[0] else _BLUE
        if len(one.run_scores) > 1:
            axes.vlines(_place(one), min(one.run_scores), max(one.run_scores), color=colour, linewidth=1, alpha=opacity)
            axes.scatter([_place(one)] * len(one.run_scores), one.run_scores, 5, color=colour, alpha=opacity, linewidths=0)
    axes.scatter(_place(ranked[0]), _score(ranked[0]), 70, color=_ORANGE, zorder=4)
    _mark_lost(axes, [_place(one) for one in result.lost if one.values], result.maximize)
    ticks = scale.ticks(0.12)
    is_long = sum(len(text) for _, text in ticks) > 26
    axes.set_xticks([position for position, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes.tick_params(axis="x", rotation=25 if is_long else 0)
    axes.set_xlim(-0.08, 1.08)
    axes.set_xlabel(dimension.name)
    _use_logarithm(axes, [_score(one) for one in ranked])


def _legend_of_dots(result: SearchResult) -> list[Line2D]:
    def _dots(label: str, **look: str | float) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **{"marker": "o", "color": _BLUE, "markersize": 5} | look)  # type: ignore[arg-type]

    ranked = result.ranked
    handles = [_dots(f"best: trial {ranked[0].number}", color=_ORANGE, markersize=8)]
    handles += [_dots("other trials")] if any(one.rung == ranked[0].rung for one in ranked[1:]) else []
    handles += [_dots("stopped at an earlier rung", markerfacecolor="none")] if any(one.rung != ranked[0].rung for one in ranked) else []
    handles += [_dots("one run", markersize=2)] if any(len(one.run_scores) > 1 for one in ranked) else []
    handles += [_dots("diverged or failed", marker="x", color=_GREY)] if result.lost else []
    return handles


def _sideways(one: TrialResult, width: float) -> float:
    """Return a shift by which the trials of one value of a list are spread: from minus half of the width to plus half."""
    return width * (one.number * 0.618034 % 1 - 0.5)  # the golden ratio spreads any number of trials evenly


def _score(one: TrialResult) -> float:
    assert one.score is not None
    return one.score


def _mark_lost(axes: Axes, places: Sequence[float], maximize: bool) -> None:
    """Draw a cross at the edge of worse scores for each trial that has no finite score."""
    edge = 0.0 if maximize else 1.0
    axes.scatter(places, [edge] * len(places), 28, marker="x", color=_GREY, transform=axes.get_xaxis_transform(), clip_on=False, zorder=4)


def _use_logarithm(axes: Axes, values: Sequence[float]) -> None:
    if scale_of_scores(values).kind == "log":
        use_logarithm_for_wide_range(axes, values)


def best_so_far(result: SearchResult) -> Figure:
    """Return a picture of the best score against the tokens of all trials, which are counted in the order of their numbers."""
    figure, axes = new_figure(_WIDTH, grid="both")
    best_rung, sign = result.ranked[0].rung, -1 if result.maximize else 1
    total, tokens, best = 0.0, {}, [(0.0, math.inf)]
    for one in result.trials:
        tokens[one.number] = total = total + one.tokens
        if one.score is not None and one.rung == best_rung and sign * one.score < best[-1][1]:
            best.append((total, sign * one.score))
    best = [*best[1:], (total, best[-1][1])]
    axes.step([at for at, _ in best], [sign * score for _, score in best], where="post", color=_ORANGE, linewidth=2)
    for is_at_best_rung, facecolour in ((False, "none"), (True, _BLUE)):
        shown = [one for one in result.ranked if (one.rung == best_rung) == is_at_best_rung]
        axes.scatter([tokens[one.number] for one in shown], [_score(one) for one in shown], 16, facecolor=facecolour, edgecolor=_BLUE)
    axes.scatter(tokens[result.ranked[0].number], _score(result.ranked[0]), 70, color=_ORANGE, zorder=4)
    _use_logarithm(axes, [_score(one) for one in result.ranked])
    _mark_lost(axes, [tokens[one.number] for one in result.lost], result.maximize)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set(xlabel="tokens of the trials so far", ylabel=result.objective)
    handles = [Line2D([], [], color=_ORANGE, linewidth=2, label="best so far"), *_legend_of_dots(result)]
    handles = [handle for handle in handles if handle.get_label() != "one run"]
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return figure


def learning_curves(result: SearchResult) -> Figure:
    """Return a picture of the objective of every run against tokens. There must be a run with two values at least."""
    figure, axes = new_figure(_WIDTH, height=4.0, grid="both")
    ranked = result.ranked
    opacity = min(0.9, max(0.3, 60 / len(result.trials)))
    unranked = [one for one in result.trials if not one.is_lost and one.score is None]
    axes.add_collection(LineCollection(_thinned(unranked), colors=_GREY, linewidths=0.8, alpha=opacity))
    axes.add_collection(LineCollection(_thinned(result.lost), colors=_GREY, linewidths=0.9, linestyles="--", alpha=opacity))
    colours = _colours_of_rank(len(ranked))
    for one, colour in list(zip(ranked, colours, strict=True))[:0:-1]:
        axes.add_collection(LineCollection(_thinned([one]), colors=[colour], linewidths=0.9, alpha=opacity))
    axes.add_collection(LineCollection(_thinned(ranked[:1]), colors=_ORANGE, linewidths=2.2, zorder=4))
    ends = [curve[-1] for one in result.lost for curve in one.curves if curve]
    axes.scatter([at for at, _ in ends], [value for _, value in ends], 28, marker="x", color=_GREY, zorder=4)
    axes.autoscale_view()
    _use_logarithm(axes, [value for one in result.trials for curve in one.curves for _, value in curve])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set(xlabel="tokens of the run", ylabel=result.objective)
    if ranked:
        handles = _legend(ranked, bool(result.lost))
        handles += [Line2D([], [], color=_GREY, linewidth=0.8, label="no score yet")] if unranked else []
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _thinned(trials: Iterable[TrialResult]) -> list[list[tuple[float, float]]]:
    """Return the curves of trials, with few enough points for a picture; the last point is always there."""
    curves = [curve for one in trials for curve in one.curves if curve]
    return [[*curve[: -1 : len(curve) // _CURVE_POINTS + 1], curve[-1]] for curve in curves]
