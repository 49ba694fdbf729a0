"""Evaluate a model on held-out text: python launch/evaluate.py runs/demo [--data prepared]"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.evaluation.settings import EvaluateSettings


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    settings = read_settings(EvaluateSettings, arguments, "Evaluate a model on held-out text.", positional="model")
    from launch.evaluation import evaluating  # imports torch, which takes seconds that --help does not need

    return evaluating.print_evaluation(settings)


if __name__ == "__main__":
    run_script(main)
