"""Measure pruning and quantization next to llm-compressor.

    python launch/benchmarks/pruning_and_quantization.py --peer_python peers/bin/python

    python -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install llmcompressor==0.14.0.1

Both start from one model, one calibration text and the same settings; the outputs of both are measured by launch/evaluate.py.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks.settings import CompressionSettings, chosen, refuse_missing_python

PARTS = ("methods", "large", "generation")
"""Names of the parts, in their order."""


def main(arguments: Sequence[str]) -> int:
    """Print the tables. Return the exit status."""
    settings = read_settings(CompressionSettings, arguments, "Measure pruning and quantization next to llm-compressor.")
    names = chosen("part", PARTS, settings.only)
    refuse_missing_python(settings.peer_python)
    from launch.benchmarks import compression_parts  # torch and transformers, which --help does not need

    return compression_parts.measure(names, settings)


if __name__ == "__main__":
    run_script(main)
