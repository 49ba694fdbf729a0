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
from data.preparation.dataset_folders import refuse_dataset_folder
from data.preparation.fields import FORMATS, is_known
from data.preparation.settings import STANDARD_INPUT

_ARCHIVES = {".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar"}
NO_KNOWN_SUFFIX = "has no known suffix"
_NAMED_FILES = 5  # in a message about many files
_URL_ADVICE = " It is not downloaded: download it and give the file, or use --dataset for a dataset of the Hugging Face Hub."


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


def find_files(
    inputs: Sequence[str], any_name: bool = False, excluded_folders: Sequence[Path] = ()
) -> tuple[list[SourceFile], dict[str, list[str]]]:
    """Return the files that inputs name, each once, sorted within each input, and the files of folders that are not read, by reason.

    Of a folder, only files with a known suffix are read, or all files if `any_name`. Raise UserError if an input has no file, or if a
    file cannot be read or its format is unknown.
    """
    files: dict[Path, SourceFile] = {}
    skipped: dict[str, list[str]] = {}
    excluded = [folder.resolve() for folder in excluded_folders]
    for name in inputs:
        root, paths, skipped_here = _files_of_input(name, any_name)
        for path, reason in sorted(skipped_here.items()):
            skipped.setdefault(reason, []).append(path_as_text(path))
        for path in sorted(paths):
            resolved = path.resolve()
            if not any(folder in resolved.parents for folder in excluded):
                file = SourceFile(path, path_as_text(path.relative_to(root)), path_as_text(Path(name)), 0, "")
                files.setdefault(resolved, file.with_current_stamp())
    counts = Counter(file.name for file in files.values())
    named = [dataclasses.replace(file, name=path_as_text(file.path)) if counts[file.name] > 1 else file for file in files.values()]
    return named, skipped


def _files_of_input(name: str, any_name: bool) -> tuple[Path, set[Path], dict[Path, str]]:
    """Return (root that names are relative to, files to read, reason for each file that is not read) of one input.

    A pattern stands for the files and folders that it matches, as in a shell.
    """
    if not name:
        raise UserError('--input "" is empty. Give a file, folder or pattern (is a shell variable empty?).')
    path = Path(name)
    try:
        os.lstat(path)
        root, given = path if path.is_dir() else path.parent, [path]
    except (FileNotFoundError, NotADirectoryError):
        root, given = _glob_root(name), sorted(_matches(name))
    except OSError as error:
        raise UserError(f"--input {name} cannot be read: {error.strerror}.") from error
    if not given:
        raise UserError(f"--input {name}: no such file.{_URL_ADVICE if '://' in name else ''}")
    found, skipped, visited = set(), dict[Path, str](), set[str]()
    for one in given:
        if one.is_dir():
            found_below, skipped_below = _files_below(one, name, any_name, visited)
            found |= found_below
            skipped |= skipped_below
        else:
            _refuse_unreadable(one, name)
            found.add(one)
    found = {_index_of_token_file(file) for file in found}
    if not any_name and (unknown := sorted(file for file in found if not is_known(file))):
        raise UserError(f"--input {name}: {_unknown_format(unknown, name)}")
    if not found:
        kinds = "" if any_name else f" {', '.join(FORMATS)}"
        compressions = "" if any_name else f", plain or {', '.join(COMPRESSED)}"
        others = f" Not read: {_list_of(sorted(skipped))}. --input_format reads files of any name." if skipped else ""
        raise UserError(f"--input {name}: no{kinds} file in this folder{compressions}.{others}")
    return root, found, {file: reason for file, reason in skipped.items() if file not in found}


def _files_below(folder: Path, name: str, any_name: bool, visited: set[str]) -> tuple[set[Path], dict[Path, str]]:
    """Return (files to read, reason for each file that is not read) of a folder. `visited` has the folders that were read already."""
    found, skipped = set(), dict[Path, str]()
    below = {parent / file for parent, files in _walk(folder, visited) for file in files}
    refuse_dataset_folder(name, below)
    for path in below:
        is_private = path.name.startswith((".", "_"))  # for example _SUCCESS and .part-00000.crc of Spark
        if path.name.startswith("._"):
            skipped[path] = "begins with ._ (written by macOS)"
        elif is_known(path) or (any_name and not is_private):
            _refuse_unreadable(path, name)
            found.add(path)
        elif not is_private and os.path.islink(path) and not os.path.exists(path):  # it may be a folder of inputs
            _refuse_unreadable(path, name)
        elif any_name:
            skipped[path] = "begins with . or _ and has no known suffix"
        elif not (path.suffix == ".bin" and path.with_suffix(".idx") in below):
            skipped[path] = NO_KNOWN_SUFFIX
    return found, skipped


