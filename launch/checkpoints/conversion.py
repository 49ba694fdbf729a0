"""A checkpoint of any layout, rewritten in files of whole parameters: verified, streamed, compared, published."""

import dataclasses
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import tqdm

from data.command_line import UserError
from data.files import publish_folder, write_file
from launch.checkpoints import checkpoint, state
from launch.checkpoints.run_record import tokenizer_files, tokenizer_in
from launch.ranks.layout import Layout
from launch.ranks.processes import peak_memory_bytes

_SECONDS_BETWEEN_LINES = 10
_READERS = 4  # hashing one file does not fill a disk


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done."""

    source: Path
    checkpoint: Path
    """The new one."""
    files_before: int
    files: int
    bytes: int
    """Of the new files."""
    seconds: float
    """Verifying, reading, writing, and until all of it was on the disk."""


def convert(folder: Path, output: Path, file_bytes: float, say: Callable[[str], object]) -> Conversion:
    """Write a new run folder with the checkpoint at `folder` (or the newest of a run) in files of at most `file_bytes`, or nothing.

    Raises UserError for what cannot be converted, before any file is read where that can be known, and where a checksum differs.
    """
    begun = time.perf_counter()
    folder, output = folder.resolve(), output.resolve()
    _refuse_output(output)
    source = _source(folder, output, say)
    manifest, run = checkpoint.read_manifest(source), source.parent.parent
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    try:
        unfinished = checkpoint.begin(partial / "checkpoints", manifest["step"], manifest["run_id"])
        files = _write(source, manifest, unfinished, file_bytes, say)
        checkpoint.write_part(unfinished, 0, files)
        published = checkpoint.publish(unfinished, manifest["step"], _about(source, manifest))
        for tokenizer in tokenizer_files(run):
            write_file(partial / tokenizer.name, tokenizer.read_bytes())
        write_file(partial / "run.json", (run / "run.json").read_bytes())
        publish_folder(partial, output, sync_contents=False)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}. Nothing was converted.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Conversion(
        source=source,
        checkpoint=output / "checkpoints" / published.name,
        files_before=len(manifest["files"]),
        files=len(files),
        bytes=sum(entry["bytes"] for entry in files.values()),
        seconds=time.perf_counter() - begun,
    )


def report(done: Conversion) -> str:
    """Return one line about a conversion, with the peak memory of this process."""
    return (
        f"{done.source} -> {done.checkpoint}: {done.files_before:,} files -> {done.files:,}, {done.bytes:,} bytes, {done.seconds:.1f} s, "
        f"{done.bytes / done.seconds / 1e6:,.0f} MB/s, peak memory {peak_memory_bytes() / 1e6:,.0f} MB"
    )


def _refuse_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already; nothing is overwritten. Give another name.")
    if output.is_mount():  # the finished folder could not take its name
        raise UserError(f"--output {output} is where a disk is mounted. Give a folder in it.")
    if not (ground := _ground(output)).is_dir() or not os.access(ground, os.W_OK):
        raise UserError(f"--output {output}: {ground} is no folder that can be written.")


def _source(folder: Path, output: Path, say: Callable[[str], object]) -> Path:
    """The checkpoint to convert, with every byte verified; what needs no reading of files is refused before that."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give a run folder or a checkpoint in one.")
    is_checkpoint = (folder / checkpoint.MANIFEST).is_file()
    if not is_checkpoint and (folder / "config.json").is_file():
        raise UserError(f"{folder} is an exported model: training cannot go on from its weights alone. Give a run folder.")
    run = folder.parent.parent if is_checkpoint else folder
    if not is_checkpoint and not (run / "checkpoints").is_dir():
        raise UserError(f"{folder} holds no checkpoint. Give a run folder or a checkpoint in one.")
    if not (run / "run.json").is_file() or not tokenizer_in(run):
        raise UserError(f"{run} holds no run.json with a tokenizer beside it, which training needs to go on from {folder}.")
    if run in output.parents:
        raise UserError(f"--output {output} lies in {run}, which stays as it is. Give another place.")

    def complaint(candidate: Path) -> str | None:
        try:
            manifest = checkpoint.read_manifest(candidate)
        except UserError as error:
            return str(error)
        _refuse_contents(candidate, manifest, output)
        return _damage(candidate, manifest, say)

    if is_checkpoint:
        if sentence := complaint(folder):
            raise UserError(sentence)
        return folder
    newest = checkpoint.newest_good(run / "checkpoints", complaint, say, may_rename=False)
    if newest is None:
        raise UserError(f"{folder} holds a run that never reached a checkpoint.")
    return newest


def _refuse_contents(folder: Path, manifest: dict, output: Path) -> None:
    checkpoint.refuse_earlier_format(folder, manifest)
    needed, free = _bytes_of(manifest["files"].values()), shutil.disk_usage(_ground(output)).free
    if free < needed:
        raise UserError(f"{_ground(output)} has {free / 2**30:.2f} GiB free; --output {output} needs {needed / 2**30:.2f}.")


def _damage(folder: Path, manifest: dict, say: Callable[[str], object]) -> str | None:
    """checkpoint.damage with several readers."""
    sizes = [manifest["files"][name]["bytes"] for name in sorted(manifest["files"])]
    parts = max(1, min(len(sizes), 16 * _READERS))
    with _Progress("Verified", sum(sizes), say) as progress, ThreadPoolExecutor(_READERS) as readers:
        complaints = []
        for part, found in enumerate(readers.map(lambda part: checkpoint.damage(folder, part, parts), range(parts))):
            complaints.append(found)
            progress.add(sum(sizes[part::parts]))
    return next((found for found in complaints if found), None)


