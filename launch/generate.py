"""Generate text with a model, fill masks or classify: python launch/generate.py runs/demo --prompt "def " """

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.evaluation.settings import GenerateSettings


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    description = "Generate text with a decoder or encoder-decoder; fill masks or classify texts with an encoder."
    settings = read_settings(GenerateSettings, arguments, description, positional="model")
    from launch.evaluation import generating  # imports torch, which takes seconds that --help does not need

    return generating.generate(settings)


if __name__ == "__main__":
    run_script(main)
