"""Comparison of the ranks of a run before it begins: a report of each rank, the differences from rank 0, and a table."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from data.command_line import UserError, flatten
from data.files import nearest_existing, sha256_of
from launch import REPOSITORY
from launch.checkpoints.run_record import versions
from launch.ranks.collectives import gather_on_rank0
from launch.ranks.layout import Layout
from launch.ranks.processes import Process, device_index
from launch.training.data import RunData
from launch.training.optimizers import optimizer_for
from launch.training.run_folder import PROBE_PREFIX
from launch.training.settings import RunSettings
from model.config import count_parameters

_PROBE_BYTES = 16 << 20
_STALE_LOCK_SECONDS = 600
"""Age of a lock file from which its build counts as killed; a build of one of DeepSpeed's C++ extensions takes two minutes."""
_LARGEST_CLOCK_DIFFERENCE_SECONDS = 1.0


def probe(settings: RunSettings, merged_json: dict, layout: Layout, process: Process, device: str, data: RunData, file: Path) -> dict:
    """Return the report of this rank, as numbers and text that JSON can hold. Raises UserError if the rank cannot take part at all.

    Leaves `file` in the output's folder, by which rank 0 sees that all ranks write to one disk.
    """
    write_seconds = _seconds_to_write(file)
    chosen = flatten(dataclasses.asdict(settings)) | {f"DeepSpeed's {name}": value for name, value in flatten(merged_json).items()}
    del chosen["deepspeed"]  # the JSON may be in another place on each node
    checkpoint_bytes = optimizer_for(settings.optimizer).checkpoint_bytes * count_parameters(settings.model)
    free = shutil.disk_usage(file.parent).free
    if free < checkpoint_bytes:
        raise UserError(
            f"The disk of output {settings.output} has {free / 2**30:.2f} GiB free; a checkpoint of this model needs "
            f"{checkpoint_bytes / 2**30:.2f} GiB. Free some space, or give another --output."
        )
    _refuse_too_short_a_job(write_seconds * checkpoint_bytes / layout.world_size / _PROBE_BYTES)
    locks = _build_locks()
    for lock, age in locks:
        if age > _STALE_LOCK_SECONDS:
            raise UserError(
                f"{lock} is {age / 60:.0f} minutes old: it was left by a killed build of a DeepSpeed extension, and the next build would "
                "wait for it forever. Delete the file."
            )
    return {
        "device": _device(device),
        "device_id": str(torch.cuda.get_device_properties(device_index(process)).uuid) if device == "cuda" else "",
        "versions": versions() | {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else "none"},
        "code": _code(),
        "settings": json.loads(json.dumps(chosen)),
        "data": data.fingerprint,
        "probe": str(file.absolute()),
        "free_gib": free / 2**30,
        "written_gb_s": _PROBE_BYTES / write_seconds / 1e9,
        "building": [str(lock) for lock, _ in locks],
    }


def check_consistent(reports: list[dict], folder: Path) -> str:
    """Return why the run cannot begin: ranks that cannot take part, or that differ from rank 0. Returns "" if it can begin.

    `folder` is where rank 0 sees the files that `probe` leaves.
    """
    complaints: dict[str, list[dict]] = {}
    for report in reports:
        if "complaint" in report:
            complaints.setdefault(report["complaint"], []).append(report)
    if complaints:  # a complaint of all ranks names none of them
        return "\n".join(text if len(ranks) == len(reports) else f"{_name(ranks)}: {text}" for text, ranks in complaints.items())
    if "data" not in reports[0]:
        return ""
    first = reports[0]
    different: dict[tuple[str, str], list[dict]] = {}
    for report in reports[1:]:
        if differences := _differences(first, report):
            different.setdefault(("differ", f"from rank 0 on {first['host']}: {'; '.join(differences)}."), []).append(report)
        probe = Path(report["probe"])  # nodes may see the disk under other names, and another job may have made a folder meanwhile
        if not (folder / probe.name).exists() and not probe.exists():
            message = f"to another {folder} than rank 0: the output must be on a disk that all nodes share."
            different.setdefault(("write", message), []).append(report)
    lines = [f"{_name(ranks)} {verb}{'s' if len(ranks) == 1 else ''} {what}" for (verb, what), ranks in different.items()]
    shared = Counter((report["host"], report["device_id"]) for report in reports if report["device_id"])
    lines += [
        f"{n} ranks on {host} share one GPU ({device}): there are fewer devices than ranks."
        for (host, device), n in shared.items()
        if n > 1
    ]
    shown = lines[:8] + ([f"... and {len(lines) - 8} more ranks."] if len(lines) > 8 else [])
    return "\n".join(shown)


