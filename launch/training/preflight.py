"""The nodes of a run compared before it begins: what each rank has, in one table, and the first thing in which one differs."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from data.command_line import UserError, flatten
from data.files import nearest_existing, sha256_of
from launch import REPOSITORY
from launch.checkpoints.run_record import versions
from launch.ranks.layout import Layout
from launch.ranks.processes import Process, device_number
from launch.ranks.rendezvous import gather
from launch.training.data import RunData
from launch.training.optimizers import optimizer_for
from launch.training.run_folder import PROBE
from launch.training.settings import RunSettings
from model.config import count_parameters

_PROBE_BYTES = 16 << 20
_STALE_LOCK_SECONDS = 600
"""A build of one of DeepSpeed's helpers takes two minutes; what is older belongs to one that was killed."""
_LARGEST_CLOCK_DIFFERENCE_SECONDS = 1.0


def look(settings: RunSettings, merged_json: dict, layout: Layout, process: Process, device: str, data: RunData, probe: Path) -> dict:
    """What this rank has: numbers and names that JSON can hold. Raises UserError where it cannot take part at all.

    Leaves the file `probe` in the output's folder, for rank 0 to see that all write to one disk.
    """
    write_seconds = _seconds_to_write(probe)
    chosen = flatten(dataclasses.asdict(settings)) | {f"DeepSpeed's {name}": value for name, value in flatten(merged_json).items()}
    del chosen["deepspeed"]  # where the JSON lies is no matter
    checkpoint_bytes = optimizer_for(settings.optimizer).checkpoint_bytes * count_parameters(settings.model)
    free = shutil.disk_usage(probe.parent).free
    if free < checkpoint_bytes:
        raise UserError(
            f"{settings.output} has {free / 2**30:.2f} GiB free; a checkpoint of this model takes {checkpoint_bytes / 2**30:.2f} GiB."
        )
    _refuse_too_short_a_job(write_seconds * checkpoint_bytes / layout.world_size / _PROBE_BYTES)
    locks = _build_locks()
    for lock, age in locks:
        if age > _STALE_LOCK_SECONDS:
            raise UserError(
                f"{lock} is {age / 60:.0f} minutes old: a build of DeepSpeed's was killed there, and the next one would wait for it "
                "without a word. Delete the file."
            )
    return {
        "device": _device(device),
        "device_id": str(torch.cuda.get_device_properties(device_number(process)).uuid) if device == "cuda" else "",
        "versions": versions() | {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else "none"},
        "code": _code(),
        "settings": json.loads(json.dumps(chosen)),
        "data": data.fingerprint,
        "probe": probe.name,
        "free_gib": free / 2**30,
        "written_gb_s": _PROBE_BYTES / write_seconds / 1e9,
        "building": [str(lock) for lock, _ in locks],
    }


def verdict(reports: list[dict], ground: Path) -> str:
    """Why the run cannot begin, or nothing: ranks that cannot take part, or are not as rank 0 is, whose probe lies in `ground`."""
    complaints: dict[str, list[dict]] = {}
    for report in reports:
        if "complaint" in report:
            complaints.setdefault(report["complaint"], []).append(report)
    if complaints:  # what all of them say is no matter of one node
        return "\n".join(sentence if len(ranks) == len(reports) else f"{_who(ranks)}: {sentence}" for sentence, ranks in complaints.items())
    if "data" not in reports[0]:
        return ""
    first, unlike = reports[0], {}
    for report in reports[1:]:
        if differences := _differences(first, report):
            unlike.setdefault(("differ", f"from rank 0 on {first['host']}: {'; '.join(differences)}."), []).append(report)
        if not (ground / report["probe"]).exists():
            unlike.setdefault(("write", f"to another {ground} than rank 0 does: the output must be on a shared disk."), []).append(report)
    lines = [f"{_who(ranks)} {verb}{'s' if len(ranks) == 1 else ''} {what}" for (verb, what), ranks in unlike.items()]
    shared = Counter((report["host"], report["device_id"]) for report in reports if report["device_id"])
    lines += [f"{n} ranks on {host} have one GPU ({device}): fewer devices than ranks." for (host, device), n in shared.items() if n > 1]
    shown = lines[:8] + ([f"... and {len(lines) - 8} more ranks."] if len(lines) > 8 else [])
    return "\n".join(shown)


