"""From text to token shards, and from shards to samples. Every script imports this package first."""

import sys
from types import TracebackType


def _end_without_traceback_after_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace Python's traceback after Ctrl-C while a script still imports its modules; run_script handles it later."""
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end_without_traceback_after_ctrl_c
