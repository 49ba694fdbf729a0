"""Measure a model on held-out text: python launch/evaluate.py runs/demo [--data prepared]"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError, read_settings, run_door
from data.sampling.sources import ObjectiveName
from launch.evaluation.score import Score, perplexity

if TYPE_CHECKING:
    from data.shards import PreparedData
    from launch.checkpoints.opening import TrainedModel


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    data: str | None = None
    """Folder that data/prepare.py wrote (default: the one the run was trained on; of a blend each)."""
    split: Literal["validation", "train"] = "validation"
    """Which documents of it."""
    objective: ObjectiveName | None = None
    """What is asked of the model, as data.objective in a recipe (default: what the run was trained for, with its other settings of
    data; of an exported folder what fits the model)."""
    labels: tuple[str, ...] = ()
    """Labels of the classes, in their order, as data.labels in a recipe (default: the run's)."""
    sequence_length: int | None = None
    """Tokens of a window, or of a sample (default: the model's context)."""
    stride: int | None = None
    """Tokens that a window moves on; below sequence_length each token sees at least sequence_length - stride tokens before it
    (default: sequence_length, windows side by side). Of causal models alone."""
    micro_batch_size: int = 16
    """Windows at a time."""
    precision: Literal["float32", "bf16"] = "float32"
    """Type of weights and activations; the losses are float32 either way."""
    average: int = 1
    """Checkpoints of the run, the newest ones, of whose weights the mean is measured."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of a split. A causal model predicts all its tokens, each once; the first of all, and with document_mask of each document, from end
    of text. Another predicts what its objective asks for: of masked tokens, spans and prefixes the same ones each time.
    """

    score: Score
    bytes: int | None
    """UTF-8 bytes of all of the text; None where the model is not asked for all of it."""
    seconds: float

    def __add__(self, other: "Evaluation") -> "Evaluation":
        num_bytes = None if self.bytes is None or other.bytes is None else self.bytes + other.bytes
        return Evaluation(self.score + other.score, num_bytes, self.seconds + other.seconds)

    @property
    def loss(self) -> float:
        """Mean nats a token, and, where there are classes, mean nats a class beside it."""
        return self.score.loss

    @property
    def tokens(self) -> int:
        """That were predicted."""
        return self.score.tokens

    @property
    def perplexity(self) -> float:
        """A token."""
        return perplexity(self.score.token_loss / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Over all bytes of the text."""
        assert self.bytes is not None, "the model was not asked for all of the text"
        return self.score.token_loss / math.log(2) / self.bytes


def evaluate(settings: EvaluateSettings, show_progress: bool = True) -> Evaluation:
    """Over all sources together, weighted by token and by class."""
    return together(list(evaluate_sources(settings, show_progress).values()))


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
    first, *others = evaluations
    return sum(others, first)


def evaluate_sources(settings: EvaluateSettings, show_progress: bool = True) -> dict[str, Evaluation]:
    """Each source that has such a split, by its name."""
    import torch
    from tqdm import tqdm

    from data.sampling.sources import open_folders
    from launch.checkpoints.opening import load_model
    from launch.evaluation.evaluation_sets import questions, sampling_of
    from launch.evaluation.score import measure
    from launch.ranks.processes import device_name, keep_freed_memory

    keep_freed_memory()
    trained = load_model(settings.model, settings.average)
    folders = open_folders(_paths(settings, trained.recipe))
    sampling = sampling_of(trained, settings.model, settings.objective, settings.labels)
    length = trained.config.sequence_length if settings.sequence_length is None else settings.sequence_length
    stride = length if settings.stride is None else settings.stride
    is_causal = sampling.objective == "causal"
    for prepared in folders.values():
        _refuse_impossible(settings, trained, prepared, length, stride, is_causal)
    device, size = device_name(), settings.micro_batch_size
    model = trained.model.to(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    if bits := (trained.recipe.get("quantization") or {}).get("bits"):
        print(
            f"Note: {settings.model} was trained with weights rounded to {bits} bits; these are not rounded. launch/quantize.py does it.",
            file=sys.stderr,
        )
    evaluations = {}
    for name, asked in questions(trained, folders, sampling, settings.split, size, length, stride).items():
        batches = math.ceil(asked.num_samples / size)
        shown = tqdm(asked.batches, total=batches, unit="batch", disable=None if show_progress else True, leave=False)
        start = time.perf_counter()
        score = measure(model, shown, device)
        evaluations[name] = Evaluation(score, asked.stream.num_bytes if is_causal else None, time.perf_counter() - start)
    return evaluations


def _refuse_impossible(
    settings: EvaluateSettings, trained: "TrainedModel", prepared: "PreparedData", length: int, stride: int, is_causal: bool
) -> None:
    from launch.evaluation.evaluation_sets import strange_tokens

    context = trained.config.sequence_length
    complaints = []
    if not 1 <= length <= context:
        complaints.append(f"sequence_length {length} is outside 1 ... {context}, the model's context.")
    if not 1 <= stride <= length:
        complaints.append(f"stride {stride} is outside 1 ... {length}, the window.")
    if settings.stride is not None and not is_causal:
        complaints.append(f"stride {stride} is for windows of causal models; samples of another objective do not overlap.")
    if settings.micro_batch_size < 1:
        complaints.append(f"micro_batch_size is {settings.micro_batch_size}; it must be at least 1.")
    complaints += strange_tokens(trained, prepared, settings.model)
    if complaints:
        raise UserError("\n".join(complaints))


def _paths(settings: EvaluateSettings, recipe: dict) -> list[str]:
    from launch.checkpoints.run_record import paths_of

    if settings.data:
        return [settings.data]
    if not recipe:
        raise UserError(f"{settings.model} does not say which data it was trained on: give --data.")
    return paths_of(recipe)


def _said(one: Evaluation) -> str:
    parts = [f"loss: {one.loss:.5f} nats/{'token' if one.tokens else 'class'}"]
    parts += [f"perplexity: {one.perplexity:.3f}"] if one.tokens else []
    parts += [f"bits per byte: {one.bits_per_byte:.4f}"] if one.bytes is not None else []
    parts += [f"accuracy: {one.score.accuracy:.2%} of {one.score.classes:,}"] if one.score.accuracy is not None else []
    return " | ".join(parts)


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(EvaluateSettings, arguments, "Measure a model on held-out text.", positional="model")
    sources = evaluate_sources(settings)
    for name, one in sources.items():
        if len(sources) > 1:
            print(f"{name}: {_said(one)} | {one.tokens:,} tokens")
    result = together(list(sources.values()))
    print(_said(result))
    text = f", {result.bytes:,} bytes of text" if result.bytes is not None else ""
    print(f"{result.tokens:,} tokens{text}, {result.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    run_door(main)