def _write(source: Path, manifest: dict, folder: Path, file_bytes: float, say: Callable[[str], object]) -> dict[str, dict]:
    """Write the state of a checkpoint into files of whole parameters; the manifest's entries of the files."""
    saved = state.SavedState(source)
    if strangers := sorted(saved.shapes.keys() ^ manifest["checksums"].keys()):
        raise UserError(f"{source} does not hold the parameters that its manifest has checksums of: {strangers[0]} is one.")
    whole, kinds = [state.ShardSlice.of_whole(name, saved.shapes[name]) for name in saved.names()], state.kinds_in(manifest)
    written = {}
    with _Progress("Copied", _bytes_of(manifest["files"].values()), say) as progress:
        reader = _Reader(source, manifest, max(shard_slice.count for shard_slice in whole), progress)
        for number, members in enumerate(_share_out(whole, 4 * len(kinds), file_bytes)):
            file = checkpoint.HashingFile(folder / f"state_{number:05d}.safetensors")
            state.write(file, members, kinds, ((shard_slice, _WhenAsked(reader, shard_slice)) for shard_slice in members))
            written[file.path.name] = file.finish()
        reader.compare()
    return written


def _share_out(slices: Iterable[state.ShardSlice], bytes_per_value: int, file_bytes: float) -> Iterator[list[state.ShardSlice]]:
    """Yield groups of consecutive slices whose state fits in one file; a group has at least one."""
    members: list[state.ShardSlice] = []
    size = 0
    for shard_slice in slices:
        added = bytes_per_value * shard_slice.count
        if members and size + added > file_bytes:
            yield members
            members, size = [], 0
        members.append(shard_slice)
        size += added
    yield members


class _WhenAsked(dict):
    """The numbers of a parameter by kind, read when they are asked for and not kept: state.write asks for each once."""

    def __init__(self, reader: "_Reader", shard_slice: state.ShardSlice):
        super().__init__()
        self._reader, self._slice = reader, shard_slice

    def __missing__(self, kind: str) -> torch.Tensor:
        return self._reader.read(self._slice, kind)


class _Reader:
    """Reads whole parameters into one piece of memory, and compares each with the checksum it was saved with while it is written."""

    def __init__(self, source: Path, manifest: dict, largest: int, progress: "_Progress"):
        self._source, self._checksums, self._progress = source, manifest["checksums"], progress
        self._kinds = state.kinds_in(manifest)
        self._numbers = torch.empty(largest)
        self._saved: state.SavedState | None = None
        self._mapped_bytes = 0
        self._most_mapped_bytes = 2**23 * len(manifest["files"])  # so that opening the files again takes little of the time
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))  # counts while the other hashes and writes
        self._counted: tuple[Future, str, int] | None = None

    def read(self, shard_slice: state.ShardSlice, kind: str) -> torch.Tensor:
        """The numbers of a whole parameter, float32 [count], good until the next are read."""
        self.compare()
        self._mapped_bytes += 4 * shard_slice.count
        if self._saved is None or self._mapped_bytes > self._most_mapped_bytes:  # what was read counts as memory until files are closed
            self._saved, self._mapped_bytes = state.SavedState(self._source), 4 * shard_slice.count
        numbers = self._numbers[: shard_slice.count]
        self._thread.submit(self._saved.read, shard_slice, kind, numbers).result()
        saved_sum = self._checksums[shard_slice.name][self._kinds.index(kind)]
        self._counted = self._thread.submit(state.checksum, numbers, shard_slice), f"{shard_slice.name}.{kind}", saved_sum
        self._progress.add(4 * shard_slice.count)
        return numbers

    def compare(self) -> None:
        """Raise UserError where the numbers read last are not those that were saved."""
        if self._counted is None:
            return
        counted, what, saved_sum = self._counted
        if counted.result() != saved_sum:
            raise UserError(f"{self._source} cannot be converted: {what} has another checksum than was saved.")


class _Progress:
    """A bar in a terminal; elsewhere a line every few seconds."""

    def __init__(self, done: str, total_bytes: int, say: Callable[[str], object]):
        self._bar = tqdm.tqdm(desc=done, total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)
        self._done, self._total_bytes, self._say = done, total_bytes, say
        self._bytes, self._said = 0, time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        self._bar.update(num_bytes)
        if self._bar.disable and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._say(f"{self._done} {self._bytes / 1e9:,.1f} of {self._total_bytes / 1e9:,.1f} GB ...")
            self._said = time.monotonic()


def _about(source: Path, manifest: dict) -> dict:
    """The manifest's account of the run, and where the numbers come from."""
    layout = Layout(world_size=1).recorded(zero_stage=0, precision=manifest["layout"]["precision"])
    origin = {"checkpoint": str(source), "layout": manifest["layout"], "files": len(manifest["files"])}
    return manifest | {"layout": layout, "converted_from": origin}


def _ground(output: Path) -> Path:
    """What is there already of the path to a new folder."""
    return next(path for path in output.parents if path.exists())


def _bytes_of(entries: Iterable[dict]) -> int:
    return sum(entry["bytes"] for entry in entries)
