"""What every rank does before it trains: find the others, look at its machine, agree with them, and join one process group."""

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from data.command_line import UserError
from data.tokenization.comparison import tokenized_otherwise
from launch.checkpoints.initial import InitialWeights
from launch.checkpoints.opening import OpenedModel
from launch.ranks import processes, rendezvous
from launch.ranks.launchers import without_local_rank
from launch.ranks.layout import Layout
from launch.ranks.processes import Process
from launch.training import deepspeed_config, preflight, run_folder
from launch.training.data import RunData, open_data, prepare_embedded_corpus, wait_for, will_be_prepared
from launch.training.deepspeed_json import read_deepspeed_json
from launch.training.settings import RunSettings, share_the_batch
from launch.training.teacher import Teacher
from model.layers import Block
from model.transformer import Transformer

LONGEST_LOOK_SECONDS = 600
"""That a rank may take to prepare the embedded corpus, or to read and hash its data."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A rank that knows what it is to do, and that all others can do theirs."""

    settings: RunSettings
    """With the micro-batch size and stages that follow from the number of ranks."""
    process: Process
    device: str
    layout: Layout
    merged_json: dict
    data: RunData | None
    """None in a dry run for which the data would be prepared first."""
    start: run_folder.Start | None
    """None likewise."""
    initial: InitialWeights | None
    """What a run with --init that has no checkpoint yet starts from."""
    teacher: Teacher | None
    """What a run with distillation.teacher learns from."""
    held: BinaryIO | None
    """The lock on the run's folder, on rank 0 of a run that trains; held until the process ends."""


def get_ready(settings: RunSettings, arguments: Sequence[str], preflight_alone: bool = False) -> Ready:
    """Raises UserError where this rank's settings are wrong, and, the same on every rank, where one cannot take part or differs.

    `preflight_alone`: compare also where there is one node and no batch job, and leave the run's folder as it is.
    """
    process = processes.find_process()
    processes.share_the_cores(process)
    device = processes.device_name()
    if device == "cpu":
        processes.keep_freed_memory()
    written = read_deepspeed_json(settings.deepspeed)
    layout = deepspeed_config.layout_of(written, settings, process.world_size)
    settings = share_the_batch(settings, layout)
    merged = deepspeed_config.complete(written, settings.deepspeed, settings, layout, device, process.local_world_size)
    if settings.dry_run:
        data = None if will_be_prepared(settings) else open_data(settings)
        start = run_folder.inspect(settings, data.fingerprint, merged) if data else None
        initial, teacher = _initial_weights(settings, data, start), _teacher(settings, data)
        return Ready(settings, process, device, layout, merged, data, start, initial, teacher, None)
    store = rendezvous.meet(process, settings.rendezvous_seconds, without_local_rank(arguments))
    compare = preflight_alone or (settings.preflight and (process.spans_nodes or "SLURM_JOB_ID" in os.environ))
    _prepare_where_missing(settings, store, process)
    data, start, initial, teacher, reports = _look_and_agree(settings, merged, layout, process, device, store, compare)
    held = None
    if not preflight_alone:
        held, start = _hold_the_folder(settings, merged, process, data, start, store)

    from launch.training.communication import initialize_communication  # DeepSpeed, which had to be told of the device first

    initialize_communication(process, store, settings.communication_timeout)
    if compare:
        compared = preflight.compare_speeds(store, process, layout, device, reports)
        if process.is_first:
            print(compared, flush=True)
    return Ready(settings, process, device, layout, merged, data, start, initial, teacher, held)


def _initial_weights(settings: RunSettings, data: RunData | None, start: run_folder.Start | None) -> InitialWeights | None:
    """Of a run that has no checkpoint yet. Raises UserError where they do not fit the model or the data."""
    if settings.init is None or (start and start.goes_on):
        return None
    initial = InitialWeights(settings.init, settings.model)
    if data:
        _refuse_other_tokens(settings, data, initial.opened, f"init {settings.init}")
    if settings.hold_zeros:
        _refuse_without_zeros(initial)
    return initial


def _refuse_without_zeros(initial: InitialWeights) -> None:
    """Raise UserError where no weight of the blocks' linear layers is 0. Of a pruned model one look is enough."""
    with torch.device("meta"):
        network = Transformer(initial.opened.config)
    blocks = [(name, child) for name, child in network.named_children() if isinstance(child, Block)]
    names = (f"{name}.{own}" for name, block in blocks for own, weight in block.named_parameters() if weight.dim() == 2)
    if not any(bool((initial.opened.state[name] == 0).any()) for name in names):
        raise UserError(f"hold_zeros: no weight of the blocks' linear layers is 0 in init {initial.path}: no mask pruned it.")


def _teacher(settings: RunSettings, data: RunData | None) -> Teacher | None:
    """Raises UserError where it does not fit the model or the data."""
    if settings.distillation.teacher is None:
        return None
    teacher = Teacher(settings.distillation.teacher, settings.model)
    if data:
        _refuse_other_tokens(settings, data, teacher.opened, f"distillation.teacher {teacher.path}")
    return teacher


