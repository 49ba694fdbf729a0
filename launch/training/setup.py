"""Preparation of a rank before it trains: find the other ranks, check its machine, compare with them, and join one process group."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from data.command_line import UserError, status_and_message
from data.tokenization.comparison import tokens_differ
from launch.checkpoints.initial import InitialWeights
from launch.checkpoints.opening import OpenedModel
from launch.ranks import processes
from launch.ranks.collectives import RanksMissing, broadcast_from_rank0, describe_lost_ranks, gather_on_rank0
from launch.ranks.launchers import without_local_rank
from launch.ranks.layout import Layout
from launch.ranks.processes import Process
from launch.ranks.rendezvous import connect
from launch.training import deepspeed_config, preflight, run_folder
from launch.training.communication import initialize_communication
from launch.training.data import RunData, open_data, prepare_embedded_corpus, refuse_too_many_epochs, wait_for, will_be_prepared
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.planning.memory import DeviceType
from launch.training.planning.micro_batch import device_bytes, refuse_what_cannot_fit, share_and_complete
from launch.training.settings import RunSettings
from launch.training.teacher import Teacher
from model.transformer import Block, Transformer

LONGEST_CHECK_SECONDS = 600
"""Longest time that a rank may take to prepare the embedded corpus, or to read and hash its data."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """One rank that is ready to train, in a run whose other ranks are ready too."""

    settings: RunSettings
    """Settings of the run, with the micro-batch size and stages that follow from the number of ranks."""
    process: Process
    device: DeviceType
    """Type of the device."""
    layout: Layout
    merged_json: dict
    """DeepSpeed's JSON with every "auto" filled in."""
    data: RunData | None
    """Data of the run; None in a dry run for which the data would be prepared first."""
    start: run_folder.Start | None
    """How the run starts; None if `data` is None."""
    initial: InitialWeights | None
    """Weights that a run with --init starts from; None if it has no --init, or has a checkpoint."""
    teacher: Teacher | None
    """Teacher of a run with distillation.teacher."""
    lock: BinaryIO | None
    """Lock on the run's folder, on rank 0 of a run that trains. It is released when the file is closed or the process ends."""


def get_ready(settings: RunSettings, arguments: Sequence[str], preflight_alone: bool = False) -> Ready:
    """Prepare this rank for training.

    `preflight_alone`: compare the ranks also if there is one node and no batch job, and do not change the run's folder. Raises
    UserError if the settings of this rank are wrong, and on every rank if one of them cannot take part or differs from rank 0.
    """
    settings = run_folder.find_paths(settings)
    process = processes.find_process()
    processes.share_cores(process)
    device: DeviceType = "cuda" if processes.device_name() == "cuda" else "cpu"
    if device == "cpu":
        processes.keep_freed_memory()
    written = read_deepspeed_json(settings.deepspeed)
    layout = deepspeed_config.layout_of(written, settings, process.world_size)
    batches, first_step = run_folder.find_plan(settings)
    memory_bytes = device_bytes(device, process.local_world_size)
    settings, merged = share_and_complete(settings, written, layout, device, memory_bytes, process.local_world_size, batches, first_step)
    if settings.dry_run:
        data, start = (None, None) if will_be_prepared(settings) else _open_data_and_folder(settings, merged)
        initial, teacher = _initial_weights(settings, data, start), _teacher(settings, data)
        return Ready(settings, process, device, layout, merged, data, start, initial, teacher, None)
    store = connect(process, settings.rendezvous_seconds, without_local_rank(arguments))
    compare = preflight_alone or (settings.preflight and (process.spans_nodes or "SLURM_JOB_ID" in os.environ))
    _prepare_missing_corpus(settings, store, process)
    data, start, initial, teacher, reports = _check_all_ranks(settings, merged, layout, process, device, store, compare)
    lock = None
    if not preflight_alone:
        lock, start = _lock_folder(settings, merged, process, data, start, store)
    initialize_communication(process, store, settings.communication_timeout)
    if compare:
        compared = preflight.compare_speeds(store, process, layout, device, reports)
        if process.is_first:
            print(compared, flush=True)
    return Ready(settings, process, device, layout, merged, data, start, initial, teacher, lock)


