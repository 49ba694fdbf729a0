"""Files and folders as a crash, a full disk or a second process leaves them: always whole."""

import fcntl
import sys
from pathlib import Path
from typing import BinaryIO


def nearest_existing(path: Path) -> Path:
    """Return `path` if it exists, else its nearest parent that does."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def try_to_lock(file: BinaryIO, folder: Path, second: str) -> bool:
    """Lock an open file of `folder` until it is closed. Return False where another process holds the lock.

    Some network disks do not support locks: then a warning is printed that no second `second` may run.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): see to it that no second {second}.", file=sys.stderr)
    return True
