"""Arguments that launchers add to a command line."""

from collections.abc import Sequence


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --local_rank=N (torch's older launcher: --local-rank=N), which the environment contains too."""
    remaining, kept = list(arguments), []
    while remaining:
        argument = remaining.pop(0)
        if argument in ("--local_rank", "--local-rank"):
            del remaining[:1]
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept
