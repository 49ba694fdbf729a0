"""What a launcher gives its ranks: arguments that it adds to a command line, and a port at which they connect."""

import contextlib
import random
import socket
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


def free_port() -> int:
    """Return a port of this machine that no program uses, below the range that the kernel gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(15000, 30000), 50):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise OSError("No free port between 15000 and 30000.")
