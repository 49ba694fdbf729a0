"""What launchers add to a command line."""

from collections.abc import Sequence


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The launcher adds --local_rank=N (torch's older one --local-rank=N); the environment says it too."""
    words, kept = list(arguments), []
    while words:
        word = words.pop(0)
        if word in ("--local_rank", "--local-rank"):
            del words[:1]
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept
