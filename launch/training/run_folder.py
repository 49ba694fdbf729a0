"""Folder of a run: the record of how it was started, and the check whether another start may resume it.

runs/<name>/run.json        recipe, merged DeepSpeed JSON, versions, commit, data: written before the first step
            tokenizer*      copied from the data, with chat templates, so that launch/generate.py needs this folder alone
            generation_config.json   copied from the model of --init
            checkpoints/    see checkpoint.py
            tb/  metrics.jsonl  log.txt
"""

import dataclasses
import json
import os
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from data.command_line import UserError, describe, flatten, replace
from data.files import lock_file, nearest_existing, write_file
from data.recorded_paths import find_path, places_of, require_path
from data.sampling.batch_plan import BatchPlan, BatchSettings, Segment, read_segments
from data.tokenization.companions import GENERATION, companion_files, copy_companions, licence_files, published_configuration
from data.tokenization.configuration import CONFIGURATION, read_configuration, read_json_object, token_content
from launch import REPOSITORY
from launch.checkpoints import checkpoint
from launch.checkpoints.opening import OpenedModel
from launch.checkpoints.run_record import (
    data_paths,
    generation_settings,
    record_paths,
    recorded_paths,
    tokenizer_files,
    versions,
)
from launch.training.initial_model import NOT_IN_THE_WEIGHTS
from launch.training.optimizers import optimizer_for
from launch.training.settings import RunSettings
from model.config import ModelConfig

# Settings that may differ when a run resumes: they change results only by rounding and, with dropout, by which values are dropped.
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
    "pause_tokens",
    "resume",
    "allow_changes",
    "peak_tflops",
    "dry_run",
)

# Settings that decide the order of samples. The batch size does not: after a change a run reads on at its position.
_SAMPLE_ORDER = ("seed", "data.weights", "data.packing", "data.objective", "data.target_length", "data.next_sentence", "data.span_length")

_MODEL_PATHS = ("init", "distillation.teacher")
"""Settings that are the path of another model."""
PROBE_PREFIX = ".preflight-"
"""Start of the names of the files that ranks write before the run begins, to check that they can."""
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
    """How a run starts: its id, and whether it resumes from a checkpoint."""

    run_id: str
    resumes: bool
    plan: BatchPlan
    """The samples that each step reads, if the run resumes from its newest checkpoint."""
    notes: tuple[str, ...] = ()
    """Messages for the log, a line each."""
    changes: tuple[str, ...] = ()
    """Settings and data that differ from those of the run so far, a line each."""
    former: tuple[Segment, ...] = ()
    """The sizes of all steps that the run would have had without a change, as its newest checkpoint has them."""


def find_paths(settings: RunSettings) -> RunSettings:
    """Return the settings of a run that resumes from another working folder, or was moved, with the paths that its record leads to.

    A path is replaced if nothing is at it and the run in `output` recorded the same one.
    """

    def found(name: str, path: str) -> str:
        """Return the place of a path of the setting `name`."""
        recorded = _record_of_missing(settings, name, path)
        return (recorded and find_path(recorded, Path(settings.output))) or path

    path, init, teacher = settings.data.path, settings.init, settings.distillation.teacher
    places = (
        tuple(found("data.path", one) for one in path),
        init and found("init", init),
        teacher and found("distillation.teacher", teacher),
    )
    if places == (path, init, teacher):
        return settings
    data = dataclasses.replace(settings.data, path=places[0])
    distillation = dataclasses.replace(settings.distillation, teacher=places[2])
    return replace(settings, data=data, init=places[1], distillation=distillation)


def refuse_missing_data(settings: RunSettings) -> None:
    """Raise UserError with every place that was tried if the data of a run that resumes is missing."""
    for path in settings.data.path:
        if recorded := _record_of_missing(settings, "data.path", path):
            require_path(recorded, Path(settings.output), "--data")


def _record_of_missing(settings: RunSettings, name: str, path: str) -> dict[str, str] | None:
    """Return the record of a path by the run in `output`; None if something is at the path or the run has not recorded it."""
    if os.path.exists(path):
        return None
    try:
        record = read_json_object(Path(settings.output) / "run.json")
        return next((one for one in recorded_paths(record, name) if one["given"] == path), None) if record else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged run.json, which `inspect` names
        return None


