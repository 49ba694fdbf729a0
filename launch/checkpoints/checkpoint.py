"""Checkpoints as folders: written beside, hashed while written, published last, verified before use.

    checkpoints/step_00000100/    files of every rank, and manifest.json: each file's bytes and sha256, step, layout, recipe
    checkpoints/latest            the name of the newest; a hint for people, never trusted

A folder with its final name is complete: it was renamed after the last file and the manifest reached the disk. A damaged one is
renamed to *.corrupt and the next older one is taken. Where a step is saved again, what was there is *.old until the new one has the name.
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
_NAME = re.compile(r"step_(\d{8,})")


class HashingFile:
    """A file that knows its own length and sha256 when it is closed. Temporary name, fsync, rename."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = open(path.with_name(f"{path.name}.tmp"), "wb")  # noqa: SIM115  closed by finish
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)  # hashing takes as long as writing, and needs no interpreter
        self.bytes = 0

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        hashed = self._hasher.submit(self._hash.update, view)
        try:
            return self._file.write(view)
        finally:
            hashed.result()
            self.bytes += view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> dict:
        """Close; the manifest's entry: bytes and sha256."""
        publish_file(self._file, self.path, sync_folder=False)
        self._hasher.shutdown()
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def begin(root: Path, step: int, run_id: str) -> Path:
    """An empty folder to write the checkpoint of `step` into; what an earlier attempt left there is dropped.

    Raises OSError where the disk has less room than 1.2 times the newest checkpoint.
    """
    folder = root / f"{folder_name(step)}.tmp-{run_id}"
    discard(folder)
    folder.mkdir(parents=True)
    needed = 1.2 * max((_size(path) for path in published(root)[:1]), default=0)
    if (free := shutil.disk_usage(root).free) < needed:
        discard(folder)
        raise OSError(f"{root} has {free / 2**30:.2f} GiB free; a checkpoint needs {needed / 2**30:.2f}.")
    return folder


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def write_part(folder: Path, rank: int, files: dict[str, dict]) -> None:
    """A rank's list of what it wrote, for the manifest."""
    (folder / f"part_{rank:05d}.json").write_text(json.dumps(files))


def publish(folder: Path, step: int, about: dict) -> Path:
    """Join the ranks' parts into the manifest and give the folder its final name. Called by one process, after all have written."""
    files: dict[str, dict] = {}
    parts, world_size = sorted(folder.glob("part_*.json")), about["layout"]["world_size"]
    if len(parts) != world_size:
        raise OSError(f"{folder} shows the files of {len(parts)} of {world_size} ranks; all of them must write to one shared disk.")
    for part in parts:
        files |= json.loads(part.read_text())
        part.unlink()
    for name in sorted(_files_in(folder) - files.keys()):  # DeepSpeed copies what it keeps on NVMe by itself
        files[name] = _entry_of(folder / name)
    manifest = about | {"step": step, "files": files}
    write_file(folder / MANIFEST, _text(manifest | {"sha256": _seal(manifest)}))
    final = folder.parent / folder_name(step)
    old = final.with_name(final.name + ".old")
    if final.exists():  # the step was saved before; what is there is replaced only by a whole one
        discard(old)
        os.rename(final, old)
    publish_folder(folder, final, sync_contents=False)
    discard(old)
    with contextlib.suppress(OSError):  # the checkpoint is published; this is a hint
        write_file(folder.parent / "latest", final.name + "\n")
    return final


def published(root: Path) -> list[Path]:
    """Checkpoint folders with a final name, and those left without a successor when a step was saved again; newest first."""
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) or _is_left_alone(path)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    match = _NAME.match(folder.name)
    assert match, folder
    return int(match.group(1))


def read_manifest(folder: Path) -> dict:
    """The manifest; raises UserError where there is none or it is damaged."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if manifest.pop("sha256") != _seal(manifest) or text != _text(manifest | {"sha256": _seal(manifest)}):
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no readable {MANIFEST} ({type(error).__name__}: {error}).") from error
    return manifest


def refuse_earlier_format(folder: Path, manifest: dict) -> None:
    """Raise UserError for a checkpoint that Megabatch before 0.2 wrote, in files of DeepSpeed's own, or before 0.4 with other waves."""
    if "checksums" not in manifest:
        raise UserError(f"{folder} was written by Megabatch before 0.2, in DeepSpeed's own files; go on with that version, or train anew.")
    model = manifest.get("model", {})
    if model.get("positions") == "sinusoidal" and "architecture" not in model:
        raise UserError(
            f"{folder} was written by Megabatch before 0.4, whose sinusoidal positions had sines and cosines in other columns; go on with "
            "that version, or train anew."
        )


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a sentence; None where every file is whole. Files are shared out over `parts` readers."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    if _NAME.match(folder.name) and step_of(folder) != manifest["step"]:
        return f"{folder} holds the checkpoint of step {manifest['step']}."
    if strangers := sorted(_files_in(folder) - manifest["files"].keys() - {MANIFEST}):
        return f"{folder / strangers[0]} does not belong to the checkpoint."
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
            return f"{path} is damaged: its sha256 is not the one it was written with."
    return None


def newest_undamaged(
    root: Path,
    verify: Callable[[Path], str | None],
    say: Callable[[str], None],
    may_rename: bool = True,
    candidates: list[Path] | None = None,
) -> Path | None:
    """The newest checkpoint that `verify` finds whole; a damaged one is named, renamed to *.corrupt, and the next is tried.

    Ranks that look together give the same `candidates`, those of `published`: a network disk may list others to each. None where
    there never was one; UserError where there are some and none is whole.
    """
    candidates = published(root) if candidates is None else candidates
    for folder in candidates:
        complaint = verify(folder)
        if complaint is None:
            return folder
        say(f"Damaged checkpoint: {complaint} Trying the one before.")
        if may_rename and folder.exists():
            corrupt = folder.with_name(f"{folder_name(step_of(folder))}.corrupt")
            discard(corrupt)
            try:
                os.rename(folder, corrupt)
            except OSError as error:
                say(f"{folder} cannot be renamed: {error.strerror}.")
    if candidates or list(root.glob("step_*.corrupt")):
        raise UserError(
            f"{root} holds no whole checkpoint, so the run cannot go on, and it will not start again from step 0 by itself. "
            "Give another --output, or move the folder away."
        )
    return None


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and what interrupted writes left; by renaming first, so none is ever half there."""
    newest = published(root)[:1]
    for leftover in root.glob("step_*.*"):
        unfinished = leftover.suffix.startswith(".tmp-") and newest and step_of(leftover) <= step_of(newest[0])
        replaced = leftover.suffix == ".old" and not _is_left_alone(leftover)
        if unfinished or replaced or leftover.suffix == ".deleted":
            discard(leftover)
    for folder in published(root)[keep:]:
        doomed = folder.with_name(folder.name + ".deleted")
        os.rename(folder, doomed)
        discard(doomed)


def _is_left_alone(path: Path) -> bool:
    """A checkpoint that was to be replaced by one of the same step, which never came."""
    return path.suffix == ".old" and bool(_NAME.fullmatch(path.stem)) and not path.with_suffix("").exists()


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _files_in(folder))


def _files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _entry_of(path: Path) -> dict:
    """The manifest's entry of a file that another wrote; it reaches the disk first."""
    sync_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _text(manifest: dict) -> str:
    return json.dumps(manifest, indent=1)


def _seal(manifest: dict) -> str:
    return hashlib.sha256(_text(manifest).encode()).hexdigest()
