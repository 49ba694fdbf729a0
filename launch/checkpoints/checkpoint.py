"""Checkpoint folders: written under a temporary name, hashed while they are written, renamed last, verified before use.

    checkpoints/step_00000100/    files of every rank, and manifest.json: bytes and sha256 of each file, step, layout, recipe
    checkpoints/latest            name of the newest, for people; the code never reads it

A folder with its final name is complete, because it is renamed only after the last file and the manifest are on the disk. A damaged one
is renamed to *.corrupt and the one before it is used. If a step is saved again, the earlier folder is *.old until the new one has its name.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from data.command_line import UserError
from data.files import publish_file, publish_folder, sha256_of, sync_to_disk, write_file

MANIFEST = "manifest.json"
LOCK_NAME = ".lock"
"""File in the folder of a run, next to checkpoints/, that the run locks while it trains."""
_NAME = re.compile(r"step_(\d{8,})")


class HashingFile:
    """File that is hashed while it is written, under a temporary name that `finish` replaces by `path`."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = open(path.with_name(f"{path.name}.tmp"), "wb")  # noqa: SIM115  closed by finish
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)  # hashing takes as long as writing, and does not need the interpreter
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; return their number."""
        view = memoryview(data)
        hashed = self._hasher.submit(self._hash.update, view)
        try:
            return self._file.write(view)
        finally:
            hashed.result()
            self.bytes += view.nbytes

    def flush(self) -> None:
        """Flush Python's buffer, as writers of files expect."""
        self._file.flush()

    def finish(self) -> dict:
        """Close and rename the file; return its entry for the manifest: bytes and sha256."""
        publish_file(self._file, self.path, sync_folder=False)
        self._hasher.shutdown()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


def folder_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step_{step:08d}"


def begin(root: Path, step: int, run_id: str) -> Path:
    """Create an empty temporary folder for the checkpoint of `step`, in place of one that an earlier attempt left.

    Raises OSError if the disk has less free space than 1.2 times the newest checkpoint.
    """
    folder = root / f"{folder_name(step)}.tmp-{run_id}"
    discard(folder)
    folder.mkdir(parents=True)
    needed = 1.2 * max((_size(path) for path in published(root)[:1]), default=0)
    if (free := shutil.disk_usage(root).free) < needed:
        discard(folder)
        raise OSError(f"{root} has {free / 2**30:.2f} GiB free; a checkpoint needs {needed / 2**30:.2f} GiB.")
    return folder


def discard(folder: Path) -> None:
    """Delete a folder if it exists, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def write_part(folder: Path, rank: int, files: dict[str, dict]) -> None:
    """Write the list of one rank's files: their entries for the manifest, by name."""
    (folder / f"part_{rank:05d}.json").write_text(json.dumps(files))


def publish(folder: Path, step: int, about: dict) -> Path:
    """Join the ranks' lists into the manifest and give the folder its final name. One process calls it, after all ranks have written.

    `about` is the rest of the manifest. Raises OSError if the list of a rank is missing.
    """
    files: dict[str, dict] = {}
    parts, world_size = sorted(folder.glob("part_*.json")), about["layout"]["world_size"]
    if len(parts) != world_size:
        raise OSError(f"{folder} has the files of {len(parts)} of {world_size} ranks. All ranks must write to one shared disk.")
    for part in parts:
        files |= json.loads(part.read_text())
        part.unlink()
    for name in sorted(_files_in(folder) - files.keys()):  # DeepSpeed itself copies the files that it keeps on NVMe
        files[name] = _entry_of(folder / name)
    manifest = about | {"step": step, "files": files}
    write_file(folder / MANIFEST, _as_text(manifest | {"sha256": _digest(manifest)}))
    final = folder.parent / folder_name(step)
    old = final.with_name(final.name + ".old")
    if final.exists():  # the step was saved before: it is replaced only by a complete checkpoint
        discard(old)
        os.rename(final, old)
    publish_folder(folder, final, sync_contents=False)
    discard(old)
    with contextlib.suppress(OSError):  # the checkpoint is published; this file is for people
        write_file(folder.parent / "latest", final.name + "\n")
    return final


