"""Measure a model on held-out text: python launch/evaluate.py runs/demo [--data prepared]"""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError, read_settings, run_door

if TYPE_CHECKING:
    from data.batches import Batch


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    data: str | None = None
    """Folder that data/prepare.py wrote (default: the one the run was trained on; of a blend each)."""
    split: Literal["validation", "train"] = "validation"
    """Which documents of it."""
    sequence_length: int | None = None
    """Tokens of a window (default: the model's context)."""
    stride: int | None = None
    """Tokens that a window moves on; below sequence_length each token sees at least sequence_length - stride tokens before it
    (default: sequence_length, windows side by side)."""
    micro_batch_size: int = 16
    """Windows at a time."""
    precision: Literal["float32", "bf16"] = "float32"
    """Type of weights and activations; the losses are float32 either way."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of all the tokens of a split, each predicted once; the first of all, and with document_mask of each document, from end of text."""

    loss: float
    """Nats per token, weighted by token."""
    perplexity: float
    bits_per_byte: float
    """Over all UTF-8 bytes of the text."""
    tokens: int
    bytes: int
    seconds: float


def evaluate(settings: EvaluateSettings, show_progress: bool = True) -> Evaluation:
    """Over all sources together, weighted by token."""
    return together(list(evaluate_sources(settings, show_progress).values()))


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
    tokens, num_bytes = (sum(getattr(one, count) for one in evaluations) for count in ("tokens", "bytes"))
    return _evaluation(sum(one.loss * one.tokens for one in evaluations), tokens, num_bytes, sum(one.seconds for one in evaluations))


def evaluate_sources(settings: EvaluateSettings, show_progress: bool = True) -> dict[str, Evaluation]:
    """Each source that has such a split, by its name."""
    import torch
    from tqdm import tqdm

    from data.batches import evaluation_batches, num_evaluation_samples
    from data.sampling import open_folders
    from launch.training.processes import device_name, keep_freed_memory
    from launch.training.weights import load_model

    keep_freed_memory()
    trained = load_model(settings.model)
    folders = open_folders([settings.data] if settings.data else _data_of_run(settings.model, trained.folder))
    context = trained.config.sequence_length
    length = context if settings.sequence_length is None else settings.sequence_length
    stride = length if settings.stride is None else settings.stride
    for prepared in folders.values():
        _refuse_impossible(settings, trained, prepared, length, stride)
    streams = {name: prepared.splits[settings.split] for name, prepared in folders.items()}
    # Where all are empty the first is read all the same, and says so.
    streams = {name: stream for name, stream in streams.items() if len(stream)} or dict(list(streams.items())[:1])
    device = device_name()
    model = trained.model.to(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    end_of_text, mask = next(iter(folders.values())).end_of_text, trained.config.document_mask
    evaluations = {}
    for name, stream in streams.items():
        windows = evaluation_batches(stream, length, settings.micro_batch_size, end_of_text, document_mask=mask, stride=stride)
        count = math.ceil(num_evaluation_samples(len(stream), length, stride) / settings.micro_batch_size)
        shown = tqdm(windows, total=count, unit="batch", disable=None if show_progress else True, leave=False)
        evaluations[name] = _evaluate_batches(model, shown, stream.num_bytes, device)
    return evaluations


def _evaluate_batches(model, batches: "Iterable[Batch]", num_bytes: int, device: str) -> Evaluation:
    import torch

    from data.packing import IGNORED
    from model.loss import token_losses

    start = time.perf_counter()
    total, predicted = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            tokens, segments, targets = (tensor.to(device) for tensor in batch)
            total += token_losses(model(tokens, segments), targets).double().sum().cpu()
            predicted += int((targets != IGNORED).sum())
    return _evaluation(float(total), predicted, num_bytes, time.perf_counter() - start)


def _evaluation(nats: float, tokens: int, num_bytes: int, seconds: float) -> Evaluation:
    return Evaluation(nats / tokens, math.exp(nats / tokens), nats / math.log(2) / num_bytes, tokens, num_bytes, seconds)


def _refuse_impossible(settings: EvaluateSettings, trained, prepared, length: int, stride: int) -> None:
    from data.tokenizer import load_tokenizer

    context, vocab_size = trained.config.sequence_length, trained.config.vocab_size
    complaints = []
    if not 1 <= length <= context:
        complaints.append(f"sequence_length {length} is outside 1 ... {context}, the model's context.")
    if not 1 <= stride <= length:
        complaints.append(f"stride {stride} is outside 1 ... {length}, the window.")
    if settings.micro_batch_size < 1:
        complaints.append(f"micro_batch_size is {settings.micro_batch_size}; it must be at least 1.")
    if prepared.vocab_size > vocab_size:
        complaints.append(f"{prepared.folder} has token ids up to {prepared.vocab_size - 1}; {settings.model} knows {vocab_size}.")
    tokenizer, other = trained.tokenizer, prepared.tokenizer_path
    if tokenizer and tokenizer.name == other.name:
        if tokenizer.read_bytes() != other.read_bytes():
            complaints.append(f"{prepared.folder} was tokenized with another {other.name} than {settings.model} was trained with.")
        elif load_tokenizer(tokenizer).settings != load_tokenizer(other).settings:
            complaints.append(
                f"{prepared.folder} was tokenized with other settings beside {other.name} than {settings.model} was trained with."
            )
    if complaints:
        raise UserError("\n".join(complaints))


def _data_of_run(model: str, checkpoint: Path) -> list[str]:
    from launch.training.run_folder import paths_of

    for folder in (Path(model), checkpoint.resolve().parent.parent):
        if (folder / "run.json").is_file():
            return paths_of(json.loads((folder / "run.json").read_text())["recipe"])
    raise UserError(f"{model} does not say which data it was trained on: give --data.")


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(EvaluateSettings, arguments, "Measure a model on held-out text.", positional="model")
    sources = evaluate_sources(settings)
    for name, one in sources.items():
        if len(sources) > 1:
            print(f"{name}: {one.loss:.5f} nats/token | {one.bits_per_byte:.4f} bits per byte | {one.tokens:,} tokens")
    result = together(list(sources.values()))
    print(f"loss: {result.loss:.5f} nats/token | perplexity: {result.perplexity:.3f} | bits per byte: {result.bits_per_byte:.4f}")
    print(f"{result.tokens:,} tokens, {result.bytes:,} bytes of text, {result.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    run_door(main)