def _walk(folder: Path, visited: set[str], is_hidden_read: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder below and including `folder`, with its files. Links to folders are followed; no folder is visited twice."""

    def _refuse(error: OSError) -> None:
        raise UserError(f"--input {folder}: {error.filename} cannot be read: {error.strerror}.") from error

    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        resolved = os.path.realpath(parent)
        if resolved in visited:
            folders.clear()
            continue
        visited.add(resolved)
        folders[:] = sorted(name for name in folders if is_hidden_read or not name.startswith("."))
        yield Path(parent), names


def _matches(pattern: str) -> set[Path]:
    """Return the files and folders that a pattern matches. ** stands for each folder below, also through links, but once."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return set(map(Path, glob.glob(pattern)))  # glob's own ** does not end where links to folders form loops
    before, after = Path(*parts[: parts.index("**")]), Path(*parts[parts.index("**") + 1 :])
    bases = {path for path in _matches(str(before)) if path.is_dir()}
    if after == Path():
        return bases
    visited: set[str] = set()
    folders = [folder for base in sorted(bases) for folder, _ in _walk(base, visited, is_hidden_read=False)]
    return {path for folder in folders for path in _matches(f"{glob.escape(str(folder))}/{after}")}


def _refuse_unreadable(path: Path, name: str) -> None:
    """Raise UserError if a path is not a file that can be read several times."""
    subject = f"--input {name}" if path == Path(name) else f"--input {name}: {path}"
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise UserError(f"{subject} cannot be read: no permission.")
        return
    if not path.exists():
        raise UserError(
            f"{subject} is a symbolic link to {os.readlink(path)}, which does not exist. Restore that file or folder, or remove the link."
        )
    if path.is_fifo():
        raise UserError(
            f"{subject} is a pipe, which can be read only once. Give its content as standard input: "
            "COMMAND | python data/prepare.py --input - --input_format jsonl (or txt, csv or tsv)."
        )
    raise UserError(f"{subject} is not a regular file.")


def _unknown_format(files: Sequence[Path], name: str) -> str:
    """Return the sentences about files of input `name` whose suffix does not determine a format."""
    if archives := [file for file in files if _ARCHIVES & set(map(str.lower, file.suffixes))]:
        return f"{_list_of(archives)} must be unpacked first: archives are not read. Unpack into a folder and give that folder."
    if files[0].suffix == ".bin":
        return f"{files[0]} is read as a token file, but its index {files[0].with_suffix('.idx').name} is missing."
    named = "this file" if files == [Path(name)] else _list_of(files)
    return (
        f"the format of {named} is unknown. Known suffixes: {' '.join(FORMATS)}, each plain or followed by "
        f"{' '.join(COMPRESSED)}. Rename the file, or set the format of every input file with --input_format."
    )


def _list_of(files: Sequence[Path]) -> str:
    """Return the names of the first files, and the number of all if there are more."""
    names = ", ".join(path_as_text(file) for file in files[:_NAMED_FILES])
    return names if len(files) <= _NAMED_FILES else f"{names} and {len(files) - _NAMED_FILES:,} more files"


def _index_of_token_file(file: Path) -> Path:
    index = file.with_suffix(".idx")
    return index if file.suffix == ".bin" and index.exists() else file


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
    if sys.stdin is None:
        raise UserError("--input - reads standard input, which is closed. Give the text through a pipe, or name a file.")
    digest, size = hashlib.sha256(), 0
    path = (folder or Path()) / "standard-input"
    incomplete = path.with_suffix(".incomplete")
    with open(incomplete if folder else os.devnull, "wb") as file:
        while piece := sys.stdin.buffer.read(1 << 20):
            digest.update(piece)
            size += file.write(piece)
    if not size:
        if folder:
            incomplete.unlink()
        raise UserError("--input - read nothing from standard input. Did the command before the pipe fail?")
    if folder and path.exists():
        incomplete.unlink()
        if sha256_of(path) != digest.hexdigest():
            raise UserError(f"Standard input is not the same as when {folder} was started. Give the same again, or another --output.")
    elif folder:
        publish_file(incomplete, path)
    return SourceFile(path, "standard input", STANDARD_INPUT, size, digest.hexdigest())