def measure(process: Process, layout: Layout, device: str) -> dict:
    """Measure the speed of communication with the other ranks in GB/s, and read the clock after a barrier.

    The all-reduce speed is the bus bandwidth of NVIDIA's nccl-tests: 2 (n - 1) / n times the bytes a second.
    """
    target = torch.device(device, device_index(process)) if device == "cuda" else torch.device("cpu")
    tensor = torch.ones(_PROBE_BYTES // 4, device=target)
    n = layout.world_size
    measured = {"all_reduce_gb_s": 2 * (n - 1) / n * _PROBE_BYTES / _seconds(lambda: dist.all_reduce(tensor), target) / 1e9}
    if layout.pipeline_stages > 1:
        stride = n // layout.pipeline_stages
        received = torch.empty_like(tensor)
        next_rank, previous_rank = process.rank + stride, process.rank - stride
        transfers = [dist.P2POp(dist.isend, tensor, next_rank)] if next_rank < n else []
        transfers += [dist.P2POp(dist.irecv, received, previous_rank)] if previous_rank >= 0 else []
        seconds = _seconds(lambda: [request.wait() for request in dist.batch_isend_irecv(transfers)], target)
        if next_rank < n:
            measured["next_stage_gb_s"] = _PROBE_BYTES / seconds / 1e9
    dist.barrier()
    return measured | {"clock": time.time()}


def compare_speeds(store: dist.Store, process: Process, layout: Layout, device: str, reports: list[dict]) -> str:
    """Measure this rank's speeds. Returns the table of all ranks and notes on it, on rank 0; "" on the others."""
    speeds = gather_on_rank0(store, process, "speeds", measure(process, layout, device), 600)
    complete = [report | speed for report, speed in zip(reports, speeds, strict=True)]
    return "\n".join([table(complete), *notes(complete)]) if process.is_first else ""


def table(reports: list[dict]) -> str:
    """Return the reports as a table with a line for each rank, without columns that no rank has."""
    clock = median(report["clock"] for report in reports) if "clock" in reports[0] else 0.0
    columns = {
        "rank": lambda report: str(report["rank"]),
        "host": lambda report: report["host"],
        "device": lambda report: report["device"],
        "torch": lambda report: report["versions"]["torch"],
        "DeepSpeed": lambda report: report["versions"]["deepspeed"],
        "NCCL": lambda report: report["versions"]["nccl"],
        "code": lambda report: _digest(report["code"]),
        "recipe": lambda report: _digest(report["settings"]),
        "data": lambda report: report["data"][:8],
        "free GiB": lambda report: f"{report['free_gib']:,.0f}",
        "disk GB/s": lambda report: f"{report['written_gb_s']:.2f}",
        "clock s": lambda report: f"{report['clock'] - clock:+.2f}",
        "all-reduce GB/s": lambda report: f"{report['all_reduce_gb_s']:.2f}",
        "next stage GB/s": lambda report: f"{report['next_stage_gb_s']:.2f}",
    }
    all_columns = ([name, *(_cell(column, report) for report in reports)] for name, column in columns.items())
    kept = [column for column in all_columns if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in zip(*kept, strict=True)]
    return "\n".join(lines)


def _cell(column: Callable[[dict], str], report: dict) -> str:
    """Return a cell of the table; "" if the report of this rank ended before the value."""
    try:
        return column(report)
    except KeyError:
        return ""


def notes(reports: list[dict]) -> list[str]:
    """Return warnings about what does not stop the run but may harm it: clocks that differ, a slow rank, an unfinished build."""
    lines = []
    clock = median(report["clock"] for report in reports)
    for report in reports:
        name = _name([report])
        if abs(report["clock"] - clock) > _LARGEST_CLOCK_DIFFERENCE_SECONDS:
            lines.append(
                f"The clock of {name} is {report['clock'] - clock:+.1f} s from the median; times in the logs of nodes will not match."
            )
        for speed, what in (("written_gb_s", "writes to the output folder"), ("next_stage_gb_s", "sends to its next stage")):
            usual = median(other[speed] for other in reports if speed in other) if speed in report else 0
            if usual and report[speed] < usual / 3:
                lines.append(f"{name} {what} at {report[speed]:.2f} GB/s; the median is {usual:.2f}.")
        if report["device"] != reports[0]["device"]:
            lines.append(
                f"{name} has {report['device']}, rank 0 has {reports[0]['device']}: every step takes as long as the slowest device."
            )
        lines += [f"{name}: {lock} exists: a build of a DeepSpeed extension is running, or was killed." for lock in report["building"]]
    return lines


def _differences(first: dict, other: dict) -> list[str]:
    """Describe how a rank's report differs from rank 0's, an entry for each difference."""
    lines = [
        f"{name} is {other['versions'][name]}, on rank 0 {version}"
        for name, version in first["versions"].items()
        if other["versions"][name] != version
    ]
    files = sorted(name for name in first["code"].keys() | other["code"].keys() if first["code"].get(name) != other["code"].get(name))
    if files:
        lines.append(f"the code: {', '.join(files[:3])}{f' and {len(files) - 3} more files' if len(files) > 3 else ''}")
    if first["data"] != other["data"]:
        lines.append(f"the data: {', '.join(other['settings']['data.path'])} is {other['data'][:8]}, on rank 0 {first['data'][:8]}")
    changed = [name for name in first["settings"] if first["settings"][name] != other["settings"].get(name)]
    lines += [f"the recipe: {name} is {other['settings'].get(name)}, on rank 0 {first['settings'][name]}" for name in changed[:3]]
    return lines


def _name(ranks: list[dict]) -> str:
    """Name the ranks of some reports: "Ranks 1, 2 on n1, n2"."""
    hosts = sorted({report["host"] for report in ranks})
    numbers = ", ".join(str(report["rank"]) for report in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"Rank{'s' if len(ranks) > 1 else ''} {numbers} on {', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''}"


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def _code() -> dict[str, str]:
    """Return a digest of every Python file of this repository's packages, by path."""
    files = [path for folder in ("model", "data", "launch") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): sha256_of(path)[:8] for path in files}


def _digest(names: dict) -> str:
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:8]


