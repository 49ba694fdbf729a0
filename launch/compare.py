"""Several models side by side on the same held-out text: python launch/compare.py runs/demo pruned quantized [--data prepared]"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError, read_settings, run_door

if TYPE_CHECKING:
    from torch import Tensor

    from data.shards import PreparedData
    from launch.checkpoints.opening import OpenedModel, TrainedModel
    from launch.evaluation.comparison import Quality


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    models: tuple[str, ...]
    """Two or more run folders, checkpoints in them, Hugging Face folders, or .gguf files of the shape of one before them. The first is what
    the others are compared with. As the first words they need no name."""
    data: str | None = None
    """Folder that data/prepare.py wrote (default: what the first model that says so was trained on)."""
    split: Literal["validation", "train"] = "validation"
    """Which documents of it."""
    sequence_length: int | None = None
    """Tokens of a window, or of a sample (default: the smallest context of a model)."""
    micro_batch_size: int = 16
    """Windows at a time."""
    output: str | None = None
    """New folder for the table (compare.md, compare.json) and a picture of perplexity against bytes (compare.svg)."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A model beside the first one, or the first beside itself."""

    name: str
    kind: str
    """The step of a checkpoint; of what else the type of most weights."""
    parameters: int
    zeros: int
    """Of its parameters, those that are exactly 0."""
    bytes: int
    """Of its files of weights; of a checkpoint, which holds the optimizer's moments too, of its weights in float32."""
    quality: "Quality"
    """Before: the first model; after: this one."""


def read_compare_settings(arguments: Sequence[str]) -> CompareSettings:
    """Settings from the command line, where the words before the first option are models."""
    models = arguments and not arguments[0].startswith("--")
    description = (
        "Several models side by side on the same held-out text: size, perplexity, and what each says beside the first. Memory: two "
        "models in float32."
    )
    return read_settings(CompareSettings, ["--models", *arguments] if models else arguments, description)


def compare(settings: CompareSettings, show_progress: bool = True) -> list[Compared]:
    """Every model on the same samples, in the order given, run by our network on the numbers that its file stands for.

    Documents are kept apart where all models keep them apart.
    """
    from data.sampling.sources import open_folders
    from launch.checkpoints.opening import loaded
    from launch.checkpoints.run_record import paths_of
    from launch.ranks.processes import keep_freed_memory

    if len(settings.models) < 2:
        raise UserError(f"models are {', '.join(settings.models) or 'none'}; give two or more to compare.")
    if settings.output is not None and Path(settings.output).exists():
        raise UserError(f"--output {settings.output} is there already; nothing is overwritten. Give another name.")
    keep_freed_memory()
    opened: dict[str, OpenedModel] = {}
    for name in settings.models:
        opened[name] = _opened(name, list(opened.values()))
    recipes = [one.recipe for one in opened.values() if one.recipe]
    if not settings.data and not recipes:
        raise UserError("None of the models says which data it was trained on: give --data.")
    folders = open_folders([settings.data] if settings.data else paths_of(recipes[0]))
    _refuse_impossible(settings, opened, folders)
    first = loaded(opened[settings.models[0]])
    return [_beside(first, name, settings, opened, folders, show_progress) for name in settings.models]


def _opened(name: str, before: "Sequence[OpenedModel]") -> "OpenedModel":
    from launch.checkpoints.opening import open_model

    path = Path(name)
    if path.suffix != ".gguf":
        return open_model(name)
    from model.compression.gguf_file import GGUFState

    if not before:
        raise UserError(f"{name} stands first; a GGUF file is read in the shape of a model before it: name the folder that it is of.")
    failures = []
    for model in reversed(before):
        try:
            return dataclasses.replace(model, state=GGUFState(path, model.config), folder=path, step=None)
        except (ValueError, OSError) as error:
            failures.append(str(error))
    raise UserError(f"{name} cannot be read in the shape of any model before it: {failures[0]}")


def _beside(
    first: "TrainedModel",
    name: str,
    settings: CompareSettings,
    opened: "Mapping[str, OpenedModel]",
    folders: "Mapping[str, PreparedData]",
    show_progress: bool,
) -> Compared:
    """The row of a model, which is read for it alone. The first model is asked anew for each."""
    import torch
    from tqdm import tqdm

    from launch.checkpoints.opening import loaded
    from launch.compressing.report import weights_bytes
    from launch.evaluation.comparison import Comparison, compared
    from launch.evaluation.evaluation_sets import questions, sampling_of
    from launch.ranks.processes import device_name
    from model.config import count_parameters

    other = first if name == settings.models[0] else loaded(opened[name])
    sampling = sampling_of(first, settings.models[0])
    config = dataclasses.replace(first.config, document_mask=all(one.config.document_mask for one in opened.values()))
    length = settings.sequence_length or _smallest_context(opened)
    device = device_name()
    networks = [one.model.to(device) for one in (first, other)]
    total, num_tokens, num_bytes = Comparison(), 0, 0
    asked_alike = dataclasses.replace(first, config=config)
    for asked in questions(asked_alike, dict(folders), sampling, settings.split, settings.micro_batch_size, length).values():
        num_tokens, num_bytes = num_tokens + len(asked.stream), num_bytes + asked.stream.num_bytes
        count = math.ceil(asked.num_samples / settings.micro_batch_size)
        for batch in tqdm(asked.batches, name, count, leave=False, unit="batch", disable=None if show_progress else True):
            there = batch.map(lambda tensor: tensor.to(device))
            with torch.inference_mode():
                before = _token_logits(networks[0](*there.inputs))
                after = before if other is first else _token_logits(networks[1](*there.inputs))
                total += compared(before, after, there.targets)
    zeros = sum(int((weight == 0).sum()) for weight in other.model.parameters())
    quality = total.quality(num_bytes / num_tokens if sampling.objective == "causal" else None)
    return Compared(name, _kind(other), count_parameters(other.config), zeros, weights_bytes(other), quality)


