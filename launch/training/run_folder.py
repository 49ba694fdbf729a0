"""The folder of a run: what it was started with, and whether a second start may go on in it.

runs/<name>/run.json        recipe, merged DeepSpeed JSON, versions, commit, data: written before the first step
            tokenizer*      copied from the data, so that the folder alone can generate
            checkpoints/    see checkpoint.py
            tb/  metrics.jsonl  log.txt
"""

import dataclasses
import json
import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from data.command_line import UserError, flatten
from data.files import lock_file, nearest_existing, write_file
from launch import REPOSITORY
from launch.checkpoints import checkpoint
from launch.checkpoints.run_record import TOKENIZER_CONFIGURATION, paths_of, tokenizer_files, versions
from launch.training.settings import NOT_IN_THE_WEIGHTS, RunSettings
from model.config import ModelConfig

# What may differ when a run goes on: it changes no number but by rounding, and, under dropout, by which ones are dropped.
_HARMLESS = (
    "deepspeed",
    "output",
    "size",
    "data.path",
    "data.max_epochs",
    "data.vocab_size",
    "batch.micro_batch_size",
    "pipeline_stages",
    "tensor_parallel_size",
    "sequence_parallel_size",
    "rendezvous_seconds",
    "communication_timeout",
    "preflight",
    "recompute",
    "compile",
    "log.",
    "checkpoint.",
    "resume",
    "allow_changes",
    "peak_tflops",
    "dry_run",
)