def probe_file(output: str, process: Process) -> Path:
    """Return a file that this rank can try to write without making the output's folder: in the nearest folder above that exists."""
    return nearest_existing(Path(output)) / f"{PROBE_PREFIX}{platform.node()}-{os.getpid()}-{process.rank}"


def _seconds_to_write(path: Path) -> float:
    """Measure how long a file of _PROBE_BYTES takes to reach the disk. Raises UserError if it cannot be written."""
    try:
        start = time.perf_counter()
        with open(path, "wb") as file:
            file.write(os.urandom(1 << 20) * (_PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - start
    except OSError as error:
        raise UserError(f"output: {path.parent} is not writable: {error.strerror}.") from error


def _refuse_too_short_a_job(save_seconds: float) -> None:
    """Raise UserError if SLURM will end the job in less time than two checkpoints take."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    left = int(end) - time.time() if end.isdecimal() else float("inf")
    if left < 2 * save_seconds:
        raise UserError(
            f"The job's time limit leaves {max(0, left):.0f} s, and a checkpoint takes about {save_seconds:.0f} s here, so nothing would "
            "be saved. Give sbatch a longer --time."
        )


def _build_locks() -> list[tuple[Path, float]]:
    """Return the lock files of torch's builds of C++ extensions, with their age in seconds."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))
    locks = [path for path in (*root.glob("*/lock"), *root.glob("*/*/lock"))] if root.is_dir() else []
    ages = []
    for path in locks:
        with contextlib.suppress(FileNotFoundError):  # the build has just ended
            ages.append((path, time.time() - path.stat().st_mtime))
    return ages


def _seconds(communicate: Callable[[], object], target: torch.device) -> float:
    """Return the time of the fastest of three tries, after a first one that opens connections."""
    best = float("inf")
    for attempt in range(4):
        dist.barrier()
        start = time.perf_counter()
        communicate()
        if target.type == "cuda":
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best
