"""Measure a model on held-out text: python launch/evaluate.py runs/demo [--data prepared]"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data.command_line import UserError, read_settings, run_door


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    data: str | None = None
    """Folder that data/prepare.py wrote (default: the one the run was trained on)."""
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
    """Of all the tokens of a split, each predicted once but the first of all, which has nothing before it.

    With document_mask the first of every document is left out in the same way.
    """

    loss: float
    """Nats per token, weighted by token."""
    perplexity: float
    bits_per_byte: float
    """Over all UTF-8 bytes of the text."""
    tokens: int
    bytes: int
    seconds: float


def evaluate(settings: EvaluateSettings, show_progress: bool = True) -> Evaluation:
    import torch
    from tqdm import tqdm

    from data.batches import IGNORED, evaluation_batches
    from data.shards import PreparedData
    from launch.training.processes import device_name, keep_freed_memory
    from launch.training.weights import load_model
    from model.loss import token_losses

    keep_freed_memory()
    trained = load_model(settings.model)
    prepared = PreparedData(Path(settings.data or _data_of_run(settings.model, trained.folder)))
    context = trained.config.sequence_length
    length = context if settings.sequence_length is None else settings.sequence_length
    stride = length if settings.stride is None else settings.stride
    _refuse_impossible(settings, trained, prepared, length, stride)
    device = device_name()
    model = trained.model.to(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    stream = prepared.splits[settings.split]
    windows = evaluation_batches(stream, length, settings.micro_batch_size, document_mask=trained.config.document_mask, stride=stride)
    start = time.perf_counter()
    total, predicted = torch.zeros((), dtype=torch.float64), 0
    count = math.ceil((1 + max(0, math.ceil((len(stream) - 1 - length) / stride))) / settings.micro_batch_size)
    with torch.no_grad():
        for batch in tqdm(windows, total=count, unit="batch", disable=None if show_progress else True, leave=False):
            tokens, segments, targets = (tensor.to(device) for tensor in batch)
            total += token_losses(model(tokens, segments), targets).double().sum().cpu()
            predicted += int((targets != IGNORED).sum())
    loss = float(total) / predicted
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=float(total) / math.log(2) / stream.num_bytes,
        tokens=predicted,
        bytes=stream.num_bytes,
        seconds=time.perf_counter() - start,
    )


def _refuse_impossible(settings: EvaluateSettings, trained, prepared, length: int, stride: int) -> None:
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
    if tokenizer and tokenizer.name == other.name and tokenizer.read_bytes() != other.read_bytes():
        complaints.append(f"{prepared.folder} was tokenized with another {other.name} than {settings.model} was trained with.")
    if complaints:
        raise UserError("\n".join(complaints))


def _data_of_run(model: str, checkpoint: Path) -> str:
    for folder in (Path(model), checkpoint.resolve().parent.parent):
        if (folder / "run.json").is_file():
            return json.loads((folder / "run.json").read_text())["recipe"]["data"]["path"]
    raise UserError(f"{model} does not say which data it was trained on: give --data.")


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(EvaluateSettings, arguments, "Measure a model on held-out text.", positional="model")
    result = evaluate(settings)
    print(f"loss: {result.loss:.5f} nats/token | perplexity: {result.perplexity:.3f} | bits per byte: {result.bits_per_byte:.4f}")
    print(f"{result.tokens:,} tokens, {result.bytes:,} bytes of text, {result.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    run_door(main)
