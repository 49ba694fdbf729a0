"""The pictures of a report on compression, and of models side by side."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people who see few colours can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDE_RANGE = 8  # largest / smallest, from where on an axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Point:
    """A model in the picture of several."""

    name: str
    megabytes: float
    """Of its weights on disk."""
    perplexity: float
    standard_error: float
    """Of the difference from the first one's."""


def errors_over_depth(errors: Mapping[str, Mapping[int, float]]) -> "Figure":
    """Relative output errors by linear layer's name in its block, then by block."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(7.6)
    for number, (name, by_block) in enumerate(errors.items()):
        places, values = zip(*sorted(by_block.items()), strict=True)
        line = "-" if number < len(_COLOURS) else "--"
        axes.plot(places, values, line, color=_COLOURS[number % len(_COLOURS)], marker="o", markersize=4, linewidth=1.5, label=name)
    _logarithmic_where_wide(axes, [value for by_block in errors.values() for value in by_block.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", ylabel="relative error of outputs")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def sensitivity(divergences: Mapping[int, float]) -> "Figure":
    """What compressing one block alone costs, by block: nats a token."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(7.6)
    axes.bar(list(divergences), list(divergences.values()), width=0.8, color=_COLOURS[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block that alone is compressed", ylabel="KL to the dense model, nats")
    return figure


def sizes(models: Mapping[str, Mapping[str, int]]) -> "Figure":
    """Bytes by kind of tensor, of each model by its name."""
    totals: dict[str, int] = defaultdict(int)
    figure, axes = _figure(7.6, height=0.9 + 0.5 * len(models), grid="x")
    for number, kind in enumerate(dict.fromkeys(kind for by_kind in models.values() for kind in by_kind)):
        width = [by_kind.get(kind, 0) / 1e6 for by_kind in models.values()]
        left = [totals[name] / 1e6 for name in models]
        axes.barh(list(models), width, left=left, height=0.6, color=_COLOURS[number % len(_COLOURS)], label=kind)
        for name, by_kind in models.items():
            totals[name] += by_kind.get(kind, 0)
    axes.invert_yaxis()
    axes.set_xlabel("weights, MB")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def perplexity_against_bytes(points: Sequence[Point]) -> "Figure":
    """A mark a model; whiskers are a standard error of the difference from the first."""
    figure, axes = _figure(7.6, height=3.4 + 0.2 * len(points), grid="both")
    for number, point in enumerate(points):
        marker, colour = _MARKERS[number % len(_MARKERS)], _COLOURS[number % len(_COLOURS)]
        axes.errorbar(
            point.megabytes, point.perplexity, point.standard_error, fmt=marker, color=colour, markersize=7, capsize=3, label=point.name
        )
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    _logarithmic_where_wide(axes, [point.perplexity for point in points])
    axes.set(xlabel="weights on disk, MB", ylabel="perplexity")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """As SVG; the same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.name}):  # else the names inside are drawn by chance
        figure.savefig(path, format="svg", metadata={"Date": None})


def _figure(width: float, height: float = 3.2, grid: str = "y") -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure  # half a second, for pictures alone

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dde1e4", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    return figure, axes


def _logarithmic_where_wide(axes: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(values) < 0.5 * max(values):
        axes.set_ylim(bottom=0)
