"""Rewrite a checkpoint of any layout in a few files of whole parameters: python launch/convert.py runs/demo --output runs/demo-whole

Resuming needs no conversion, because every layout reads every checkpoint. Convert a checkpoint of a thousand ranks that is to be kept,
copied elsewhere or read often: a few files take the place of a thousand, and hold the same numbers bit for bit.

One state (the weight or an optimizer state) of one parameter is in memory at a time; where tensor parallelism split it, two more copies
of it while it is put together. In addition, pages of the files that are read are mapped: those of the parameter, or 8 MiB for each file.
Measured on a checkpoint of 0.98 GB from 8 ranks, whose largest parameter has 13 MB of each state: 94 MB more than the 224 MB of Python
with torch.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from data.command_line import read_settings, run_script
from launch.checkpoints.settings import ConvertSettings


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    description = (
        "Rewrite a checkpoint in a few files of whole parameters. Memory: at most twice the largest parameter in float32 "
        "(four times if tensor parallelism split it), 8 MiB for each file that is read, and 0.25 GB for Python."
    )
    settings = read_settings(ConvertSettings, arguments, description, positional="checkpoint")
    from launch.checkpoints import conversion  # imports torch, which takes a second that --help does not need

    done = conversion.convert(
        Path(settings.checkpoint), Path(settings.output), settings.file_gib * 2**30, functools.partial(print, flush=True)
    )
    print(conversion.report(done))
    return 0


if __name__ == "__main__":
    run_script(main)
