"""Measure preparation and reading of data, next to peers, in one run.

    python launch/benchmarks/preparation.py --peer_python PEERS/bin/python

The peer of data/prepare.py is datatrove's DocumentTokenizer, in an environment of its own (pip install datatrove orjson tokenizers).
The peer of the index and of random access is megatron-core, in our environment. Every contender runs in several rounds, in turn; the best
round of each counts, and the spread and CPU time of all are printed. Scripts are measured from start to end, with one library thread in
each process. What differs: ours also computes checksums and writes a report with pictures.
Only the ratios within one run are meaningful.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks.settings import PreparationSettings, chosen, refuse_missing_python

ROWS = ("sentencepiece", "huggingface", "gigatoken", "start_up", "index", "order", "random_access")
"""Names of the rows, in the order of the table."""


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    settings = read_settings(PreparationSettings, arguments, "Measure preparation and reading of data, next to peers.")
    names = chosen("row", ROWS, settings.only)
    refuse_missing_python(settings.peer_python)
    from launch.benchmarks import preparation_rows  # numpy and tokenizers, which --help does not need

    preparation_rows.measure(names, settings)


if __name__ == "__main__":
    run_script(main)
