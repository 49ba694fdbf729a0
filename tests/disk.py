"""A full disk, for one process."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_larger_files(limit_bytes: int) -> Iterator[None]:
    """Let every write that makes a file larger than this fail, as on a full disk. Only the sentence of the error differs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
