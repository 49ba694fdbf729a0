"""Rewrite a checkpoint of any layout in a few files of whole parameters: python launch/convert.py runs/demo --output runs/demo-whole

A start needs no conversion, for every layout reads every checkpoint. It is for the checkpoint of a thousand ranks that is to be kept,
copied elsewhere or read often: a thousand files of pieces become a handful, which hold the same numbers bit for bit.

Of the state, one kind (weight or one of AdamW's moments) of one parameter is in memory at a time; where tensor parallelism cut it, two
more copies of that while it is put together. Beside it lie mapped pages of the files that are read: that parameter's, or 8 MiB a file.
Measured on 0.98 GB of 8 ranks, whose largest parameter has 13 MB of each kind: 94 MB more than the 224 MB of Python with torch.
"""

import dataclasses
import functools
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data.command_line import UserError, read_settings, run_door
from launch.training import checkpoint
from launch.training.layout import Layout

_SECONDS_BETWEEN_LINES = 10
_READERS = 4  # hashing one file does not fill a disk


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    checkpoint: str
    """Run folder (its newest whole checkpoint is taken), or a checkpoint in one."""
    output: str
    """New run folder, not there yet or empty. The run goes on in it with its own settings, this --output and --resume, in any layout;
    every other door reads it. Curves and log stay with the original."""
    file_gib: float = 4.0
    """Largest file, GiB; a parameter with more than that has a file of its own."""


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


def main(arguments: Sequence[str]) -> int:
    description = (
        "Rewrite a checkpoint in a few files of whole parameters. Memory: at most twice the largest parameter in float32 "
        "(four times where tensor parallelism cut it), 8 MiB for each file that is read, and 0.25 GB for Python."
    )
    settings = read_settings(ConvertSettings, arguments, description, positional="checkpoint")
    done = convert(settings, functools.partial(print, flush=True))
    print(
        f"{done.source} -> {done.checkpoint}: {done.files_before:,} files -> {done.files:,}, {done.bytes:,} bytes, {done.seconds:.1f} s, "
        f"{done.bytes / done.seconds / 1e6:,.0f} MB/s, peak memory {_peak_memory_bytes() / 1e6:,.0f} MB"
    )
    return 0


def convert(settings: ConvertSettings, say: Callable[[str], object] = print) -> Conversion:
    """Write the new run folder: whole, or not at all. Raises UserError for what cannot be converted, and where a checksum differs."""
    begun = time.perf_counter()
    output = Path(settings.output).resolve()
    _refuse_settings(settings, output)
    source = _source(Path(settings.checkpoint).resolve(), output, say)
    manifest, run = checkpoint.read_manifest(source), source.parent.parent
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    try:
        unfinished = checkpoint.begin(partial / "checkpoints", manifest["step"], manifest["run_id"])
        files = _write(source, manifest, unfinished, settings.file_gib * 2**30, say)
        checkpoint.write_part(unfinished, 0, files)
        published = checkpoint.publish(unfinished, manifest["step"], _about(source, manifest))
        for tokenizer in _tokenizers(run):
            copy = checkpoint.HashingFile(partial / tokenizer.name)
            copy.write(tokenizer.read_bytes())
            copy.finish()
        checkpoint.write_durably(partial / "run.json", (run / "run.json").read_text(encoding="utf-8"))
        partial.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
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


