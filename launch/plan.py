"""Plan a run: python launch/plan.py --size llama3-8b --tokens 1e12 --gpus 64 --device h100 [--price 2.5] [options of launch/pretrain.py]"""

import os
from collections.abc import Sequence

from data.command_line import run_script
from launch.training.planning.settings import read_plan_settings


def main(arguments: Sequence[str]) -> int:
    """Print the plan that the command line asks for and return the exit status."""
    settings = read_plan_settings(arguments)
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed only checks its JSON here
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

    # Torch and DeepSpeed are imported only now, so that --help and mistakes in the settings answer at once.
    from launch.training.planning.report import report

    print(report(settings, arguments))
    return 0


if __name__ == "__main__":
    run_script(main)
