"""Compare optimizers at several batch sizes: python launch/benchmarks/optimizers.py [--optimizers adamw muon] [--batch_sizes 8 64 256]

Every run is an ordinary run of launch/pretrain.py on one process, in a folder of its own: a finished run is not trained again, and one
that was stopped resumes. All runs read the same number of tokens, and warm up for the same share of them.

Every optimizer gets the same selection. At the first batch size it is trained with each of --rates on the first seed; at other batch sizes
the rates are multiplied by the square root of the ratio of the sizes. If the best rate is the lowest or highest one, the next rate
(half or twice) is tried too, until it is neither. Then the best rate is trained on all seeds, and their mean is the result.

Losses are compared as bits per byte of the whole validation split. Seconds per step are measured apart from these runs, on an idle
machine, by --timing true: all optimizers in turn. .readme/optimizers_picture.py draws the curves.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks.optimizer_comparison import compare
from launch.benchmarks.settings import OptimizersSettings


def main(arguments: Sequence[str]) -> int:
    """Train what is missing and print the table. Return the exit status."""
    settings = read_settings(OptimizersSettings, arguments, "Compare optimizers at several batch sizes.")
    return compare(settings)


if __name__ == "__main__":
    run_script(main)
