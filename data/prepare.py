"""Prepare text for training: python data/prepare.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output prepared/"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from data.preparation.settings import PrepareSettings


def main(arguments: Sequence[str]) -> int:
    """Read the settings, prepare the folder and return the exit status."""
    description = (
        "Read a corpus, tokenize it and write token shards. Without --input and --dataset, the text is the source code of "
        "Python's standard library. Without --tokenizer, a tokenizer is trained on the text. To resume a command that was stopped or "
        "killed, give it again. On several nodes, start it on each node with its own --rank (srun sets it)."
    )
    settings = read_settings(PrepareSettings, arguments, description)
    from data.preparation import driver  # the body: numpy and the tokenizers, which --help does not need

    return driver.run(settings)


if __name__ == "__main__":
    run_script(main)
