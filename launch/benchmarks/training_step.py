"""Measure the training step on this CPU, next to that of transformers and to its bare matrix products.

    python launch/benchmarks/training_step.py

Every contender runs in its own process, one after the other, in several rounds. All use the same number of threads, keep freed memory,
run two warm-up steps and update float32 weights with the same optimizer, unless their name has another one; CONTENDERS names what
else differs. A share is a ratio of medians within one run.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks import training_step_rounds
from launch.benchmarks.settings import TrainingStepSettings, chosen

_BF16 = "bf16, float32 masters"
CONTENDERS = {
    "bare products": "bf16",
    "transformers eager": _BF16,
    "transformers compiled": _BF16,
    "transformers autocast, eager": "float32, bf16 products",
    "transformers autocast, compiled": "float32, bf16 products",
    "ours plain eager": _BF16,
    "ours plain compiled": _BF16,
    "ours ZeRO-1 eager": _BF16,
    "ours ZeRO-1 compiled": _BF16,
    "ours ZeRO-1 eager, muon": _BF16,
    "ours ZeRO-1 eager, lamb": _BF16,
    "ours ZeRO-1 eager, lars": _BF16,
    "ours ZeRO-1 eager, sgd": _BF16,
    "ours ZeRO-1 eager, lion": _BF16,
    "ours ZeRO-1 eager, muon in bf16": _BF16,
    "ours ZeRO-1 eager, noise scale": _BF16,
    "ours ZeRO-1 eager, two ranks": _BF16,
    "ours ZeRO-2 eager, two ranks": _BF16,
    "ours ZeRO-3 eager, two ranks": _BF16,
    "pipeline, two ranks": _BF16,
    "pipeline DualPipeV, two ranks": _BF16,
    "tensor parallel, two ranks": _BF16,
    "sequence parallel, two ranks": _BF16,
}
"""Contenders in the order of the table, each with the precision of its weights and of the activations between its blocks."""


def main(arguments: Sequence[str]) -> int:
    """Print the table of seconds and tokens per second. Return the exit status."""
    settings = read_settings(TrainingStepSettings, arguments, "Measure the training step next to other implementations.")
    names = chosen("contender", list(CONTENDERS), settings.only)
    if settings.contender:
        chosen("contender", list(CONTENDERS), [settings.contender])
        from launch.benchmarks import training_step_contenders  # torch, transformers and DeepSpeed, which --help does not need

        return training_step_contenders.measure(settings.contender, settings)
    return training_step_rounds.run({name: CONTENDERS[name] for name in names}, settings, arguments)


if __name__ == "__main__":
    run_script(main)
