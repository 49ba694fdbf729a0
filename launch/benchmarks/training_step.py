"""Measure the training step on this CPU, next to that of transformers and to its bare matrix products.

    python launch/benchmarks/training_step.py

Every contender runs in its own process, one after the other, in several rounds. A share is a ratio of medians within one run.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks import training_step_rounds
from launch.benchmarks.settings import TrainingStepSettings, chosen

CONTENDERS = (
    "bare products",
    "transformers eager",
    "transformers compiled",
    "ours plain eager",
    "ours plain compiled",
    "ours ZeRO-1 eager",
    "ours ZeRO-1 compiled",
    "ours ZeRO-1 eager, two ranks",
    "ours ZeRO-2 eager, two ranks",
    "ours ZeRO-3 eager, two ranks",
    "pipeline, two ranks",
    "pipeline DualPipeV, two ranks",
    "tensor parallel, two ranks",
    "sequence parallel, two ranks",
)
"""Names of the contenders, in the order of the table."""


def main(arguments: Sequence[str]) -> int:
    """Print the table of seconds and tokens per second. Return the exit status."""
    settings = read_settings(TrainingStepSettings, arguments, "Measure the training step next to other implementations.")
    names = chosen("contender", CONTENDERS, settings.only)
    if settings.contender:
        chosen("contender", CONTENDERS, [settings.contender])
        from launch.benchmarks import training_step_contenders  # torch, transformers and DeepSpeed, which --help does not need

        return training_step_contenders.measure(settings.contender, settings)
    return training_step_rounds.run(names, settings, arguments)


if __name__ == "__main__":
    run_script(main)
