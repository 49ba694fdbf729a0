"""Measure how fast a decoder generates, next to transformers and llama.cpp: python launch/benchmarks/generation.py [--model runs/demo]

Every contender generates one token at a time after a short prompt, in this process, with as many threads as torch uses, in rounds one
after the other. The first round is the warm-up and does not count. All keep freed memory. What differs is the precision of the weights,
which is in each row's name. A ratio is a ratio of medians.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks.settings import GenerationSettings


def main(arguments: Sequence[str]) -> int:
    """Print the table of tokens per second. Return the exit status."""
    description = "Measure how fast a decoder generates, next to transformers and llama.cpp."
    settings = read_settings(GenerationSettings, arguments, description)
    from launch.benchmarks import generation_engines  # torch and transformers take seconds, which --help does not need

    return generation_engines.measure(settings)


if __name__ == "__main__":
    run_script(main)