def inspect(settings: RunSettings, fingerprint: str, merged_json: dict) -> Start:
    """Decide between a fresh start and resuming, without changing the folder.

    Raises UserError if the folder holds another run or other files, or cannot be written.
    """
    folder = Path(settings.output)
    record = folder / "run.json"
    parent = nearest_existing(folder)
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise UserError(f"output {folder}: {parent} is not writable.")
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file:
        raise UserError(f"output {folder}: {file} is a file; it must be a folder, or not exist yet.")
    if not record.is_file():
        if folder.is_dir() and not all(_is_ours(path.name) for path in folder.iterdir()):
            raise UserError(f"output {folder} is not a run folder: it has files but no run.json. Give another --output.")
        if settings.resume:
            raise UserError(f"--resume: {folder} has no run to resume. Give the --output of a run, or leave --resume out.")
        return Start(uuid.uuid4().hex[:12], resumes=False, plan=settings.batch_plan)
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        before["run_id"], before["data_fingerprint"], before["recipe"]["data"]["path"], before["starts"], before["deepspeed"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({type(error).__name__}: {error}). Give another --output.") from error
    root = folder / "checkpoints"
    started = checkpoint.published(root) or list(root.glob("step_*.corrupt"))
    if not started:
        if settings.resume:
            raise UserError(f"--resume: {folder} has a run without a checkpoint. Without --resume it starts again from step 0.")
        return Start(
            before["run_id"], False, settings.batch_plan, (f"{folder} has a run without a checkpoint: it starts again from step 0.",)
        )
    newest = _newest_manifest(root)
    refusal = optimizer_for(settings.optimizer).refusal_of(*newest) if newest else None
    changed = _changes(before, settings, fingerprint, merged_json)
    if changed and not settings.allow_changes:
        advice = refusal or "Give another --output, or --allow_changes to resume with the new settings."
        raise UserError("\n".join([f"{folder} has another run:", *(f"  {line}" for line in changed), advice]))
    plan, notes = settings.batch_plan, [f"Resuming with a change: {line}" for line in changed]
    former: tuple[Segment, ...] = ()
    if newest:
        _refuse_other_model(*newest, settings)
        if refusal:
            raise UserError(refusal)
        plan = plan_after(settings, newest[1])
        if newest[1]["step"] > plan.steps:
            raise UserError(f"{newest[0]} is already beyond the {plan.steps} steps of this command. Nearest: {newest[1]['step']}.")
        former = _segments_in(newest[1], settings)
        notes += _notes_on_batch(before["recipe"], settings, plan.size(newest[1]["step"]), former)
    return Start(before["run_id"], True, plan, (*notes, *_note_on_order(changed, settings)), tuple(changed), former)


def _notes_on_batch(recipe: dict, settings: RunSettings, size: int, segments: Sequence[Segment]) -> list[str]:
    """Return notes if steps of `size` have another learning rate or beta2 than with the recorded recipe only because the ramp is another.

    `segments` are those of the run so far. If none has this size, there is nothing to keep.
    """
    if size not in {one.size for one in segments}:
        return []
    fields = {field.name for field in dataclasses.fields(BatchSettings)}
    former = BatchSettings(**{name: value for name, value in recipe["batch"].items() if name in fields})
    now, optimizer = settings.batch, settings.optimizer
    because = "because it follows from batch.ramp and batch.global_batch_size. To keep it, give"
    notes, rate, factors = [], optimizer.learning_rate, (former.rate_factor(size), now.rate_factor(size))
    before, after = (rate * factor for factor in factors)
    if before != after and rate == recipe["optimizer"]["learning_rate"]:
        notes.append(
            f"The peak learning rate of a step of {size} samples changes from {before:.3g} to {after:.3g}, {because} "
            f"--optimizer.learning_rate {rate * factors[0] / factors[1]:.3g}."
        )
    before, after = former.beta2(size, optimizer.beta2), now.beta2(size, optimizer.beta2)
    if before != after and (optimizer.beta2, now.beta2_rule) == (recipe["optimizer"]["beta2"], former.beta2_rule):
        notes.append(
            f"beta2 of a step of {size} samples changes from {before:.4g} to {after:.4g}, {because} "
            f"--optimizer.beta2 {before ** (now.global_batch_size / size):.6g}."
        )
    return notes


def _note_on_order(changed: list[str], settings: RunSettings) -> list[str]:
    """Return a note if the order of samples differs from that of the run so far, because the positions then stand for other samples."""
    orders = (*_SAMPLE_ORDER, *(["data.mask_rate"] if settings.model.architecture == "encoder_decoder" else []), "the data", "the samples")
    names = [name for name in (line.partition(":")[0] for line in changed) if name in orders]
    if not names:
        return []
    return [
        f"The order of samples changes with {', '.join(names)}: samples that the run has read may be read again, and others that it has "
        "not read come later than without the change."
    ]


def find_plan(settings: RunSettings) -> tuple[BatchPlan, int]:
    """Return the samples that each step reads, and the step to begin with: that of the newest checkpoint, 0 without one.

    Only `inspect` tells whether the run may resume with these settings.
    """
    newest = _newest_manifest(Path(settings.output) / "checkpoints")
    if newest is None:
        return settings.batch_plan, 0
    step, segments = newest[1]["step"], _segments_in(newest[1], settings)
    if settings.batch.ramp and not settings.batch_plan.begins_with(step, segments):  # `inspect` refuses it
        return settings.batch_plan, step
    return settings.batch_plan.after(step, segments), step


def plan_after(settings: RunSettings, manifest: dict) -> BatchPlan:
    """Return the samples that each step reads in a run that resumes from the checkpoint with this manifest.

    Raises UserError if the run has read other sizes than batch.ramp gives.
    """
    step, segments = manifest["step"], _segments_in(manifest, settings)
    if settings.batch.ramp and not settings.batch_plan.begins_with(step, segments):
        taken = [
            f"{one.size} from token {one.first_position * settings.model.sequence_length:,}" for one in segments if one.first_step < step
        ]
        tokens = dataclasses.replace(settings.batch_plan, segments=segments).tokens_before(step)
        advice = f"Keep these sizes; only those after token {tokens:,}, where the newest checkpoint ends, can be changed."
        if settings.batch.is_seesaw:
            advice = _list_in_place_of_seesaw(settings, [one for one in segments if one.first_step < step])
        raise UserError(f"{describe(settings, 'batch.ramp')} gives other sizes than the run has read: {', '.join(taken)}. {advice}")
    return settings.batch_plan.after(step, segments)


def _list_in_place_of_seesaw(settings: RunSettings, taken: Sequence[Segment]) -> str:
    """Return advice for a run whose length or schedule has changed after it read the sizes `taken`."""
    batch, optimizer, last = settings.batch, settings.optimizer, taken[-1].size
    ramp = " ".join(f"{one.first_position * settings.model.sequence_length}:{one.size}" for one in taken)
    options = [f'--batch.ramp "{ramp}"', f"--batch.global_batch_size {last}"]
    options.append(f"--optimizer.learning_rate {optimizer.learning_rate * batch.rate_factor(last):.6g}")
    if batch.beta2_rule != BatchSettings.beta2_rule:
        options.append(f"--optimizer.beta2 {batch.beta2(last, optimizer.beta2):.6g}")
    return (
        "The sizes of seesaw follow from the length of the run and from its schedule. To change these and keep sizes and rates, give "
        f"{' '.join(options)} --allow_changes."
    )


def _segments_in(manifest: dict, settings: RunSettings) -> tuple[Segment, ...]:
    """Return the sizes of the steps as a checkpoint's manifest has them."""
    # A version without batch_plan read equally many samples at every step, also before a change.
    whole = [
        {"first_step": 0, "first_position": 0, "size": manifest.get("data", {}).get("samples_per_step", settings.batch.global_batch_size)}
    ]
    return read_segments(manifest.get("batch_plan", whole))


def _is_ours(name: str) -> bool:
    """True for the name of a file that a start may leave that ended before its first record."""
    return name in ("run.json.tmp", checkpoint.LOCK_NAME) or name.startswith(PROBE_PREFIX)


def lock(settings: RunSettings, patience_seconds: float = 0) -> BinaryIO:
    """Lock the run's folder for this process until the returned file is closed.

    Raises UserError if another process still has the lock after `patience_seconds`.
    """
    folder = Path(settings.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock_file(folder / checkpoint.LOCK_NAME, patience_seconds, warning="Make sure that no second run trains in it.")
    except OSError as error:
        raise UserError(f"output {folder}: {error.filename} is not writable: {error.strerror}.") from error
    if file is None:
        raise UserError(f"Another process is training in {folder}. Wait for it, or give another --output.")
    for left_over in folder.glob(f"{PROBE_PREFIX}*"):
        left_over.unlink(missing_ok=True)
    return file


def record(
    settings: RunSettings, merged_json: dict, start: Start, fingerprint: str, tokenizer: Path, initial: OpenedModel | None = None
) -> None:
    """Write run.json and the tokenizer before the first step. A run that resumes adds to its starts and changes.

    `initial` is the model that the run starts from: the files next to its weights are copied.
    """
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    changes = before.get("changes", []) if start.resumes else []
    changes += [{"time": now, "lines": list(start.changes)}] if start.changes else []
    kept = ("init_fingerprint", "teacher_fingerprint", "batch_plan", "data_stamps")
    about = {name: before[name] for name in kept if start.resumes and name in before} | {
        "run_id": start.run_id,
        "recipe": dataclasses.asdict(settings),
        "paths": record_paths(dataclasses.asdict(settings), folder),
        "deepspeed": merged_json,
        "data_fingerprint": fingerprint,
        "versions": versions(),
        "commit": _commit(),
        "starts": [*before.get("starts", []), now],
        "changes": changes,
    }
    write_file(path, json.dumps(about, indent=1))
    _copy_tokenizer(folder, tokenizer, initial, start.resumes)
    if not start.resumes:
        generation = generation_settings(initial.root) if initial and settings.model.architecture != "encoder" else {}
        (folder / GENERATION).unlink(missing_ok=True)  # from an earlier start on other weights
        if generation:
            write_file(folder / GENERATION, json.dumps(generation, indent=2))
        for file in licence_files(initial.root) if initial else []:
            write_file(folder / file.name, file.read_bytes())


def _copy_tokenizer(folder: Path, tokenizer: Path, initial: OpenedModel | None, resumes: bool) -> None:
    """Copy the data's tokenizer into a run folder, with the files that belong to it.

    If it has none, those of the initial model are used, provided that it has the same tokenizer.
    """
    source, copy = tokenizer.parent, folder / tokenizer.name
    is_published = bool(published_configuration(source))
    if resumes and not is_published and copy.is_file() and copy.read_bytes() == tokenizer.read_bytes():
        return  # the files next to it may be those of the initial model, which is not opened again
    new = [path for path in (tokenizer, source / CONFIGURATION, *companion_files(source)) if path.is_file()]
    names = [path.relative_to(source) for path in new]
    for path in tokenizer_files(folder):
        if path.relative_to(folder) not in names:  # from an earlier start on other data
            path.unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, (source / name).read_bytes())
    other = initial.tokenizer if initial else None
    if is_published or other is None or other.read_bytes() != tokenizer.read_bytes():
        return
    if published := published_configuration(other.parent):
        own = read_configuration(folder)
        roles = {key: str(token_content(value)) for key, value in own.items() if key.endswith("_token")}
        others = {key: value for key, value in own.items() if key not in roles}
        copy_companions(other.parent, folder, published | others, roles)


def describe_new_size(settings: RunSettings, plan: BatchPlan, first_step: int, former: tuple[Segment, ...]) -> str | None:
    """Return a line on what changes with the batch size at the step that a run resumes at; None if it does not change there.

    `former` are the sizes that the run would have had without a change.
    """
    if not 0 < first_step < plan.steps or settings.batch.ramp or plan.segments[-1].first_step != first_step:
        return None
    before = dataclasses.replace(plan, segments=former)
    if before.size(first_step) == plan.size(first_step):
        return None
    text = (
        f"From step {first_step + 1} on a step reads {plan.size(first_step)} samples in place of {before.size(first_step)}, the first of "
        f"them at position {plan.position(first_step):,}: none is read twice or left out. "
    )
    if settings.train_steps is not None:
        samples = [f"{one.position(one.steps):,}" for one in (plan, before)]
        return text + f"train_steps {plan.steps:,} stays, so the run reads {samples[0]} samples in place of {samples[1]}."
    return text + f"train_tokens {settings.train_tokens:,.0f} stays, so the run has {plan.steps:,} steps in place of {before.steps:,}."


def record_data(settings: RunSettings, plan: BatchPlan, stamps: list[dict[str, list[int]]]) -> None:
    """Add to run.json the samples that each step reads, for data/show.py, and size and time of the files of each data folder.

    A resume reads the samples of each step from its checkpoint.
    """
    path = Path(settings.output) / "run.json"
    write_file(path, json.dumps(json.loads(path.read_text()) | {"batch_plan": plan.record(), "data_stamps": stamps}, indent=1))


def record_initial_weights(settings: RunSettings, fingerprint: str) -> None:
    """Add to run.json a hash of the weights that a run with --init starts from."""
    path = Path(settings.output) / "run.json"
    write_file(path, json.dumps(json.loads(path.read_text()) | {"init_fingerprint": fingerprint}, indent=1))


def record_teacher(settings: RunSettings, fingerprint: str) -> str | None:
    """Add to run.json a hash of the teacher's weights.

    Returns a message, and records nothing, if the run had another teacher before and --allow_changes is not given.
    """
    path = Path(settings.output) / "run.json"
    about = json.loads(path.read_text())
    if about.get("teacher_fingerprint", fingerprint) != fingerprint and not settings.allow_changes:
        return (
            f"distillation.teacher {settings.distillation.teacher} has other weights than the teacher of {settings.output} so far. "
            "Give that teacher's checkpoint, or --allow_changes to resume with this one."
        )
    write_file(path, json.dumps(about | {"teacher_fingerprint": fingerprint}, indent=1))
    return None


def _changes(before: dict, settings: RunSettings, fingerprint: str, merged_json: dict) -> list[str]:
    """Describe every setting that changes the mathematics and differs from run.json, and the data if it differs."""
    old, new = flatten(before["recipe"]), flatten(json.loads(json.dumps(dataclasses.asdict(settings))))
    changed = []
    if "data.packing" not in old:  # a run of a version without this setting
        changed.append("the samples: they began one token later, and the first token of the data was never predicted")
    old = flatten(json.loads(json.dumps(dataclasses.asdict(RunSettings())))) | old  # settings that an older version did not have
    for name in _MODEL_PATHS:
        if new[name] and any(_is_at(new[name], one, Path(settings.output)) for one in recorded_paths(before, name)):
            old[name] = new[name]  # another spelling of the same path
    changed += [
        f"{name}: {old.get(name)} -> {value}" for name, value in new.items() if not name.startswith(_HARMLESS) and old.get(name) != value
    ]
    saved, current = flatten(before["deepspeed"]), flatten(merged_json)
    changed += [
        f"{settings.deepspeed}: {name} {json.dumps(saved.get(name, False))} -> {json.dumps(current.get(name, False))}"
        for name in saved | current
        if name.startswith(_MATHEMATICAL_KEYS) and saved.get(name, False) != current.get(name, False)
    ]
    if before["data_fingerprint"] != fingerprint:
        saved_paths, paths = ", ".join(data_paths(before["recipe"])), ", ".join(settings.data.path)
        changed.append(f"the data: {saved_paths} {before['data_fingerprint'][:12]} -> {paths} {fingerprint[:12]}")
    return changed


def _is_at(path: str, recorded: dict[str, str], run: Path) -> bool:
    """True if a path leads to one of the places of a recorded path."""
    return os.path.realpath(path) in map(os.path.realpath, places_of(recorded, run))


def _newest_manifest(root: Path) -> tuple[Path, dict] | None:
    """Return the newest checkpoint whose manifest can be read, with the manifest."""
    for folder in checkpoint.published(root):
        try:
            return folder, checkpoint.read_manifest(folder)
        except UserError:  # skipped here, and reported when the run resumes
            continue
    return None


def _refuse_other_model(folder: Path, manifest: dict, settings: RunSettings) -> None:
    """Raise UserError if a checkpoint has another model, or a format that is no longer read."""
    saved, current = (dataclasses.asdict(model) for model in (ModelConfig(**manifest["model"]), settings.model))
    differences = [
        f"{name}: {saved[name]} in the checkpoint, {value} in this command"
        for name, value in current.items()
        if name not in NOT_IN_THE_WEIGHTS and saved[name] != value
    ]
    if differences:
        raise UserError(f"{folder} is a checkpoint of another model:\n" + "\n".join(f"  {line}" for line in differences))
    checkpoint.refuse_earlier_format(folder, manifest)


def _commit() -> str | None:
    """Return the commit of this repository; None if it is unknown."""
    try:
        described = subprocess.run(["git", "-C", REPOSITORY, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