def compare_ranks(settings: RunSettings, arguments: Sequence[str]) -> int:
    """Prepare this rank, print the table of all ranks on rank 0, and train nothing. Returns the exit status."""
    try:
        ready = get_ready(settings, arguments, preflight_alone=True)
    except RuntimeError as error:
        if (message := describe_lost_ranks(error, settings.communication_timeout)) is None:
            raise
        print(message, file=sys.stderr)
        return 1
    if ready.process.is_first:
        print(f"All {ready.process.world_size} rank(s) agree.")
    return 0


def _open_data_and_folder(settings: RunSettings, merged_json: dict) -> tuple[RunData, run_folder.Start]:
    """Open the run's data and inspect its folder. Raises UserError if one of them is not as it must be, or they do not fit together."""
    run_folder.refuse_missing_data(settings)
    data = open_data(settings)
    start = run_folder.inspect(settings, data.fingerprint, merged_json)
    refuse_too_many_epochs(settings.data.max_epochs, data.sampling, start.plan)
    return data, start


def _initial_weights(settings: RunSettings, data: RunData | None, start: run_folder.Start | None) -> InitialWeights | None:
    """Open the weights of --init for a run without a checkpoint. Raises UserError if they do not fit the model or the data."""
    if settings.init is None or (start and start.resumes):
        return None
    initial = InitialWeights(settings.init, settings.model)
    if data:
        _refuse_other_tokens(settings, data, initial.opened, f"init {settings.init}")
    if settings.hold_zeros:
        _refuse_without_zeros(initial)
    return initial


def _refuse_without_zeros(initial: InitialWeights) -> None:
    """Raise UserError if no weight of the blocks' linear layers is 0. The search ends at the first matrix that has a 0."""
    with torch.device("meta"):
        network = Transformer(initial.opened.config)
    blocks = [(name, child) for name, child in network.named_children() if isinstance(child, Block)]
    names = (f"{name}.{own}" for name, block in blocks for own, weight in block.named_parameters() if weight.dim() == 2)
    if not any(bool((initial.opened.state[name] == 0).any()) for name in names):
        raise UserError(f"hold_zeros needs a pruned model: in init {initial.path} no weight of the blocks' linear layers is 0.")


def _teacher(settings: RunSettings, data: RunData | None) -> Teacher | None:
    """Open distillation.teacher. Raises UserError if it does not fit the model or the data."""
    if settings.distillation.teacher is None:
        return None
    teacher = Teacher(settings.distillation.teacher, settings.model)
    if data:
        _refuse_other_tokens(settings, data, teacher.opened, f"distillation.teacher {teacher.path}")
    return teacher


def _refuse_other_tokens(settings: RunSettings, data: RunData, other: OpenedModel, given: str) -> None:
    """Raise UserError if the run's data has other token ids than the other model; `given` names the setting of that model."""
    if other.tokenizer:
        first = next(iter(data.sampling.folders.values()))
        if tokens_differ(first, other.tokenizer):
            raise UserError(
                f"{first.folder} was tokenized with {first.tokenizer_path}, which gives other ids than {other.tokenizer}, "
                f"the tokenizer of {given}. "
                f"Prepare the text again with --tokenizer {other.tokenizer}."
            )
    if settings.model.architecture == "encoder_decoder":
        _refuse_other_start(settings, data, other, given)


def _refuse_other_start(settings: RunSettings, data: RunData, other: OpenedModel, given: str) -> None:
    """Raise UserError if the targets of the run begin with another token than the targets of the other model."""
    tokenizer = data.sampling.tokenizer
    expected = other.start_token(tokenizer)
    if expected == data.sampling.start_token:
        return
    names = tokenizer.special_names
    current = f"data.start_token is {settings.data.start_token or f'not given, so it is {tokenizer.end_of_text_token}'}"
    advice = f"Give --data.start_token '{names[expected]}'." if expected in names else f"It is not a special token of {tokenizer.path}."
    if expected == tokenizer.end_of_text:
        advice = "Leave data.start_token out."
    raise UserError(f"{current}; a target of {given} begins with {names.get(expected, f'token {expected}')}. {advice}")


