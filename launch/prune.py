"""Prune a model: python launch/prune.py runs/demo --method wanda --sparsity 2:4 --output pruned/demo"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.compressing.settings import PruneSettings
from launch.ranks.stopping import leave


def main(arguments: Sequence[str]) -> int:
    description = (
        "Prune a model, and write a folder that transformers loads, with a report of what it cost. Masks keep the size of the model; "
        "structured pruning gives a smaller one. launch/pretrain.py --init trains either on. One block is in memory at a time; deepspeed, "
        "torchrun and srun spread samples and matrices over ranks; started again, it goes on."
    )
    settings = read_settings(PruneSettings, arguments, description, positional="model")
    settings.refuse_contradictions()
    from launch.compressing import pruning  # seconds that --help does not need

    return pruning.prune(settings, arguments)


if __name__ == "__main__":
    run_script(main, leave)
