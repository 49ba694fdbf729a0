"""Train: deepspeed launch/pretrain.py --deepspeed ds_configs/zero3.json [--config RECIPE] [--data PREPARED] [--output RUN]"""

import os
from collections.abc import Sequence

from data.command_line import run_script
from launch.ranks.stopping import StopRequest, exit_now
from launch.training.recipe import read_run_settings


def main(arguments: Sequence[str]) -> int:
    """Train the run that the command line describes and return its exit status."""
    settings = read_run_settings(arguments)
    stop = StopRequest()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when imported, else it warns of each host without a reverse name
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

    # Torch and DeepSpeed are imported only now, so that --help and mistakes in the settings answer at once.
    from launch.ranks.processes import device_name

    device_name()  # DeepSpeed reads the device from the environment when it is imported
    from launch.training.assembly import pretrain

    return pretrain(settings, arguments, stop)


if __name__ == "__main__":
    run_script(main, exit_now)
