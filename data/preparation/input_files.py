"""The input files that --input names, in a fixed order: files, folders, glob patterns and standard input."""

import dataclasses
import glob
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.command_line import UserError
from data.files import publish_file, sha256_of
from data.preparation.compressed import COMPRESSED, is_compressed
from data.preparation.fields import FORMATS, is_known
from data.preparation.settings import STANDARD_INPUT


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: Path
    name: str
    """Its path inside the input, the same on every machine."""
    input_name: str
    """The input that it belongs to, as the person gave it."""
    size: int
    """Size in bytes, compressed if the file is."""
    stamp: str
    """A text that changes with the content: the time of the last write or, for standard input, a hash."""

    @property
    def is_compressed(self) -> bool:
        """True if the name ends in a compression suffix."""
        return is_compressed(self.path)

    def with_current_stamp(self) -> "SourceFile":
        """Return the same file with the size and time that it has now; a token file has those of both its files."""
        paths = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".idx" else [])]
        try:
            stats = [path.stat() for path in paths]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
        stamp = " ".join(str(stat.st_mtime_ns) for stat in stats)
        return dataclasses.replace(self, size=sum(stat.st_size for stat in stats), stamp=stamp)


def find_files(inputs: Sequence[str], any_name: bool = False, excluded_folders: Sequence[Path] = ()) -> tuple[list[SourceFile], list[str]]:
    """Return the files that inputs name, each once, sorted within each input, and the names of files that are skipped.

    Of a folder, only files with a known suffix are read, or all files if `any_name`. Raise UserError if an input has no file.
    """
    files: dict[Path, SourceFile] = {}
    skipped: list[str] = []
    excluded = [folder.resolve() for folder in excluded_folders]
    for name in inputs:
        root, paths, skipped_here = _files_of_input(name, any_name)
        skipped += skipped_here
        for path in sorted(paths):
            resolved = path.resolve()
            if not any(folder in resolved.parents for folder in excluded):
                file = SourceFile(path, path_as_text(path.relative_to(root)), path_as_text(Path(name)), 0, "")
                files.setdefault(resolved, file.with_current_stamp())
    counts = Counter(file.name for file in files.values())
    named = [dataclasses.replace(file, name=path_as_text(file.path)) if counts[file.name] > 1 else file for file in files.values()]
    return named, skipped


def _files_of_input(name: str, any_name: bool) -> tuple[Path, list[Path], list[str]]:
    """Return (root that names are relative to, files to read, names of skipped files) of one input."""
    if not name:
        raise UserError('--input "" is empty. Give a file, folder or pattern (is a shell variable empty?).')
    path = Path(name)
    skipped: list[str] = []
    if path.is_dir():
        root, below = path, set(_files_below(path))
        found = [file for file in below if any_name or is_known(file)]
        skipped = [path_as_text(file) for file in sorted(below) if not (any_name or is_known(file) or file.with_suffix(".idx") in below)]
    elif path.exists():
        root, found = path.parent, [path]
    else:
        root, found = _glob_root(name), [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()]
    found = [file.with_suffix(".idx") if file.suffix == ".bin" and file.with_suffix(".idx").exists() else file for file in found]
    if not found:
        suffixes = f"no {', '.join(FORMATS)} file in this folder, plain or {', '.join(COMPRESSED)}."
        raise UserError(f"--input {name}: {suffixes if path.is_dir() else 'no such file.'}")
    return root, found, skipped


def _files_below(folder: Path) -> Iterator[Path]:
    def _refuse(error: OSError) -> None:
        raise UserError(f"--input {folder}: {error.filename} cannot be read: {error.strerror}.") from error

    for parent, _, names in os.walk(folder, onerror=_refuse, followlinks=False):
        yield from (path for name in names if (path := Path(parent, name)).is_file())


def _glob_root(pattern: str) -> Path:
    """Return the folder that a pattern starts from: its leading parts without wildcards."""
    parts = Path(pattern).parts
    first_wildcard = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:first_wildcard])


def path_as_text(path: Path) -> str:
    """Return a path as text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def store_standard_input(folder: Path | None) -> SourceFile:
    """Store standard input as a file in a folder, so that it can be read in parts, and again after a crash. None: only hash it.

    If the file exists already, standard input is compared with it: raise UserError if it differs.
    """
    digest, size = hashlib.sha256(), 0
    path = (folder or Path()) / "standard-input"
    incomplete = path.with_suffix(".incomplete")
    with open(incomplete if folder else os.devnull, "wb") as file:
        while piece := sys.stdin.buffer.read(1 << 20):
            digest.update(piece)
            size += file.write(piece)
    if folder and path.exists():
        incomplete.unlink()
        if sha256_of(path) != digest.hexdigest():
            raise UserError(f"Standard input is not the same as when {folder} was started. Give the same again, or another --output.")
    elif folder:
        publish_file(incomplete, path)
    return SourceFile(path, "standard input", STANDARD_INPUT, size, digest.hexdigest())
