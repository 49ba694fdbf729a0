"""The pictures of a report on compression."""

from collections import defaultdict
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launch.evaluation.pictures import COLOURS, new_figure, use_logarithm_for_wide_range


def errors_over_depth(errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """Return a picture of relative output errors, given by the linear layer's name in its block, then by block."""
    figure, axes = new_figure(7.6)
    for index, (name, by_block) in enumerate(errors.items()):
        blocks, values = zip(*sorted(by_block.items()), strict=True)
        line = "-" if index < len(COLOURS) else "--"
        axes.plot(blocks, values, line, color=COLOURS[index % len(COLOURS)], marker="o", markersize=4, linewidth=1.5, label=name)
    use_logarithm_for_wide_range(axes, [value for by_block in errors.values() for value in by_block.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", ylabel="relative output error")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def sensitivity(divergences: Mapping[int, float]) -> Figure:
    """Return a picture of what compressing one block alone costs, by block: nats per token."""
    figure, axes = new_figure(7.6)
    axes.bar(list(divergences), list(divergences.values()), width=0.8, color=COLOURS[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block, compressed alone", ylabel="KL to the dense model, nats")
    return figure


def sizes(models: Mapping[str, Mapping[str, int]]) -> Figure:
    """Return a picture of the bytes by kind of tensor, for each model by its name."""
    totals: dict[str, int] = defaultdict(int)
    figure, axes = new_figure(7.6, height=0.9 + 0.5 * len(models), grid="x")
    for index, kind in enumerate(dict.fromkeys(kind for by_kind in models.values() for kind in by_kind)):
        width = [by_kind.get(kind, 0) / 1e6 for by_kind in models.values()]
        left = [totals[name] / 1e6 for name in models]
        axes.barh(list(models), width, left=left, height=0.6, color=COLOURS[index % len(COLOURS)], label=kind)
        for name, by_kind in models.items():
            totals[name] += by_kind.get(kind, 0)
    axes.invert_yaxis()
    axes.set_xlabel("weights, MB")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
