"""Compare several models on the same held-out text: python launch/compare.py runs/demo pruned quantized [--data prepared]"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.evaluation.settings import CompareSettings


def read_compare_settings(arguments: Sequence[str]) -> CompareSettings:
    """Read the settings from a command line; arguments before the first option are models."""
    starts_with_models = arguments and not arguments[0].startswith("--")
    description = (
        "Compare several models on the same held-out text: size, perplexity, and difference from the first model. Memory: two models in "
        "float32."
    )
    return read_settings(CompareSettings, ["--models", *arguments] if starts_with_models else arguments, description)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    settings = read_compare_settings(arguments)
    from launch.evaluation import comparing  # imports torch, which takes seconds that --help does not need

    return comparing.print_comparison(settings)


if __name__ == "__main__":
    run_script(main)
