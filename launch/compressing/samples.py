"""The text of a compression: calibration samples from the training split, and test samples on which the model is measured."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.batches import Batch
from data.sampling.sources import open_folders
from data.shards import bytes_per_token
from launch.checkpoints.opening import OpenedModel
from launch.evaluation.evaluation_sets import first_inputs, mismatched_tokens
from launch.evaluation.tasks.table import task_of
from launch.evaluation.tasks.task import Task
from model.layers import Stream

MAX_SAMPLE_LENGTH = 2048
"""Maximum length of a sample, tokens, if no length is given."""

_TOKENS_AT_ONCE = 2048
_MIN_BATCHES = 32  # if there are enough samples, so that ranks can share them
_LOGITS_BYTES = 64 << 20  # float32 logits of a micro-batch; measuring holds a few of them
_MAX_SHARED = 0.1  # share of the test's runs of tokens; a licence at the head of each file is less


@dataclasses.dataclass(frozen=True)
class Text:
    """Samples of a split, in micro-batches that do not depend on the number of ranks."""

    description: str
    """Split and folders, as text."""
    task: Task
    """Task whose samples they are."""
    batches: list[Batch]
    num_samples: int
    tokens: int
    """Number of tokens that are not padding."""
    fingerprint: str
    """SHA-256 of all samples in order."""
    bytes_per_token: float | None
    """UTF-8 bytes per token of the split; None if the model does not predict all of its text."""

    def first_samples(self, num_samples: int) -> list[Batch]:
        """Return the first samples, in micro-batches; the last one is cut to the number."""
        remaining, batches = num_samples, []
        for batch in self.batches:
            if remaining > 0:
                batches.append(_first_rows(batch, remaining))
                remaining -= len(batch.tokens)
        return batches


def _first_rows(batch: Batch, count: int) -> Batch:
    return batch.map(lambda tensor: tensor[:count])


def calibration_text(opened: OpenedModel, name: str, paths: Sequence[str], num_samples: int, length: int | None) -> Text:
    """Return samples of the training split, evenly spread over each folder. Raises UserError if there are none or they do not fit."""
    return _text(opened, name, paths, "train", num_samples, length)


def test_text(opened: OpenedModel, name: str, paths: Sequence[str], num_samples: int, length: int | None) -> Text:
    """Return samples of the validation split, evenly spread over each folder; 0 samples: all of them."""
    return _text(opened, name, paths, "validation", num_samples, length)


def paths_for(opened: OpenedModel, data: str | None, name: str) -> list[str]:
    """Return the folders of the text: the given one, else those that the run was trained on."""
    if data:
        return [data]
    if not opened.recipe:
        raise UserError(f"{name} does not record its training data. Give --data, or use no text: --calibration_samples 0 --test_samples 0.")
    return opened.data_paths()


def _text(opened: OpenedModel, name: str, paths: Sequence[str], split: str, num_samples: int, length: int | None) -> Text:
    folders = open_folders(paths)
    for prepared in folders.values():
        if complaints := mismatched_tokens(opened, prepared, name):
            raise UserError("\n".join(complaints))
    task = task_of(opened)
    sampling = task.sampling_settings(opened, name)
    length = min(opened.config.sequence_length, MAX_SAMPLE_LENGTH) if length is None else length
    if not 1 <= length <= opened.config.sequence_length:
        raise UserError(f"--sequence_length {length} must be from 1 to {opened.config.sequence_length}, the model's context.")
    size = min(_TOKENS_AT_ONCE, _LOGITS_BYTES // (4 * opened.config.vocab_size)) // length
    size = max(1, min(size, num_samples // _MIN_BATCHES) if num_samples else size)
    limit = math.ceil(num_samples / len(folders)) or None
    sets = task.evaluation_sets(opened.config, folders, sampling, split, size, length, limit_samples=limit)
    batches = [batch for folder_set in sets.values() for batch in folder_set.batches]
    streams = [folder_set.stream for folder_set in sets.values()]
    hashed = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            hashed.update(b"" if tensor is None else tensor.numpy().tobytes())
    return Text(
        description=f"{split} of {', '.join(str(Path(folder.folder)) for folder in folders.values())}",
        task=task,
        batches=batches,
        num_samples=sum(folder_set.num_samples for folder_set in sets.values()),
        tokens=sum(int((stream.segments != 0).sum()) for stream in first_inputs(batches, torch.device("cpu"))),
        fingerprint=hashed.hexdigest(),
        bytes_per_token=bytes_per_token(streams) if task.predicts_every_token else None,
    )


def refuse_shared_text(calibration: Text, test: Text) -> None:
    """Raise UserError if the calibration text contains the test text, which would make the result meaningless."""
    calibration_runs, test_runs = (_token_runs(text) for text in (calibration, test))
    shared = float(np.isin(test_runs, calibration_runs).mean()) if len(test_runs) else 0.0
    if shared > _MAX_SHARED:
        raise UserError(
            f"{shared:.0%} of the test text ({test.description}) are also in the calibration text ({calibration.description}), so the "
            "measurement would be too good. Give other documents with --calibration_data, or allow it with --force."
        )


def _token_runs(text: Text) -> NDArray[np.uint64]:
    """Return a hash of every run of consecutive tokens in every sample, with masked tokens restored."""
    hashes = []
    for batch in text.batches:
        tokens, segments = text.task.original_tokens(batch), Stream.from_tensors(batch.inputs).segments
        length = min(text.task.run_tokens, tokens.shape[1])
        for row, is_text in zip(tokens.numpy().astype(np.uint64), segments.numpy() != 0, strict=True):
            row = row[is_text]
            if len(row) >= length:
                powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(length, dtype=np.uint64)
                views = np.lib.stride_tricks.sliding_window_view(row, length)
                hashes.append(((views + np.uint64(1)) * powers).sum(axis=1, dtype=np.uint64))
    return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
