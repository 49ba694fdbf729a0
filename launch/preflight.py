"""Compare the ranks of a run without training: deepspeed --hostfile hosts launch/preflight.py [options of launch/pretrain.py]"""

import os
from collections.abc import Sequence

from data.command_line import replace, run_script
from launch.ranks.stopping import exit_now
from launch.training.recipe import read_run_settings


def main(arguments: Sequence[str]) -> int:
    """Compare the ranks of the run that the command line describes and return the exit status."""
    settings = replace(read_run_settings(arguments), dry_run=False)  # nothing is trained in any case
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in launch/pretrain.py
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

    # Torch and DeepSpeed are imported only now, so that --help and mistakes in the settings answer at once.
    from launch.ranks.processes import device_name

    device_name()  # DeepSpeed reads the device from the environment when it is imported
    from launch.training.setup import compare_ranks

    return compare_ranks(settings, arguments)


if __name__ == "__main__":
    run_script(main, exit_now)