def _token_logits(outputs: "Tensor | tuple[Tensor, Tensor]") -> "Tensor":
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _smallest_context(opened: "Mapping[str, OpenedModel]") -> int:
    return min(one.config.sequence_length for one in opened.values())


def _kind(opened: "OpenedModel") -> str:
    from model.compression.packed import in_words

    if opened.step is not None:
        return f"step {opened.step:,}"
    if opened.folder.is_file():
        from model.compression.gguf_file import types

        return f"gguf {types(opened.folder).most_common(1)[0][0]}"
    if opened.schemes:
        return in_words(opened.schemes.values(), opened.kv_cache)
    return str(next(iter(opened.state.values())).dtype).removeprefix("torch.")


def _refuse_impossible(settings: CompareSettings, opened: "Mapping[str, OpenedModel]", folders: "Mapping[str, PreparedData]") -> None:
    """Raise UserError where models cannot be asked the same, or their answers not be laid side by side."""
    from launch.evaluation.evaluation_sets import strange_tokens

    context = _smallest_context(opened)
    complaints = []
    if settings.sequence_length is not None and not 1 <= settings.sequence_length <= context:
        complaints.append(f"sequence_length {settings.sequence_length} is outside 1 ... {context}, the smallest context of these models.")
    if settings.micro_batch_size < 1:
        complaints.append(f"micro_batch_size is {settings.micro_batch_size}; it must be at least 1.")
    first_name, *_ = opened
    first = opened[first_name].config
    for name, one in opened.items():
        config = one.config
        if not config.token_head:
            complaints.append(f"{name} predicts no tokens; launch/evaluate.py measures its classes.")
        for setting in ("architecture", "vocab_size", "token_types", "prefix_attention"):
            if getattr(config, setting) != getattr(first, setting):
                complaints.append(
                    f"{name} has {setting} {getattr(config, setting)}, {first_name} {getattr(first, setting)}: they cannot be asked the "
                    "same. launch/evaluate.py measures each; of different vocabularies bits per byte can be compared."
                )
        for prepared in folders.values():
            complaints += strange_tokens(one, prepared, name)
    if complaints:
        raise UserError("\n".join(complaints))


def _table(rows: Sequence[Compared]) -> str:
    from launch.compressing.report import size, table

    whole_text = rows[0].quality.bits_per_byte_after is not None
    header = ["model", "kind", "parameters", "not 0", "weights", "bits a weight", "perplexity", "ratio", "±"]
    header += ["bits per byte"] if whole_text else []
    header += ["KL, nats", "same likeliest token"]
    lines = []
    for row in rows:
        quality = row.quality
        line = [row.name, row.kind, f"{row.parameters:,}", f"{1 - row.zeros / row.parameters:.1%}", size(row.bytes)]
        line += [f"{8 * row.bytes / row.parameters:.2f}", f"{quality.perplexity_after.value:.3f}"]
        line += [f"{quality.ratio.value:.4f}", f"{quality.ratio.standard_error:.4f}"]
        line += [f"{quality.bits_per_byte_after:.4f}"] if whole_text else []
        lines.append([*line, f"{quality.divergence.value:.5f}", f"{quality.agreement.value:.2%}"])
    return table(header, lines)


def _write(rows: Sequence[Compared], text: str, folder: Path) -> None:
    from launch.compressing import pictures

    points = []
    for row in rows:
        before, ratio = row.quality.perplexity_before.value, row.quality.ratio
        points.append(pictures.Point(row.name, row.bytes / 1e6, before * ratio.value, before * ratio.standard_error))
    folder.mkdir(parents=True)
    pictures.save(pictures.perplexity_against_bytes(points), folder / "compare.svg")
    (folder / "compare.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(f"{text}\n\n![Perplexity against bytes](compare.svg)\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    settings = read_compare_settings(arguments)
    rows = compare(settings)
    tokens = rows[0].quality.tokens
    text = (
        f"{_table(rows)}\n\n{tokens:,} tokens of {settings.split}. Ratio, KL and the same likeliest token: to {rows[0].name}. Weights of a "
        "checkpoint are counted as float32, without the optimizer's moments beside them."
    )
    print(text)
    if settings.output is not None:
        _write(rows, text, Path(settings.output))
    return 0


if __name__ == "__main__":
    run_door(main)
