"""Export a model for other software: python launch/export.py runs/demo --output exported/demo [--format gguf --type q4_0]"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.compressing.settings import ExportSettings


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    description = (
        "Write a model in the format of Hugging Face's transformers or of llama.cpp, and compare its logits with ours. Memory: three times "
        "the largest weight while writing; the whole model in float32, in transformers, while comparing."
    )
    settings = read_settings(ExportSettings, arguments, description, positional="model")
    from launch.compressing import exporting  # imports torch, which takes seconds that --help does not need

    return exporting.export(settings)


if __name__ == "__main__":
    run_script(main)
