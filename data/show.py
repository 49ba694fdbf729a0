"""Show what a rank read at a step, document by document: python data/show.py prepared/ --step 100 --rank 0, or --run runs/x --step 100"""

from collections.abc import Sequence

from data.command_line import run_script
from data.sampling.show_settings import read_show_settings


def main(arguments: Sequence[str]) -> None:
    """Read the settings and print the samples."""
    settings = read_show_settings(arguments)
    from data.sampling import showing  # the body: torch and the tokenizers, which --help does not need

    for line in showing.show(settings):
        print(line)


if __name__ == "__main__":
    run_script(main)
