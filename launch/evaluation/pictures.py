"""Pictures of models: perplexity against size, and the pieces that other pictures are made of."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# The palette of Okabe and Ito, whose colours people with colour blindness can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_WIDE_RANGE = 8  # largest / smallest value from which an axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Point:
    """One model in a picture of several."""

    name: str
    megabytes: float
    """Size of the weights on disk, MB."""
    perplexity: float
    """Perplexity per token."""
    standard_error: float
    """Standard error of the difference from the first model's perplexity."""


def perplexity_against_bytes(points: Sequence[Point]) -> Figure:
    """Return a picture with one mark for each model; whiskers show one standard error of the difference from the first model."""
    figure, axes = new_figure(7.6, height=3.4 + 0.2 * len(points), grid="both")
    for index, point in enumerate(points):
        marker, colour = _MARKERS[index % len(_MARKERS)], COLOURS[index % len(COLOURS)]
        axes.errorbar(
            point.megabytes, point.perplexity, point.standard_error, fmt=marker, color=colour, markersize=7, capsize=3, label=point.name
        )
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    use_logarithm_for_wide_range(axes, [point.perplexity for point in points])
    axes.set(xlabel="weights on disk, MB", ylabel="perplexity")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": path.name}):  # otherwise the identifiers inside are random
        figure.savefig(path, format="svg", metadata={"Date": None})


def new_figure(width: float, height: float = 3.2, grid: str = "y") -> tuple[Figure, Axes]:
    """Return an empty figure of the given size in inches with one plot, without frame lines at the top and the right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    style(axes, grid)
    return figure, axes


def style(axes: Axes, grid: str) -> None:
    """Give a plot the style of all pictures: a pale grid and no frame lines at the top and the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dde1e4", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def use_logarithm_for_wide_range(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic where the values span a wide range, and let it begin at 0 where they span a moderate one."""
    if min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(values) < 0.5 * max(values):
        axes.set_ylim(bottom=0)
