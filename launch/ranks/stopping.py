"""How a rank stops: the signals that ask it to, and its last act."""

import contextlib
import os
import signal
import sys
from typing import NoReturn


class StopRequest:
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask to stop after the step in hand; a second SIGINT leaves at once.

    Made before anything slow: a rank that a signal ends while it starts costs the others their start.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # not an exception of ours: a rank inside a collective would not see it


def exit_now(status: int) -> NoReturn:
    """End this process now. Python's own end joins threads of C++ libraries, which now and then abort or hang there."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
