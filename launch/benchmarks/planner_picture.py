"""The picture of launch/benchmarks/planner.py: predicted against published values."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from launch.benchmarks.planner_fits import Check
from launch.evaluation.pictures import COLOURS, style

_PANELS = (("seconds a step", "seconds"), ("memory", "memory, GB or GiB"), ("MFU", "MFU"))
"""Part of a comparison's name, and the title of the panel that shows it."""


def draw(checks: Sequence[Check]) -> Figure:
    """Return the picture: a panel for each quantity, a mark for each run that was not fitted, and lines at 10 % above and below."""
    figure = Figure(figsize=(11.4, 4.0), layout="constrained")
    for axes, (part, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        shown = [check for check in checks if part in check.name]
        style(axes, "both")
        for index, check in enumerate(shown):
            points = [(x, y) for x, y, seen in zip(check.published, check.predicted, check.is_fitted, strict=True) if not seen]
            label = check.name.replace(f", {part}", "").replace(" of ", " ").replace("MFU (not fitted)", "").strip(", ")
            axes.scatter(*zip(*points, strict=True), s=14, color=COLOURS[index % len(COLOURS)], alpha=0.75, linewidths=0, label=label)
        _finish(axes, [value for check in shown for value in check.published], title)
    return figure


def _finish(axes: Axes, values: Sequence[float], title: str) -> None:
    """Draw the line of equal values with its band, and name the axes."""
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="published", ylabel="predicted")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.plot([low, high], [low, high], color="#888888", linewidth=1)
    for factor in (0.9, 1.1):
        axes.plot([low, high], [factor * low, factor * high], color="#bbbbbb", linewidth=0.8, linestyle="--")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