def _refuse_other_tokens(settings: RunSettings, data: RunData, other: OpenedModel, given: str) -> None:
    """Raise UserError where the tokens of the run are not those that the other model knows; `given` says which that is."""
    if other.tokenizer:
        first = next(iter(data.sampling.folders.values()))
        if tokenized_otherwise(first, other.tokenizer):
            raise UserError(
                f"{first.folder} was tokenized by {first.tokenizer_path}, which gives other ids than {other.tokenizer} of {given}. "
                f"Prepare the text again with --tokenizer {other.tokenizer}."
            )
    if settings.model.architecture == "encoder_decoder":
        _refuse_other_start(settings, data, other, given)


def _refuse_other_start(settings: RunSettings, data: RunData, other: OpenedModel, given: str) -> None:
    """Raise UserError where the targets of the run begin with another token than those that the other model knows."""
    tokenizer = data.sampling.tokenizer
    there = other.start_token(tokenizer)
    if there == data.sampling.start_token:
        return
    names = tokenizer.special_names
    here = f"data.start_token is {settings.data.start_token or f'not given, which is {tokenizer.end_of_text_token}'}"
    advice = f"Give --data.start_token '{names[there]}'." if there in names else f"It is no special token of {tokenizer.path}."
    if there == tokenizer.end_of_text:
        advice = "Leave data.start_token out."
    raise UserError(f"{here}; a target of {given} begins with {names.get(there, f'token {there}')}. {advice}")


def _prepare_where_missing(settings: RunSettings, store: dist.Store, process: Process) -> None:
    """Rank 0 prepares the embedded corpus where it is wanted and missing; the others wait for its word."""
    word = ""
    if process.is_first and will_be_prepared(settings):
        try:
            prepare_embedded_corpus(settings)
            word = "prepared"
        except UserError as error:
            word = str(error)
    word = rendezvous.tell(store, process, "data", word, LONGEST_LOOK_SECONDS)
    if word == "prepared":
        wait_for(Path(settings.data.path[0]))
    elif word:
        raise UserError(word)


def _look_and_agree(
    settings: RunSettings, merged: dict, layout: Layout, process: Process, device: str, store: dist.Store, compare: bool
) -> tuple[RunData, run_folder.Start, InitialWeights | None, Teacher | None, list[dict]]:
    """What this rank begins with, and, on rank 0, all ranks' reports. Raises UserError on all where one of them cannot or differs."""
    probe = preflight.probe_of(settings.output, process)
    report = {"rank": process.rank, "host": processes.host_name()}
    try:
        if device == "cuda":
            processes.device_number(process)
        data = open_data(settings)
        start = run_folder.inspect(settings, data.fingerprint, merged)
        initial, teacher = _initial_weights(settings, data, start), _teacher(settings, data)
        if compare:
            report |= preflight.look(settings, merged, layout, process, device, data, probe)
    except UserError as error:
        report["complaint"] = str(error)
    except Exception as error:  # the others are waiting for a word
        traceback.print_exc()
        report |= {"complaint": f"{type(error).__name__}: {error}", "is_mistake": False}
    try:
        reports = rendezvous.gather(store, process, "machines", report, LONGEST_LOOK_SECONDS)
        verdict = preflight.verdict(reports, probe.parent) if process.is_first else ""
        verdict = rendezvous.tell(store, process, "verdict", verdict, LONGEST_LOOK_SECONDS)
        is_mistake = all(report.get("is_mistake", True) for report in reports)
        is_mistake = rendezvous.tell(store, process, "is mistake", "yes" if is_mistake else "", LONGEST_LOOK_SECONDS)
    finally:
        with contextlib.suppress(OSError):  # a disk that cannot be written
            probe.unlink(missing_ok=True)
    if verdict and not is_mistake:  # of a disk, a machine, or ours: the next start may succeed
        raise rendezvous.RanksMissing(verdict)
    if verdict:
        if process.is_first and all("data" in report for report in reports):
            print(preflight.table(reports), flush=True)
        raise UserError(verdict)
    return data, start, initial, teacher, reports


def _hold_the_folder(
    settings: RunSettings, merged: dict, process: Process, data: RunData, start: run_folder.Start, store: dist.Store
) -> tuple[BinaryIO | None, run_folder.Start]:
    """Rank 0 takes the run's folder for this run. Raises UserError on all ranks where another run has it."""
    held, word = None, ""
    # Ranks of a node that SLURM believes dead may hold the folder of a job that it has started again, until they miss the others.
    patience = settings.communication_timeout + 60 if "SLURM_RESTART_COUNT" in os.environ else 0
    if process.is_first:
        try:
            held = run_folder.lock(settings, patience)
            start = run_folder.inspect(settings, data.fingerprint, merged)  # once more: the one who held it may have saved
        except UserError as error:
            word = str(error)
    if word := rendezvous.tell(store, process, "folder", word, patience + LONGEST_LOOK_SECONDS):
        raise UserError(word)
    return held, start
