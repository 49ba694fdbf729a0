"""Compare the nodes of a run, and train nothing: deepspeed --hostfile hosts launch/preflight.py [what launch/pretrain.py takes]"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from data.command_line import run_script
from launch.ranks.stopping import leave
from launch.training.settings import read_run_settings


def main(arguments: Sequence[str]) -> int:
    settings = dataclasses.replace(read_run_settings(arguments), dry_run=False)  # nothing is trained in any case
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in launch/pretrain.py

    from launch.ranks.rendezvous import sentence_of_loss
    from launch.training.setup import get_ready

    try:
        ready = get_ready(settings, arguments, preflight_alone=True)
    except RuntimeError as error:
        if (sentence := sentence_of_loss(error, settings.communication_timeout)) is None:
            raise
        print(sentence, file=sys.stderr)
        return 1
    if ready.process.is_first:
        print(f"The {ready.process.world_size} rank(s) agree.")
    return 0


if __name__ == "__main__":
    run_script(main, leave)