def _refuse_settings(settings: ConvertSettings, output: Path) -> None:
    if not settings.file_gib > 0:
        raise UserError(f"--file_gib {settings.file_gib} must be above 0.")
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
    if not (run / "run.json").is_file() or not _tokenizers(run):
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
    if "checksums" not in manifest:
        version = manifest["versions"]["megabatch"]
        raise UserError(f"{folder} was written by an earlier version of Megabatch ({version}), in DeepSpeed's files.")
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
    from launch.training import state

    saved = state.SavedState(source)
    if strangers := sorted(saved.shapes.keys() ^ manifest["checksums"].keys()):
        raise UserError(f"{source} does not hold the parameters that its manifest has checksums of: {strangers[0]} is one.")
    whole = [
        state.Stretch(name, saved.shapes[name], state.whole_box(saved.shapes[name]), 0, math.prod(saved.shapes[name]))
        for name in saved.names()
    ]
    written = {}
    with _Progress("Copied", _bytes_of(manifest["files"].values()), say) as progress:
        reader = _Reader(source, manifest, max(stretch.count for stretch in whole), progress)
        for number, members in enumerate(_share_out(whole, file_bytes)):
            file = checkpoint.HashingFile(folder / f"state_{number:05d}.safetensors")
            state.write(file, members, ((stretch, _WhenAsked(reader, stretch)) for stretch in members))
            written[file.path.name] = file.finish()
        reader.compare()
    return written


def _share_out(stretches: Iterable, file_bytes: float) -> Iterator[list]:
    """Consecutive stretches whose state fits one file; at least one."""
    members, size = [], 0
    for stretch in stretches:
        if members and size + 12 * stretch.count > file_bytes:
            yield members
            members, size = [], 0
        members.append(stretch)
        size += 12 * stretch.count  # three kinds of float32
    yield members


class _WhenAsked(dict):
    """The numbers of a parameter by kind, read when they are asked for and not kept: state.write asks for each once."""

    def __init__(self, reader: "_Reader", stretch):
        super().__init__()
        self._reader, self._stretch = reader, stretch

    def __missing__(self, kind: str):
        return self._reader.read(self._stretch, kind)


class _Reader:
    """Reads whole parameters into one piece of memory, and compares each with the checksum it was saved with while it is written."""

    def __init__(self, source: Path, manifest: dict, largest: int, progress: "_Progress"):
        import torch

        self._source, self._checksums, self._progress = source, manifest["checksums"], progress
        self._numbers = torch.empty(largest)
        self._saved, self._mapped_bytes = None, 0
        self._most_mapped_bytes = 2**23 * len(manifest["files"])  # so that opening the files again takes little of the time
        # Torch's work is done by one thread: several wait for one another at every chunk, on a busy machine forty times as long.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._counted: tuple[Future, str, int] | None = None

    def read(self, stretch, kind: str):
        """The numbers of a whole parameter, float32 [count], good until the next are read."""
        from launch.training import state

        self.compare()
        self._mapped_bytes += 4 * stretch.count
        if self._saved is None or self._mapped_bytes > self._most_mapped_bytes:  # what was read counts as memory until files are closed
            self._saved, self._mapped_bytes = state.SavedState(self._source), 4 * stretch.count
        numbers = self._numbers[: stretch.count]
        self._thread.submit(self._saved.read, stretch, kind, numbers).result()
        saved_sum = self._checksums[stretch.name][state.KINDS.index(kind)]
        self._counted = self._thread.submit(state.checksum, numbers, stretch), f"{stretch.name}.{kind}", saved_sum
        self._progress.add(4 * stretch.count)
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
        from tqdm import tqdm

        self._bar = tqdm(desc=done, total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)
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
    layout = dataclasses.asdict(Layout(world_size=1)) | {"zero_stage": 0, "precision": manifest["layout"]["precision"]}
    origin = {"checkpoint": str(source), "layout": manifest["layout"], "files": len(manifest["files"])}
    return manifest | {"layout": layout, "converted_from": origin}


def _ground(output: Path) -> Path:
    """What is there already of the path to a new folder."""
    return next(path for path in output.parents if path.exists())


def _tokenizers(run: Path) -> list[Path]:
    return [run / name for name in ("tokenizer.model", "tokenizer.json") if (run / name).is_file()]


def _bytes_of(entries: Iterable[dict]) -> int:
    return sum(entry["bytes"] for entry in entries)


def _peak_memory_bytes() -> int:
    """Of this process; getrusage would count that of the process which started it."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    run_door(main)
