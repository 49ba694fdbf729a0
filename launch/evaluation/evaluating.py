"""Evaluation of one model on prepared data: loss, perplexity, bits per byte and accuracy for each source, and for all together."""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from data.command_line import UserError
from data.sampling.sources import open_folders, refuse_changed
from data.shards import PreparedData
from launch.checkpoints.opening import OpenedModel, load_weights, open_model
from launch.evaluation.evaluation_sets import mismatched_tokens
from launch.evaluation.score import Score
from launch.evaluation.settings import EvaluateSettings
from launch.evaluation.tasks.table import task_of
from launch.evaluation.tasks.task import Task
from launch.ranks.processes import device_name, keep_freed_memory

_FORMATS = {"perplexity": ".3f", "accuracy": ".2%"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one split.

    A causal model predicts every token once, the first token (with document_mask, the first of each document) from the end-of-text token.
    If the documents begin with a begin-of-text token, each window begins with it. It is read and not predicted, so that neither the loss,
    the perplexity nor the bits per byte count it.
    Other models predict what their objective asks for; masked tokens, spans and prefixes are the same in every evaluation.
    """

    task: Task
    score: Score
    bytes: int | None
    """UTF-8 bytes of the whole text; None if the model does not predict all of it."""
    seconds: float

    def __add__(self, other: "Evaluation") -> "Evaluation":
        num_bytes = None if self.bytes is None or other.bytes is None else self.bytes + other.bytes
        return Evaluation(self.task, self.score + other.score, num_bytes, self.seconds + other.seconds)

    @property
    def loss(self) -> float:
        """Mean loss per token, nats; with classes, plus the mean loss per class."""
        return self.score.loss

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return self.score.tokens

    @property
    def metrics(self) -> dict[str, float]:
        """Meaning of the score for the task, by name: perplexity, bits per byte, accuracy."""
        return self.task.metrics(self.score, self.bytes)

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return self.metrics["perplexity"]

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the whole text; KeyError if the model does not predict all of it."""
        return self.metrics["bits_per_byte"]

    def __str__(self) -> str:
        parts = [f"loss: {self.loss:.5f} nats/{'token' if self.tokens else 'class'}"]
        for name, value in self.metrics.items():
            count = f" of {self.score.classes:,}" if name == "accuracy" else ""
            parts.append(f"{name.replace('_', ' ')}: {value:{_FORMATS.get(name, '.4f')}}{count}")
        return " | ".join(parts)


def evaluate(settings: EvaluateSettings, show_progress: bool = True) -> Evaluation:
    """Return the evaluation of all sources together, weighted by token and by class."""
    return combine(list(evaluate_sources(settings, show_progress).values()))


def combine(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the sum of one or more evaluations."""
    first, *others = evaluations
    return sum(others, first)


def evaluate_sources(settings: EvaluateSettings, show_progress: bool = True) -> dict[str, Evaluation]:
    """Return the evaluation of each source that has the split, by the source's name. Raises UserError if the model does not fit."""
    keep_freed_memory()
    opened = open_model(settings.model, settings.average)
    folders = open_folders(_paths(settings, opened))
    task = task_of(opened, settings.objective)
    sampling = task.sampling_settings(opened, settings.model, settings.labels)
    length = opened.config.sequence_length if settings.sequence_length is None else settings.sequence_length
    stride = length if settings.stride is None else settings.stride
    for prepared in folders.values():
        _refuse_unsuitable(settings, opened, prepared, length, stride, task)
    device, size = device_name(), settings.micro_batch_size
    model = load_weights(opened).model.to(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    if bits := (opened.recipe.get("quantization") or {}).get("bits"):
        print(
            f"Note: {settings.model} was trained with weights rounded to {bits} bits; the weights evaluated here are not rounded. "
            "launch/quantize.py rounds them.",
            file=sys.stderr,
        )
    evaluations = {}
    for name, one in task.evaluation_sets(opened.config, folders, sampling, settings.split, size, length, stride).items():
        num_batches = math.ceil(one.num_samples / size)
        batches = tqdm(one.batches, total=num_batches, unit="batch", disable=None if show_progress else True, leave=False)
        start = time.perf_counter()
        score = task.measure(model, batches, device)
        evaluations[name] = Evaluation(
            task, score, one.stream.num_bytes if task.predicts_every_token else None, time.perf_counter() - start
        )
    refuse_changed(folders.values())
    return evaluations


def print_evaluation(settings: EvaluateSettings) -> int:
    """Evaluate, print a line for each source if there are several, and the result for all; return the exit status."""
    sources = evaluate_sources(settings)
    for name, one in sources.items():
        if len(sources) > 1:
            print(f"{name}: {one} | {one.tokens:,} tokens")
    result = combine(list(sources.values()))
    print(result)
    text = f", {result.bytes:,} bytes of text" if result.bytes is not None else ""
    print(f"{result.tokens:,} tokens{text}, {result.seconds:.1f} s")
    return 0


def _refuse_unsuitable(
    settings: EvaluateSettings, opened: OpenedModel, prepared: PreparedData, length: int, stride: int, task: Task
) -> None:
    """Raise UserError if the model cannot be evaluated on this folder with these settings."""
    context = opened.config.sequence_length
    complaints = []
    if length > context:
        complaints.append(f"--sequence_length is {length}; it must be from 1 to {context}, the model's context.")
    if stride > length:
        complaints.append(f"--stride is {stride}; it must be from 1 to {length}, the length of a window.")
    if settings.stride is not None and not task.predicts_every_token:
        complaints.append(f"--stride {stride} applies only to causal models; the samples of other objectives do not overlap.")
    complaints += mismatched_tokens(opened, prepared, settings.model)
    if complaints:
        raise UserError("\n".join(complaints))


def _paths(settings: EvaluateSettings, opened: OpenedModel) -> list[str]:
    if settings.data:
        return [settings.data]
    if not opened.recipe:
        raise UserError(f"{settings.model} does not record which data it was trained on. Give --data.")
    return opened.data_paths()
