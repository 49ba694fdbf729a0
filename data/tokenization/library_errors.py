"""Errors of the tokenizer libraries as messages."""

import contextlib
from collections.abc import Callable, Iterator

from data.command_line import UserError


def is_library_error(error: BaseException) -> bool:
    """Return True for an error of a tokenizer library, False for one that the text did not cause: Ctrl-C, no memory, a disk, ourselves.

    tokenizers, tiktoken and gigatoken are written in Rust. Its panics become `pyo3_runtime.PanicException`, which is not an Exception, so
    that `except Exception` misses it; each library has its own class of this name, and none can be imported.
    """
    if isinstance(error, Exception):
        return not isinstance(error, UserError | MemoryError | OSError | AssertionError)
    return type(error).__module__ == "pyo3_runtime"


@contextlib.contextmanager
def library_errors_as(describe: Callable[[str], UserError]) -> Iterator[None]:
    """Raise `describe(reason)` in place of an error of a tokenizer library."""
    try:
        yield
    except BaseException as error:
        if not is_library_error(error):
            raise
        reason = (str(error) or type(error).__name__).partition("\n")[0].removesuffix(".")
        raise describe(reason) from error
