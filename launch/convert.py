"""Rewrite a checkpoint of any layout in a few files of whole parameters: python launch/convert.py runs/demo --output runs/demo-whole

A start needs no conversion, for every layout reads every checkpoint. It is for the checkpoint of a thousand ranks that is to be kept,
copied elsewhere or read often: a thousand files of pieces become a handful, which hold the same numbers bit for bit.

Of the state, one kind (weight or one of AdamW's moments) of one parameter is in memory at a time; where tensor parallelism cut it, two
more copies of that while it is put together. Beside it lie mapped pages of the files that are read: that parameter's, or 8 MiB a file.
Measured on 0.98 GB of 8 ranks, whose largest parameter has 13 MB of each kind: 94 MB more than the 224 MB of Python with torch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError, read_settings, run_door


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    checkpoint: str
    """Run folder (its newest whole checkpoint is taken), or a checkpoint in one."""
    output: str
    """New run folder, not there yet or empty. The run goes on in it with its own settings, this --output and --resume, in any layout;
    every other door reads it. Curves and log stay with the original."""
    file_gib: float = 4.0
    """Largest file, GiB; a parameter with more than that has a file of its own."""


def main(arguments: Sequence[str]) -> int:
    description = (
        "Rewrite a checkpoint in a few files of whole parameters. Memory: at most twice the largest parameter in float32 "
        "(four times where tensor parallelism cut it), 8 MiB for each file that is read, and 0.25 GB for Python."
    )
    settings = read_settings(ConvertSettings, arguments, description, positional="checkpoint")
    if not settings.file_gib > 0:
        raise UserError(f"--file_gib {settings.file_gib} must be above 0.")

    from launch.checkpoints.conversion import convert
    from launch.ranks.processes import peak_memory_bytes

    done = convert(Path(settings.checkpoint), Path(settings.output), settings.file_gib * 2**30, functools.partial(print, flush=True))
    print(
        f"{done.source} -> {done.checkpoint}: {done.files_before:,} files -> {done.files:,}, {done.bytes:,} bytes, {done.seconds:.1f} s, "
        f"{done.bytes / done.seconds / 1e6:,.0f} MB/s, peak memory {peak_memory_bytes() / 1e6:,.0f} MB"
    )
    return 0


if __name__ == "__main__":
    run_door(main)