def published(root: Path) -> list[Path]:
    """Checkpoint folders with a final name, and *.old folders whose replacement was never finished; newest first."""
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) or _was_not_replaced(path)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def describe_newest(root: Path) -> str:
    """Return a message that names the newest checkpoint, for a run that stops because of an error."""
    newest = published(root)[:1]
    return f"The newest checkpoint is {newest[0].name}; the same command resumes from it." if newest else "The run has no checkpoint yet."


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder, from its name."""
    match = _NAME.match(folder.name)
    assert match, folder
    return int(match.group(1))


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a checkpoint. Raises UserError if it is missing or damaged."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if "splits" in manifest:
            raise UserError(f"{folder} is prepared data, not a model. Give a run folder, a checkpoint in one, or a Hugging Face folder.")
        if manifest.pop("sha256") != _digest(manifest) or text != _as_text(manifest | {"sha256": _digest(manifest)}):
            raise ValueError("it was changed after it was written")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no readable {MANIFEST} ({type(error).__name__}: {error}).") from error
    return manifest


def refuse_earlier_format(folder: Path, manifest: dict) -> None:
    """Raise UserError for a checkpoint in DeepSpeed's own files (before version 0.2), or with other sinusoidal positions (before 0.4)."""
    if "checksums" not in manifest:
        raise UserError(
            f"{folder} was written by Megabatch before 0.2, in DeepSpeed's own files. Resume with that version, or train again."
        )
    model = manifest.get("model", {})
    if model.get("positions") == "sinusoidal" and "architecture" not in model:
        raise UserError(
            f"{folder} was written by Megabatch before 0.4, whose sinusoidal positions had sines and cosines in other columns. Resume with "
            "that version, or train again."
        )


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return a message about the first error in a checkpoint, or None if every file is as it was written.

    `parts` readers can share the files; each gives its own `part`, counted from 0.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    if _NAME.match(folder.name) and step_of(folder) != manifest["step"]:
        return f"{folder} contains the checkpoint of step {manifest['step']}."
    if extra := sorted(_files_in(folder) - manifest["files"].keys() - {MANIFEST}):
        return f"{folder / extra[0]} does not belong to the checkpoint."
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing."
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes; {expected['bytes']:,} were written."
        try:
            found = sha256_of(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}."
        if found != expected["sha256"]:
            return f"{path} is damaged: its sha256 is not the one in the manifest."
    return None


def newest_undamaged(
    root: Path,
    verify: Callable[[Path], str | None],
    report: Callable[[str], None],
    may_rename: bool = True,
    candidates: list[Path] | None = None,
) -> Path | None:
    """Return the newest checkpoint for which `verify` returns no message; None if there never was a checkpoint.

    Each damaged one is reported and renamed to *.corrupt, and the one before it is tried. Ranks that call this together give the same
    `candidates` (default: those of `published`), because a network disk may list different ones to each rank. Raises UserError if there
    are checkpoints but all of them are damaged.
    """
    candidates = published(root) if candidates is None else candidates
    for folder in candidates:
        complaint = verify(folder)
        if complaint is None:
            return folder
        report(f"Damaged checkpoint: {complaint} Trying the one before it.")
        if may_rename and folder.exists():
            corrupt = folder.with_name(f"{folder_name(step_of(folder))}.corrupt")
            discard(corrupt)
            try:
                os.rename(folder, corrupt)
            except OSError as error:
                report(f"{folder} cannot be renamed: {error.strerror}.")
    if candidates or list(root.glob("step_*.corrupt")):
        raise UserError(
            f"{root} has no undamaged checkpoint, so the run cannot be resumed, and it will not start again from step 0 by itself. "
            "Give another --output, or move the folder away."
        )
    return None


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and the folders that interrupted writes left.

    Each is renamed to *.deleted first, so that no final name ever stands for a part of a checkpoint.
    """
    newest = published(root)[:1]
    for leftover in root.glob("step_*.*"):
        unfinished = leftover.suffix.startswith(".tmp-") and newest and step_of(leftover) <= step_of(newest[0])
        replaced = leftover.suffix == ".old" and not _was_not_replaced(leftover)
        if unfinished or replaced or leftover.suffix == ".deleted":
            discard(leftover)
    for folder in published(root)[keep:]:
        doomed = folder.with_name(folder.name + ".deleted")
        os.rename(folder, doomed)
        discard(doomed)


def _was_not_replaced(path: Path) -> bool:
    """True for a checkpoint that is *.old but whose replacement was never finished."""
    return path.suffix == ".old" and bool(_NAME.fullmatch(path.stem)) and not path.with_suffix("").exists()


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _files_in(folder))


def _files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _entry_of(path: Path) -> dict:
    """Return the manifest's entry of a file that DeepSpeed wrote, after flushing it to the disk."""
    sync_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _as_text(manifest: dict) -> str:
    return json.dumps(manifest, indent=1)


def _digest(manifest: dict) -> str:
    return hashlib.sha256(_as_text(manifest).encode()).hexdigest()
