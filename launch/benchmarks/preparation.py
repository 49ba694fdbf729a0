"""Measure preparation and reading of data, next to peers, in one run.

    python launch/benchmarks/preparation.py --peer_python PEERS/bin/python

The peer of data/prepare.py is datatrove's DocumentTokenizer, in an environment of its own (pip install datatrove orjson tokenizers).
The peer of the index and of random access is megatron-core, in our environment. Every contender runs in several rounds, in turn; the best
round of each counts. Only the ratios within one run are meaningful.
"""

import shutil
from collections.abc import Sequence

from data.command_line import UserError, nearest, read_settings, run_script
from launch.benchmarks.settings import PreparationSettings

ROWS = ("sentencepiece", "huggingface", "gigatoken", "start_up", "index", "order", "random_access")
"""Names of the rows, in the order of the table."""


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    settings = read_settings(PreparationSettings, arguments, "Measure preparation and reading of data, next to peers.")
    for name in settings.only:
        if name not in ROWS:
            raise UserError(f'Unknown row "{name}".{nearest(name, list(ROWS))} Rows: {", ".join(ROWS)}.')
    if settings.peer_python is not None and not shutil.which(settings.peer_python):
        raise UserError(f"--peer_python {settings.peer_python} is not a program.")
    from launch.benchmarks import preparation_rows  # numpy and tokenizers, which --help does not need

    preparation_rows.measure([name for name in ROWS if name in (settings.only or ROWS)], settings)


if __name__ == "__main__":
    run_script(main)
