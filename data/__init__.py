"""From text to token shards, and from shards to samples. Every script imports this package first."""

import signal
import sys
import threading
from types import FrameType, TracebackType

_previous_hook = sys.excepthook  # another one than Python's in IPython and in debuggers
_previous_unraisable_hook = sys.unraisablehook
_ctrl_c_came = False


def ctrl_c_came() -> bool:
    """Tell whether Ctrl-C was pressed, also where a library caught it and fails later because its import did not finish."""
    return _ctrl_c_came


def _note_ctrl_c(number: int, frame: FrameType | None) -> None:
    global _ctrl_c_came
    _ctrl_c_came = True
    raise KeyboardInterrupt


def _end_without_traceback_after_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replace Python's traceback after Ctrl-C while a script still imports its modules; run_script handles it later."""
    is_ctrl_c = issubclass(kind, KeyboardInterrupt)
    if not is_ctrl_c and not _ctrl_c_came:
        _previous_hook(kind, error, trace)
        return
    print("Interrupted.", file=sys.stderr)
    if not is_ctrl_c:  # after a KeyboardInterrupt Python itself ends as killed by Ctrl-C
        sys.exit(128 + signal.SIGINT)


def _repeat_lost_ctrl_c(lost: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that came in a callback of the garbage collector or of an import lock, where Python cannot raise it.

    A timer repeats it: raised here, still inside the callback, it would be lost again.
    """
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        _previous_unraisable_hook(lost)
        return
    repeat = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    repeat.daemon = True
    repeat.start()


sys.excepthook = _end_without_traceback_after_ctrl_c
sys.unraisablehook = _repeat_lost_ctrl_c
_has_own_ctrl_c = hasattr(sys, "ps1") or signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # such as a Python prompt
if not _has_own_ctrl_c and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _note_ctrl_c)
