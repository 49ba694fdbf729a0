"""How a rank stops: signals that request it, and the end of the process."""

import contextlib
import os
import signal
import sys
from typing import NoReturn

SAVED_AND_UNFINISHED = 85
"""Exit status of a run that was asked to stop: it saved a checkpoint, and the same command resumes it."""
NOT_TO_BE_REQUEUED = 93
"""Exit status of a run that would fail again if it were started again."""


class StopRequest:
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP request a stop after the current step; a second SIGINT ends the process at once.

    Created before anything slow: if a signal ended one rank during start-up, the start of all others would fail too.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """Name of the signal that requested a stop; None if there was none."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # not an exception: it would not reach a rank that waits in a collective


def exit_now(status: int) -> NoReturn:
    """End this process without Python's clean-up, which joins threads of C++ libraries and sometimes aborts or hangs there."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
