"""Quantize a model: python launch/quantize.py runs/demo --method gptq --bits 4 --group_size 128 --output quantized/demo"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.compressing.settings import QuantizeSettings
from launch.ranks.stopping import exit_now


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    description = (
        "Quantize the matrices of a model's blocks and write a folder that transformers and vLLM load, with a report of what it cost. One "
        "block is in memory at a time. Under deepspeed, torchrun or srun, samples and matrices are distributed over the ranks. A run that "
        "was stopped resumes with the same command."
    )
    settings = read_settings(QuantizeSettings, arguments, description, positional="model")
    from launch.compressing import quantizing  # imports torch, which takes seconds that --help does not need

    return quantizing.quantize(settings, arguments)


if __name__ == "__main__":
    run_script(main, exit_now)
