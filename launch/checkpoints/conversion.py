"""Conversion of a checkpoint of any layout into files of whole parameters: verified, streamed, compared and then published."""

import dataclasses
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import tqdm

from data.command_line import UserError
from data.files import complete_after_ctrl_c, output_complaint, parent_complaint, publish_folder, refuse_full_disk, write_file
from data.tokenization.companions import GENERATION, licence_files
from launch.checkpoints import checkpoint, state
from launch.checkpoints.run_record import find_tokenizer, moved_paths, tokenizer_files
from launch.ranks.layout import Layout
from launch.ranks.processes import peak_memory_bytes

_SECONDS_BETWEEN_LINES = 10
_READERS = 4  # hashing one file at a time does not use all of a disk's speed


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    source: Path
    """The checkpoint that was read."""
    checkpoint: Path
    """The new checkpoint."""
    files_before: int
    """Number of files of the source."""
    files: int
    """Number of files of the new checkpoint."""
    bytes: int
    """Bytes of the new files."""
    seconds: float
    """Time to verify, read and write, until everything was on the disk."""


def convert(folder: Path, output: Path, file_bytes: float, log: Callable[[str], None]) -> Conversion:
    """Write the checkpoint at `folder` (or the newest of a run) into a new run folder, in files of at most `file_bytes`.

    Raises UserError if it cannot be converted, if possible before any file is read, and if a checksum differs; then nothing is written.
    """
    begun = time.perf_counter()
    folder, output = folder.resolve(), output.resolve()
    _refuse_output(output)
    source = _source(folder, output, log)
    manifest, run = checkpoint.read_manifest(source), source.parent.parent
    record = _record_for(output, run)
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    try:
        unfinished = checkpoint.begin(partial / "checkpoints", manifest["step"], manifest["run_id"])
        files = _write(source, manifest, unfinished, file_bytes, log)
        checkpoint.write_part(unfinished, 0, files)
        published = checkpoint.publish(unfinished, manifest["step"], _about(source, moved_paths(manifest, run, output)))
        for path in (*tokenizer_files(run), run / GENERATION, *licence_files(run)):
            if path.is_file():
                copy = partial / path.relative_to(run)
                copy.parent.mkdir(exist_ok=True)
                write_file(copy, path.read_bytes())
        write_file(partial / "run.json", record)
        with complete_after_ctrl_c(partial, output):
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
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if is_empty_folder and output.is_mount():  # publish_folder could not rename the finished folder to it
        raise UserError(f"--output {output} is a mount point. Give a folder inside it.")
    if complaint := parent_complaint(output) if is_empty_folder else output_complaint(output):
        raise UserError(complaint)


