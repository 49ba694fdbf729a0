"""Search for the best settings of a training run: python launch/search.py SEARCH.yaml [--workers 2]"""

from collections.abc import Sequence

from data.command_line import run_script
from launch.searching.settings import read_search_settings


def main(arguments: Sequence[str]) -> int:
    """Work on the search until it is done; return the exit status."""
    settings = read_search_settings(arguments)
    from launch.searching.driver import run_search  # imports Optuna and matplotlib, which --help does not need

    return run_search(settings)


if __name__ == "__main__":
    run_script(main)