def measure(process: Process, layout: Layout, device: str) -> dict:
    """How fast this rank speaks with the others, in GB/s, and its clock behind a barrier.

    All-reduce is the bus bandwidth of NVIDIA's nccl-tests: 2 (n - 1) / n times the bytes a second.
    """
    place = torch.device(device, device_number(process)) if device == "cuda" else torch.device("cpu")
    tensor = torch.ones(_PROBE_BYTES // 4, device=place)
    n = layout.world_size
    measured = {"all_reduce_gb_s": 2 * (n - 1) / n * _PROBE_BYTES / _seconds(lambda: dist.all_reduce(tensor), place) / 1e9}
    if layout.pipeline_stages > 1:
        stride = n // layout.pipeline_stages
        received = torch.empty_like(tensor)
        ahead, behind = process.rank + stride, process.rank - stride
        swap = [dist.P2POp(dist.isend, tensor, ahead)] if ahead < n else []
        swap += [dist.P2POp(dist.irecv, received, behind)] if behind >= 0 else []
        seconds = _seconds(lambda: [one.wait() for one in dist.batch_isend_irecv(swap)], place)
        if ahead < n:
            measured["next_stage_gb_s"] = _PROBE_BYTES / seconds / 1e9
    dist.barrier()
    return measured | {"clock": time.time()}


def compare_speeds(store: dist.Store, process: Process, layout: Layout, device: str, reports: list[dict]) -> str:
    """Measure, and, on rank 0, the whole table and what is to be noted of it."""
    speeds = gather(store, process, "speeds", measure(process, layout, device), 600)
    complete = [report | speed for report, speed in zip(reports, speeds, strict=True)]
    return "\n".join([table(complete), *notes(complete)]) if process.is_first else ""


def table(reports: list[dict]) -> str:
    """One line a rank."""
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

    def cell(column, report: dict) -> str:
        try:
            return column(report)
        except KeyError:  # this rank did not come so far
            return ""

    filled = ([name, *(cell(column, report) for report in reports)] for name, column in columns.items())
    kept = [column for column in filled if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in zip(*kept, strict=True)]
    return "\n".join(lines)


def notes(reports: list[dict]) -> list[str]:
    """What does not forbid the run and may spoil it: clocks that differ, a rank that is slower than the others, a build under way."""
    lines = []
    clock = median(report["clock"] for report in reports)
    for report in reports:
        who = _who([report])
        if abs(report["clock"] - clock) > _LARGEST_CLOCK_DIFFERENCE_SECONDS:
            lines.append(f"The clock of {who} is {report['clock'] - clock:+.1f} s off; times in logs will not fit together.")
        for name, words in (("written_gb_s", "writes to the output folder"), ("next_stage_gb_s", "sends to its next stage")):
            usual = median(other[name] for other in reports if name in other) if name in report else 0
            if usual and report[name] < usual / 3:
                lines.append(f"{who} {words} at {report[name]:.2f} GB/s, the median is {usual:.2f}.")
        if report["device"] != reports[0]["device"]:
            lines.append(f"{who} has {report['device']}, rank 0 has {reports[0]['device']}: the slowest sets the pace.")
        lines += [f"{who}: {lock} is there: a build of DeepSpeed's is under way, or was killed." for lock in report["building"]]
    return lines


def _differences(first: dict, other: dict) -> list[str]:
    """In words, what of a rank is not as rank 0's."""
    lines = [
        f"{name} {other['versions'][name]} there, {version} on rank 0"
        for name, version in first["versions"].items()
        if other["versions"][name] != version
    ]
    files = sorted(name for name in first["code"].keys() | other["code"].keys() if first["code"].get(name) != other["code"].get(name))
    if files:
        lines.append(f"the code: {', '.join(files[:3])}{f' and {len(files) - 3} more files' if len(files) > 3 else ''}")
    if first["data"] != other["data"]:
        lines.append(f"the data: {', '.join(other['settings']['data.path'])} is {other['data'][:8]} there, {first['data'][:8]} on rank 0")
    changed = [name for name in first["settings"] if first["settings"][name] != other["settings"].get(name)]
    lines += [f"the recipe: {name} is {other['settings'].get(name)} there, {first['settings'][name]} on rank 0" for name in changed[:3]]
    return lines


def _who(ranks: list[dict]) -> str:
    hosts = sorted({report["host"] for report in ranks})
    numbers = ", ".join(str(report["rank"]) for report in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"Rank{'s' if len(ranks) > 1 else ''} {numbers} on {', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''}"


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def _code() -> dict[str, str]:
    """The digest of every file that a run is made of, by name."""
    files = [path for folder in ("model", "data", "launch") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): sha256_of(path)[:8] for path in files}


def _digest(names: dict) -> str:
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:8]


def probe_of(output: str, process: Process) -> Path:
    """Where a rank tries to write, without making the output's folder: the nearest one above it that is there."""
    return nearest_existing(Path(output)) / f"{PROBE}{platform.node()}-{os.getpid()}-{process.rank}"


def _seconds_to_write(probe: Path) -> float:
    """That a file of _PROBE_BYTES takes to reach the disk. Raises UserError where it cannot."""
    try:
        start = time.perf_counter()
        with open(probe, "wb") as file:
            file.write(os.urandom(1 << 20) * (_PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - start
    except OSError as error:
        raise UserError(f"output: nothing can be written in {probe.parent}: {error.strerror}.") from error


def _refuse_too_short_a_job(save_seconds: float) -> None:
    """Raise UserError where SLURM will end the job before a checkpoint could be written twice over."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    left = int(end) - time.time() if end.isdecimal() else float("inf")
    if left < 2 * save_seconds:
        raise UserError(
            f"The job's time limit leaves {max(0, left):.0f} s, and a checkpoint takes about {save_seconds:.0f} s here: nothing would be "
            "saved. Give sbatch a longer --time."
        )


def _build_locks() -> list[tuple[Path, float]]:
    """Lock files of torch's builds of C++ extensions, with their age in seconds."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))
    found = [path for path in (*root.glob("*/lock"), *root.glob("*/*/lock"))] if root.is_dir() else []
    ages = []
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # that build has just ended
            ages.append((path, time.time() - path.stat().st_mtime))
    return ages


def _seconds(act, place: torch.device) -> float:
    """The best of a few tries behind a first one, which opens connections."""
    best = float("inf")
    for attempt in range(4):
        dist.barrier()
        start = time.perf_counter()
        act()
        if place.type == "cuda":
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best