def _source(folder: Path, output: Path, log: Callable[[str], None]) -> Path:
    """Return the checkpoint to convert, with every byte verified. What can be refused without reading files is refused before."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give a run folder or a checkpoint in one.")
    is_checkpoint = (folder / checkpoint.MANIFEST).is_file()
    if not is_checkpoint and (folder / "config.json").is_file():
        raise UserError(f"{folder} is an exported model: training cannot resume from weights alone. Give a run folder.")
    if is_checkpoint:
        checkpoint.read_manifest(folder)  # raises UserError if it is prepared data, or damaged
    run = folder.parent.parent if is_checkpoint else folder
    if not is_checkpoint and not (run / "checkpoints").is_dir():
        raise UserError(f"{folder} contains no checkpoint. Give a run folder or a checkpoint in one.")
    if not (run / "run.json").is_file() or not find_tokenizer(run):
        raise UserError(f"{run} lacks run.json or the tokenizer, which training needs to resume from {folder}.")
    _record_for(output, run)  # raises UserError if it is damaged
    if run in output.parents:
        raise UserError(f"--output {output} is inside {run}, which must not change. Give a folder outside it.")

    def complaint(candidate: Path) -> str | None:
        """Return why a checkpoint is damaged, or None. Raises UserError if it cannot be converted for another reason."""
        try:
            manifest = checkpoint.read_manifest(candidate)
        except UserError as error:
            return str(error)
        _refuse_contents(candidate, manifest, output)
        return _damage(candidate, manifest, log)

    if is_checkpoint:
        if message := complaint(folder):
            raise UserError(message)
        return folder
    newest = checkpoint.newest_undamaged(run / "checkpoints", complaint, log, may_rename=False)
    if newest is None:
        raise UserError(f"{folder} is a run that has not written a checkpoint yet.")
    return newest


def _refuse_contents(folder: Path, manifest: dict, output: Path) -> None:
    checkpoint.refuse_earlier_format(folder, manifest)
    refuse_full_disk(output, _bytes_of(manifest["files"].values()))


def _damage(folder: Path, manifest: dict, log: Callable[[str], None]) -> str | None:
    """Return what is wrong with a checkpoint, as checkpoint.find_damage does, with several files read at a time."""
    sizes = [manifest["files"][name]["bytes"] for name in sorted(manifest["files"])]
    parts = max(1, min(len(sizes), 16 * _READERS))
    with _Progress("Verified", sum(sizes), log) as progress, ThreadPoolExecutor(_READERS) as readers:
        complaints = []
        for part, found in enumerate(readers.map(lambda part: checkpoint.find_damage(folder, part, parts), range(parts))):
            complaints.append(found)
            progress.add(sum(sizes[part::parts]))
    return next((found for found in complaints if found), None)


def _write(source: Path, manifest: dict, folder: Path, file_bytes: float, log: Callable[[str], None]) -> dict[str, dict]:
    """Write the state of a checkpoint into files of whole parameters. Return their entries for the manifest."""
    saved = state.SavedState(source)
    if different := sorted(saved.shapes.keys() ^ manifest["checksums"].keys()):
        raise UserError(f"{source}: its files and its manifest's checksums have different parameters, for example {different[0]}.")
    whole, kinds = [state.ShardSlice.of_whole(name, saved.shapes[name]) for name in saved.names()], state.kinds_in(manifest)
    written = {}
    with _Progress("Copied", _bytes_of(manifest["files"].values()), log) as progress:
        reader = _Reader(source, manifest, max(shard_slice.count for shard_slice in whole), progress)
        for number, members in enumerate(_group_by_size(whole, 4 * len(kinds), file_bytes)):
            file = checkpoint.HashingFile(folder / f"state_{number:05d}.safetensors")
            state.write(file, members, kinds, ((shard_slice, _ReadOnAccess(reader, shard_slice)) for shard_slice in members))
            written[file.path.name] = file.finish()
        reader.compare()
    return written


def _group_by_size(slices: Iterable[state.ShardSlice], bytes_per_value: int, file_bytes: float) -> Iterator[list[state.ShardSlice]]:
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


class _ReadOnAccess(dict):
    """The tensors of a parameter by kind, each read when it is accessed and not kept: state.write accesses each once."""

    def __init__(self, reader: "_Reader", shard_slice: state.ShardSlice):
        super().__init__()
        self._reader, self._slice = reader, shard_slice

    def __missing__(self, kind: str) -> torch.Tensor:
        return self._reader.read(self._slice, kind)


class _Reader:
    """Reads whole parameters into one buffer. While one is written, another thread compares it with its checksum in the manifest."""

    def __init__(self, source: Path, manifest: dict, largest: int, progress: "_Progress"):
        self._source, self._checksums, self._progress = source, manifest["checksums"], progress
        self._kinds = state.kinds_in(manifest)
        self._buffer = torch.empty(largest)
        self._saved: state.SavedState | None = None
        self._mapped_bytes = 0
        self._most_mapped_bytes = 2**23 * len(manifest["files"])  # large enough that reopening files takes little time
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))  # the main thread hashes and writes
        self._pending: tuple[Future, str, int] | None = None

    def read(self, shard_slice: state.ShardSlice, kind: str) -> torch.Tensor:
        """Return one tensor of a whole parameter, float32 [count], valid until the next call."""
        self.compare()
        self._mapped_bytes += 4 * shard_slice.count
        if self._saved is None or self._mapped_bytes > self._most_mapped_bytes:  # mapped pages count as memory until files are closed
            self._saved, self._mapped_bytes = state.SavedState(self._source), 4 * shard_slice.count
        values = self._buffer[: shard_slice.count]
        self._thread.submit(self._saved.read, shard_slice, kind, values).result()
        saved_sum = self._checksums[shard_slice.name][self._kinds.index(kind)]
        self._pending = self._thread.submit(state.checksum, values, shard_slice), f"{shard_slice.name}.{kind}", saved_sum
        self._progress.add(4 * shard_slice.count)
        return values

    def compare(self) -> None:
        """Raise UserError if the values read last do not have the checksum that they were saved with."""
        if self._pending is None:
            return
        computed_sum, name, saved_sum = self._pending
        if computed_sum.result() != saved_sum:
            raise UserError(f"{self._source} cannot be converted: {name} does not have the checksum it was saved with.")


class _Progress:
    """A progress bar in a terminal; elsewhere a line every few seconds."""

    def __init__(self, done: str, total_bytes: int, log: Callable[[str], None]):
        self._bar = tqdm.tqdm(desc=done, total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)
        self._done, self._total_bytes, self._log = done, total_bytes, log
        self._bytes, self._last_line = 0, time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, num_bytes: int) -> None:
        """Count bytes as done."""
        self._bytes += num_bytes
        self._bar.update(num_bytes)
        if self._bar.disable and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._log(f"{self._done} {self._bytes / 1e9:,.1f} of {self._total_bytes / 1e9:,.1f} GB ...")
            self._last_line = time.monotonic()


def _record_for(output: Path, run: Path) -> bytes:
    """Return run.json, with paths that lead from the folder `output` to the same places. Raises UserError if it cannot be read."""
    try:
        text = (run / "run.json").read_bytes()
        record = json.loads(text)
        moved = moved_paths(record, run, output)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'run.json'} is damaged ({type(error).__name__}: {error}).") from error
    return text if moved == record else json.dumps(moved, indent=1).encode()


def _about(source: Path, manifest: dict) -> dict:
    """Return the new manifest's entries: those of the source, the new layout, and where the values come from."""
    layout = Layout(world_size=1).record(zero_stage=0, precision=manifest["layout"]["precision"])
    origin = {"checkpoint": str(source), "layout": manifest["layout"], "files": len(manifest["files"])}
    return manifest | {"layout": layout, "converted_from": origin}


def _bytes_of(entries: Iterable[dict]) -> int:
    return sum(entry["bytes"] for entry in entries)
