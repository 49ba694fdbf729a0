"""From text to token shards, and from shards to samples. Every script imports this package first."""

import sys
from types import TracebackType

_previous_hook = sys.excepthook  # another one than Python's in IPython and in debuggers


def _end_without_traceback_after_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace Python's traceback after Ctrl-C while a script still imports its modules; run_script handles it later."""
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        _previous_hook(kind, error, trace)


sys.excepthook = _end_without_traceback_after_ctrl_c
