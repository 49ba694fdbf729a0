"""Prune a model: python launch/prune.py runs/demo --method wanda --sparsity 2:4 --output pruned/demo"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.compressing.settings import PruneSettings
from launch.ranks.stopping import exit_now


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    description = (
        "Prune a model and write a folder that transformers loads, with a report of what it cost. Masks keep the model's size; structured "
        "pruning makes it smaller. launch/pretrain.py --init trains the result further. One block is in memory at a time. Under deepspeed, "
        "torchrun or srun, samples and matrices are distributed over the ranks. A run that was stopped resumes with the same command."
    )
    settings = read_settings(PruneSettings, arguments, description, positional="model")
    from launch.compressing import pruning  # imports torch, which takes seconds that --help does not need

    return pruning.prune(settings, arguments)


if __name__ == "__main__":
    run_script(main, exit_now)