def _prepare_missing_corpus(settings: RunSettings, store: dist.Store, process: Process) -> None:
    """Prepare the embedded corpus on rank 0 if it is wanted and missing; the other ranks wait. Raises UserError on every rank."""
    message = ""
    if process.is_first and will_be_prepared(settings):
        try:
            prepare_embedded_corpus(settings)
            message = "prepared"
        except UserError as error:
            message = str(error)
    message = broadcast_from_rank0(store, process, "data", message, LONGEST_CHECK_SECONDS)
    if message == "prepared":
        wait_for(Path(settings.data.path[0]))
    elif message:
        raise UserError(message)


def _check_all_ranks(
    settings: RunSettings, merged: dict, layout: Layout, process: Process, device: DeviceType, store: dist.Store, compare: bool
) -> tuple[RunData, run_folder.Start, InitialWeights | None, Teacher | None, list[dict]]:
    """Open what this rank starts with, and gather the reports of all ranks on rank 0.

    Raises UserError on every rank if a user's mistake keeps one of them from taking part or makes it differ from rank 0, and
    RanksMissing if another failure does: the next start may succeed.
    """
    probe_file = preflight.probe_file(settings.output, process)
    report: dict = {"rank": process.rank, "host": processes.host_name()}
    try:
        if device == "cuda":
            processes.device_index(process)
        refuse_what_cannot_fit(settings, merged, layout, device, device_bytes(device, process.local_world_size))
        data, start = _open_data_and_folder(settings, merged)
        initial, teacher = _initial_weights(settings, data, start), _teacher(settings, data)
        if compare:
            report |= preflight.probe(settings, merged, layout, process, device, data, probe_file)
    except Exception as error:  # the other ranks are waiting for this report
        status, message = status_and_message(error)
        if message is None:
            traceback.print_exc()
        report |= {"complaint": message or f"{type(error).__name__}: {error}", "is_mistake": status == 2}
    try:
        reports = gather_on_rank0(store, process, "machines", report, LONGEST_CHECK_SECONDS)
        complaint = preflight.check_consistent(reports, probe_file.parent) if process.is_first else ""
        complaint = broadcast_from_rank0(store, process, "complaint", complaint, LONGEST_CHECK_SECONDS)
        mistake = "yes" if all(report.get("is_mistake", True) for report in reports) else ""
        mistake = broadcast_from_rank0(store, process, "is mistake", mistake, LONGEST_CHECK_SECONDS)
    finally:
        with contextlib.suppress(OSError):  # a disk that cannot be written
            probe_file.unlink(missing_ok=True)
    if complaint and not mistake:  # a failure of a disk, a machine or our code: the next start may succeed
        raise RanksMissing(complaint)
    if complaint:
        if process.is_first and all("data" in report for report in reports):
            print(preflight.table(reports), flush=True)
        raise UserError(complaint)
    return data, start, initial, teacher, reports


def _lock_folder(
    settings: RunSettings, merged: dict, process: Process, data: RunData, start: run_folder.Start, store: dist.Store
) -> tuple[BinaryIO | None, run_folder.Start]:
    """Lock the run's folder on rank 0. Raises UserError on every rank if another process has locked it."""
    lock, message = None, ""
    # A job that SLURM has started again may find its folder locked by ranks of a node that SLURM believes dead, until they time out.
    patience = settings.communication_timeout + 60 if "SLURM_RESTART_COUNT" in os.environ else 0
    if process.is_first:
        try:
            lock = run_folder.lock(settings, patience)
            start = run_folder.inspect(settings, data.fingerprint, merged)  # again: the process that had the lock may have saved
        except UserError as error:
            message = str(error)
    if message := broadcast_from_rank0(store, process, "folder", message, patience + LONGEST_CHECK_SECONDS):
        raise UserError(message)
    return lock, start
