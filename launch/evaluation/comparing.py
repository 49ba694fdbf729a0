"""Comparison of several models on the same samples: size, perplexity, and the difference of their predictions from the first model's."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from data.command_line import UserError
from data.files import new_folder
from data.sampling.sources import open_folders, refuse_changed
from data.shards import PreparedData, bytes_per_token
from launch.checkpoints.opening import LoadedModel, OpenedModel, load_weights, open_model, weights_bytes
from launch.evaluation import pictures
from launch.evaluation.evaluation_sets import EvaluationSet, mismatched_tokens
from launch.evaluation.quality import Comparison, Quality, compared
from launch.evaluation.score import token_logits
from launch.evaluation.settings import CompareSettings
from launch.evaluation.tables import size_text, table
from launch.evaluation.tasks.table import task_of
from launch.ranks.processes import device_name, keep_freed_memory
from model.compression.gguf_file import GGUFState, types
from model.compression.packed import describe_schemes
from model.config import count_parameters


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One model compared with the first one; the first is compared with itself."""

    name: str
    kind: str
    """The step of a checkpoint; for others the type of most weights."""
    parameters: int
    zeros: int
    """Number of parameters that are exactly 0."""
    bytes: int
    """Size of the weights' files; for a checkpoint, which also holds the optimizer's states, of its weights in float32."""
    quality: Quality
    """Before: the first model; after: this one."""


def print_comparison(settings: CompareSettings) -> int:
    """Compare, print the table, and write it with its picture if --output is given; return the exit status."""
    rows = compare(settings)
    text = (
        f"{_table(rows)}\n\n{rows[0].quality.tokens:,} tokens of {settings.split}. Ratio, KL and the same likeliest token: relative to "
        f"{rows[0].name}. Weights of a checkpoint are counted as float32, without the optimizer's states in its files."
    )
    print(text)
    if settings.output is not None:
        _write(rows, text, Path(settings.output))
    return 0


def compare(settings: CompareSettings, show_progress: bool = True) -> list[ModelRow]:
    """Evaluate every model on the same samples, in the given order; each runs in our network with the numbers that its file stands for.

    Documents are kept apart if all models keep them apart. Raises UserError if the models cannot be compared.
    """
    keep_freed_memory()
    opened: dict[str, OpenedModel] = {}
    for name in settings.models:
        opened[name] = _open(name, list(opened.values()))
    trained = [one for one in opened.values() if one.recipe]
    if not settings.data and not trained:
        raise UserError("None of the models records which data it was trained on. Give --data.")
    folders = open_folders([settings.data] if settings.data else trained[0].data_paths())
    _refuse_incomparable(settings, opened, folders)
    first = load_weights(opened[settings.models[0]])
    task = task_of(first)
    sampling = task.sampling_settings(first, settings.models[0])
    config = dataclasses.replace(first.config, document_mask=all(one.config.document_mask for one in opened.values()))
    length = settings.sequence_length or _smallest_context(opened)
    rows = []
    for name in settings.models:
        other = first if name == settings.models[0] else load_weights(opened[name])
        # The batches of a set can be read once, so each model gets sets of its own.
        sets = task.evaluation_sets(config, folders, sampling, settings.split, settings.micro_batch_size, length)
        rows.append(_row(name, first, other, sets, task.predicts_every_token, settings.micro_batch_size, show_progress))
    refuse_changed(folders.values())
    return rows


def _open(name: str, before: Sequence[OpenedModel]) -> OpenedModel:
    """Open a model; a GGUF file is read in the shape of one of the models before it."""
    path = Path(name)
    if path.suffix != ".gguf":
        return open_model(name)
    if not before:
        raise UserError(
            f"{name} is listed first. A GGUF file needs a model of its shape before it: list the folder it was made from first."
        )
    try:
        types(path)
    except (ValueError, OSError) as error:
        raise UserError(str(error) if isinstance(error, ValueError) else f"{name} cannot be read: {error.strerror}.") from error
    failures = []
    for model in reversed(before):
        try:
            return dataclasses.replace(model, state=GGUFState(path, model.config), folder=path, step=None)
        except ValueError as error:
            failures.append(str(error))
    raise UserError(f"{name} does not have the shape of any model listed before it: {failures[0]}")


