"""Writing files and folders that a crash, a full disk or a second process cannot leave half written.

Everything is written under a temporary name, flushed to the disk and then renamed, so a final name always stands for whole contents.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.command_line import INTERRUPTED, UserError

_LONGEST_NAME = 240
"""Bytes of a name for an output. Disks allow 255, of which temporary names need some."""


def publish_file(temporary: BinaryIO | Path, path: str | Path, sync_folder: bool = True) -> None:
    """Flush a temporary file (open for writing, then it is closed; or a path) to the disk, and rename it to `path`.

    With `sync_folder` the new name is on the disk too when this returns; of several files of a folder only the last needs it.
    """
    if isinstance(temporary, Path):
        sync_to_disk(temporary)
        name = str(temporary)
    else:
        temporary.flush()
        os.fsync(temporary.fileno())
        temporary.close()
        name = temporary.name
    os.replace(name, path)
    if sync_folder:
        sync_to_disk(Path(path).parent)


def publish_folder(temporary: Path, path: Path, sync_contents: bool = True) -> None:
    """Flush a folder with all it contains to the disk, and rename it to `path`. `sync_contents=False`: the contents are flushed already."""
    for inside in [*temporary.rglob("*"), temporary] if sync_contents else []:
        sync_to_disk(inside)
    os.rename(temporary, path)
    sync_to_disk(path.absolute().parent)


@contextlib.contextmanager
def complete_after_ctrl_c(temporary: Path, path: Path) -> Iterator[None]:
    """Publish a file or folder in this block: a Ctrl-C that comes after it was renamed says that `path` is complete."""
    try:
        yield
    except KeyboardInterrupt:
        if temporary.exists():
            raise
        raise KeyboardInterrupt(f"{INTERRUPTED} {path} is complete.") from None


def write_file(path: Path, contents: str | bytes, temporary: Path | None = None) -> None:
    """Create or replace a small file (text is written as UTF-8); after a failure the old one is still there.

    `temporary` (default: `path` with ".tmp" appended) must be unique if several processes may write the same file. It is removed after a
    failure. An OSError names `path`.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            publish_file(file, path)
    except OSError as error:  # that of a full disk names no file
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Path of a temporary file with the same name in a hidden folder next to `path`; it is published when the block ends.

    The hidden folder is removed, also after an error. Raises UserError if `path` exists by then, or for a full disk and the like.
    """
    with disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder / path.name
            _refuse_existing(path)
            with complete_after_ctrl_c(folder / path.name, path):
                publish_file(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Temporary folder that is published as `path` when the block ends, and removed after an error.

    `temporary` is its path (default: a hidden folder next to `path`). Raises UserError if `path` exists, before or by then, or for a full
    disk and the like.
    """
    _refuse_existing(path)
    with disk_errors_named(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary is None:
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            temporary.chmod(0o755)  # mkdtemp's own permissions are for its owner alone
        else:
            temporary.mkdir()
        try:
            yield temporary
            _refuse_existing(path)
            with complete_after_ctrl_c(temporary, path):
                publish_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(path: Path, wait_seconds: float = 0, warning: str | None = None) -> BinaryIO | None:
    """Create and lock a file; the lock ends when the returned file is closed, or with the process.

    Returns None if another process still holds the lock after `wait_seconds`. Some network disks do not support locks: then OSError is
    raised or, where a `warning` is given, it is printed and the file is returned without a lock.
    """
    file: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by the caller
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            time.sleep(0.1)
        except OSError as error:
            if warning is None:
                file.close()
                raise
            print(f"{path.parent} cannot be locked ({error.strerror}). {warning}", file=sys.stderr)
            return file


def nearest_existing(path: Path) -> Path:
    """Return `path` if it exists (a link to nothing does), else its nearest parent that does."""
    return next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))


def output_complaint(output: str | Path) -> str | None:
    """Return why a new file or folder cannot be created as --output, or None. Scripts ask before any work."""
    if not os.fspath(output):
        return "--output is empty. Give the path of a new file or folder."
    if os.path.lexists(output):
        return f"--output {output} already exists; nothing is overwritten. Give another name."
    return parent_complaint(output)


def parent_complaint(output: str | Path) -> str | None:
    """Return why nothing can be created next to --output, or None: its folder, or the nearest one that exists, cannot be written."""
    parent = nearest_existing(Path(output).absolute().parent)
    if not parent.is_dir():
        kind = "a file, not a folder" if parent.exists() else "a link to a folder that does not exist"
        return f"--output {output}: {parent} is {kind}. Give another path."
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"--output {output}: the folder {parent} is not writable. Give another path."
    if too_long := next((part for part in Path(output).parts if len(os.fsencode(part)) > _LONGEST_NAME), None):
        return f"--output: the name {too_long[:40]}... has {len(os.fsencode(too_long))} bytes; {_LONGEST_NAME} are allowed."
    return None


def refuse_full_disk(output: Path, needed_bytes: float) -> None:
    """Raise UserError if the disk of --output has less free space than needed."""
    existing = nearest_existing(output.absolute().parent)
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"The disk of {existing} has {_size_text(free)} free; --output {output} needs {_size_text(needed_bytes)}. Give a folder on "
            "another disk."
        )


def _size_text(num_bytes: float) -> str:
    """Return a number of bytes with the largest unit of which it has at least one."""
    for unit, factor in {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}.items():
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


@contextlib.contextmanager
def disk_errors_named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Raise errors of the operating system (a full disk, missing permission) as UserError that names what is written.

    What is written is `path`, its hidden temporary files, and `temporary`. Errors of other files, of a closed pipe, and of a library,
    which have no number, remain as they are.
    """
    try:
        yield
    except OSError as error:
        of_another_file = isinstance(error.filename, str) and not _is_part_of(error.filename, path, temporary)
        if error.errno is None or isinstance(error, BrokenPipeError) or of_another_file:
            raise
        raise UserError(f"{path} could not be written: {error.strerror}.") from error


def _is_part_of(name: str, path: Path, temporary: Path | None) -> bool:
    """Return True for `path`, its temporary files, all below them, and the folders above it."""
    one, path = Path(name).absolute(), path.absolute()
    if path.is_relative_to(one) or one.is_relative_to(path) or (temporary is not None and one.is_relative_to(temporary.absolute())):
        return True
    return one.is_relative_to(path.parent) and one.relative_to(path.parent).parts[0].startswith(f".{path.name}.")


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; nothing is overwritten.")
