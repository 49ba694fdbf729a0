"""Draw .readme/optimizers.svg from the runs of launch/benchmarks/optimizers.py: python .readme/optimizers_picture.py [its options]"""

import sys
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from data.command_line import read_settings
from launch.benchmarks.optimizer_comparison import Result, read_results, read_seconds
from launch.benchmarks.optimizer_runs import Runs
from launch.benchmarks.settings import OptimizersSettings
from launch.evaluation.pictures import COLOURS, save, style


def draw(results: Mapping[int, Mapping[str, Result]], tokens_per_sequence: int, seconds: Mapping[tuple[str, int], float]) -> Figure:
    """Return the picture: a column for each batch size; bits per byte against tokens and, where steps were timed, against seconds."""
    timed = all((name, size) in seconds for size, contenders in results.items() for name in contenders)
    figure = Figure(figsize=(3.2 * len(results) + 1.2, 5.6 if timed else 3.2), layout="constrained")
    grid = figure.subplots(2 if timed else 1, len(results), squeeze=False, sharey=True)
    names = list(dict.fromkeys(name for contenders in results.values() for name in contenders))
    for column, (size, contenders) in enumerate(results.items()):
        for row, axes in enumerate(grid[:, column]):
            style(axes, "both")
            for name, result in contenders.items():
                unit = seconds[name, size] if row else size * tokens_per_sequence / 1e6
                steps = list(result.curve)
                colour = COLOURS[names.index(name) % len(COLOURS)]
                axes.plot([step * unit for step in steps], list(result.curve.values()), color=colour, marker="o", markersize=4, label=name)
            axes.set_xlim(left=0)
            axes.set_xlabel("seconds" if row else "tokens, millions")
        grid[0, column].set_title(f"{size * tokens_per_sequence:,} tokens per step", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("bits per byte")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(names), frameon=False)
    return figure


if __name__ == "__main__":
    settings = read_settings(OptimizersSettings, sys.argv[1:], "Draw the comparison of optimizers.")
    runs = Runs(settings)
    picture = draw(read_results(runs, settings), runs.tokens_per_sequence, read_seconds(runs))
    save(picture, Path(__file__).with_name("optimizers.svg"))