LOCK = ".lock"
PROBE = ".preflight-"
"""How the names of files begin that ranks write before they agree, to see that they can."""
_MATHEMATICAL_KEYS = (
    "communication_data_type",
    "data_types.",
    "prescale_gradients",
    "gradient_predivide_factor",
    "bf16.",
    "fp16.",
    "zero_optimization.zero_quantized_",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run starts: its id, and whether there is one to go on with."""

    run_id: str
    goes_on: bool
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    """Settings and data that are others from here on, a line each."""


def inspect(settings: RunSettings, fingerprint: str, merged_json: dict) -> Start:
    """Decide on a fresh start or going on, changing nothing. Raises UserError where the folder holds another run or something else."""
    folder = Path(settings.output)
    record = folder / "run.json"
    ground = nearest_existing(folder)
    if ground.is_dir() and not os.access(ground, os.W_OK):
        raise UserError(f"output {folder}: {ground} cannot be written.")
    in_the_way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way:
        raise UserError(f"output {folder}: {in_the_way} is a file; it must be a folder or not be there yet.")
    if not record.is_file():
        if folder.is_dir() and not all(_is_ours(path.name) for path in folder.iterdir()):
            raise UserError(f"output {folder} holds files but no run.json: not a run of ours. Give another --output.")
        if settings.resume:
            raise UserError(f"--resume: {folder} holds no run to go on with.")
        return Start(uuid.uuid4().hex[:12], goes_on=False)
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        before["run_id"], before["data_fingerprint"], before["recipe"]["data"]["path"], before["starts"], before["deepspeed"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({type(error).__name__}: {error}). Give another --output.") from error
    root = folder / "checkpoints"
    started = checkpoint.published(root) or list(root.glob("step_*.corrupt"))
    if not started:
        if settings.resume:
            raise UserError(f"--resume: {folder} holds a run without a checkpoint. Without --resume it starts again from step 0.")
        return Start(before["run_id"], False, (f"{folder} holds a run that never reached a checkpoint: it starts again from step 0.",))
    changed = _changes(before, settings, fingerprint, merged_json)
    if changed and not settings.allow_changes:
        raise UserError(
            f"{folder} holds another run:\n" + "\n".join(f"  {line}" for line in changed) + "\n"
            "Give another --output, or --allow_changes to go on with the new settings."
        )
    if newest := _newest_manifest(root):
        _refuse_other_model(*newest, settings)
        if newest[1]["step"] > settings.batch_plan.steps:
            raise UserError(
                f"{newest[0]} is already beyond the {settings.batch_plan.steps} steps that are asked for. Nearest: {newest[1]['step']}."
            )
    return Start(before["run_id"], True, tuple(f"Going on with a change: {line}" for line in changed), tuple(changed))


def _is_ours(name: str) -> bool:
    """Whether a start that did not come to its first record may have left this."""
    return name in ("run.json.tmp", LOCK) or name.startswith(PROBE)


def lock(settings: RunSettings, patience_seconds: float = 0) -> BinaryIO:
    """Hold the run's folder for this process, until the returned file is closed. Raises UserError where another start holds it."""
    folder = Path(settings.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_file(folder / LOCK, patience_seconds, warning="Make sure that no second run trains in it.")
    except OSError as error:
        raise UserError(f"output {folder}: {error.filename} cannot be written: {error.strerror}.") from error
    if held is None:
        raise UserError(f"Another process is training in {folder}. Wait for it, or give another --output.")
    for left_over in folder.glob(f"{PROBE}*"):
        left_over.unlink(missing_ok=True)
    return held


def record(settings: RunSettings, merged_json: dict, start: Start, fingerprint: str, tokenizer: Path) -> None:
    """Write run.json and the tokenizer, before the first step. A run that goes on adds to its starts and changes."""
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    changes = before.get("changes", []) if start.goes_on else []
    changes += [{"time": now, "lines": list(start.changes)}] if start.changes else []
    about = {name: before[name] for name in ("init_fingerprint", "teacher_fingerprint") if start.goes_on and name in before} | {
        "run_id": start.run_id,
        "recipe": dataclasses.asdict(settings),
        "deepspeed": merged_json,
        "data_fingerprint": fingerprint,
        "versions": versions(),
        "commit": _commit(),
        "starts": [*before.get("starts", []), now],
        "changes": changes,
    }
    write_file(path, json.dumps(about, indent=1))
    copied = [path for path in (tokenizer, tokenizer.with_name(TOKENIZER_CONFIGURATION)) if path.is_file()]
    for path in tokenizer_files(folder):
        if path.name not in [one.name for one in copied]:  # of an earlier start on other data
            path.unlink()
    for path in copied:
        write_file(folder / path.name, path.read_bytes())


def note_beginning(settings: RunSettings, fingerprint: str) -> None:
    """Add to run.json what a run that starts from other weights has read: a hash of its parameters' checksums."""
    path = Path(settings.output) / "run.json"
    write_file(path, json.dumps(json.loads(path.read_text()) | {"init_fingerprint": fingerprint}, indent=1))


def note_teacher(settings: RunSettings, fingerprint: str) -> str | None:
    """Add to run.json a hash of the weights that the run learns from; a sentence where it has learnt from others and may not change."""
    path = Path(settings.output) / "run.json"
    about = json.loads(path.read_text())
    if about.get("teacher_fingerprint", fingerprint) != fingerprint and not settings.allow_changes:
        return (
            f"distillation.teacher {settings.distillation.teacher} holds other weights than those that {settings.output} has learnt from. "
            "Give the checkpoint that it was, or --allow_changes to go on with these."
        )
    write_file(path, json.dumps(about | {"teacher_fingerprint": fingerprint}, indent=1))
    return None


def _changes(before: dict, settings: RunSettings, fingerprint: str, merged_json: dict) -> list[str]:
    old, new = flatten(before["recipe"]), flatten(json.loads(json.dumps(dataclasses.asdict(settings))))
    changed = []
    if "data.packing" not in old:  # by a version that had none
        changed.append("the samples: they began one token later, and the first token of the data was never predicted")
    old = flatten(json.loads(json.dumps(dataclasses.asdict(RunSettings())))) | old  # what a version had no setting for
    changed += [
        f"{name}: {old.get(name)} -> {value}" for name, value in new.items() if not name.startswith(_HARMLESS) and old.get(name) != value
    ]
    there, here = flatten(before["deepspeed"]), flatten(merged_json)
    changed += [
        f"{settings.deepspeed}: {name} {json.dumps(there.get(name, False))} -> {json.dumps(here.get(name, False))}"
        for name in there | here
        if name.startswith(_MATHEMATICAL_KEYS) and there.get(name, False) != here.get(name, False)
    ]
    if before["data_fingerprint"] != fingerprint:
        there, here = paths_of(before["recipe"]), ", ".join(settings.data.path)
        changed.append(f"the data: {', '.join(there)} {before['data_fingerprint'][:12]} -> {here} {fingerprint[:12]}")
    return changed


def _newest_manifest(root: Path) -> tuple[Path, dict] | None:
    for folder in checkpoint.published(root):
        try:
            return folder, checkpoint.read_manifest(folder)
        except UserError:  # passed over and named when the run goes on
            continue
    return None


def _refuse_other_model(folder: Path, manifest: dict, settings: RunSettings) -> None:
    there, here = (dataclasses.asdict(model) for model in (ModelConfig(**manifest["model"]), settings.model))
    differences = [
        f"{name}: {there[name]} there, {here[name]} now" for name in here if name not in NOT_IN_THE_WEIGHTS and there[name] != here[name]
    ]
    if differences:
        raise UserError(f"{folder} is a checkpoint of another model:\n" + "\n".join(f"  {line}" for line in differences))
    checkpoint.refuse_earlier_format(folder, manifest)


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "-C", REPOSITORY, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None