def _row(
    name: str,
    first: LoadedModel,
    other: LoadedModel,
    sets: Mapping[str, EvaluationSet],
    is_whole_text: bool,
    micro_batch_size: int,
    show_progress: bool,
) -> ModelRow:
    """Run both models on the sets. The first model runs again for each row, because its logits are too large to keep."""
    device = device_name()
    networks = [one.model.to(device) for one in (first, other)]
    total = Comparison()
    for one in sets.values():
        num_batches = math.ceil(one.num_samples / micro_batch_size)
        for batch in tqdm(one.batches, name, num_batches, leave=False, unit="batch", disable=None if show_progress else True):
            batch = batch.map(lambda tensor: tensor.to(device))
            with torch.inference_mode():
                before = token_logits(networks[0](*batch.inputs))
                after = before if other is first else token_logits(networks[1](*batch.inputs))
                total += compared(before, after, batch.targets)
    mean_bytes = bytes_per_token([one.stream for one in sets.values()]) if is_whole_text else None
    zeros = sum(int((weight == 0).sum()) for weight in other.model.parameters())
    return ModelRow(name, _kind(other), count_parameters(other.config), zeros, weights_bytes(other), total.quality(mean_bytes))


def _smallest_context(opened: Mapping[str, OpenedModel]) -> int:
    return min(one.config.sequence_length for one in opened.values())


def _kind(opened: OpenedModel) -> str:
    if opened.step is not None:
        return f"step {opened.step:,}"
    if opened.folder.is_file():
        return f"gguf {types(opened.folder).most_common(1)[0][0]}"
    if opened.schemes:
        return describe_schemes(opened.schemes.values(), opened.kv_cache)
    return str(next(iter(opened.state.values())).dtype).removeprefix("torch.")


def _refuse_incomparable(settings: CompareSettings, opened: Mapping[str, OpenedModel], folders: Mapping[str, PreparedData]) -> None:
    """Raise UserError if the models cannot read the same samples, or their predictions cannot be compared."""
    context = _smallest_context(opened)
    complaints = []
    if settings.sequence_length is not None and settings.sequence_length > context:
        complaints.append(f"--sequence_length is {settings.sequence_length}; it must be from 1 to {context}, the models' smallest context.")
    first_name, *_ = opened
    first = opened[first_name].config
    for name, one in opened.items():
        config = one.config
        if not config.token_head:
            complaints.append(f"{name} predicts classes, not tokens. launch/evaluate.py evaluates it.")
        for setting in ("architecture", "vocab_size", "token_types", "prefix_attention"):
            if getattr(config, setting) != getattr(first, setting):
                complaints.append(
                    f"{name} has {setting} {getattr(config, setting)}, {first_name} has {getattr(first, setting)}: they cannot be compared "
                    "on the same samples. launch/evaluate.py evaluates each; bits per byte are comparable across vocabularies."
                )
        for prepared in folders.values():
            complaints += mismatched_tokens(one, prepared, name)
    if complaints:
        raise UserError("\n".join(complaints))


def _table(rows: Sequence[ModelRow]) -> str:
    is_whole_text = rows[0].quality.bits_per_byte_after is not None
    header = ["model", "kind", "parameters", "not 0", "weights", "bits a weight", "perplexity", "ratio", "±"]
    header += ["bits per byte"] if is_whole_text else []
    header += ["KL, nats", "same likeliest token"]
    lines = []
    for row in rows:
        quality = row.quality
        line = [row.name, row.kind, f"{row.parameters:,}", f"{1 - row.zeros / row.parameters:.1%}", size_text(row.bytes)]
        line += [f"{8 * row.bytes / row.parameters:.2f}", f"{quality.perplexity_after.value:.3f}"]
        line += [f"{quality.ratio.value:.4f}", f"{quality.ratio.standard_error:.4f}"]
        line += [f"{quality.bits_per_byte_after:.4f}"] if is_whole_text else []
        lines.append([*line, f"{quality.divergence.value:.5f}", f"{quality.agreement.value:.2%}"])
    return table(header, lines)


def _write(rows: Sequence[ModelRow], text: str, output: Path) -> None:
    points = []
    for row in rows:
        before, ratio = row.quality.perplexity_before.value, row.quality.ratio
        points.append(pictures.Point(row.name, row.bytes / 1e6, before * ratio.value, before * ratio.standard_error))
    with new_folder(output) as folder:
        pictures.save(pictures.perplexity_against_bytes(points), folder / "compare.svg")
        (folder / "compare.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        (folder / "compare.md").write_text(f"{text}\n\n![Perplexity against bytes](compare.svg)\n", encoding="utf-8")
