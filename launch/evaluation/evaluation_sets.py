"""Evaluation sets: what a model is evaluated on in a split of prepared data, windows of the text or samples of its objective."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from data.command_line import UserError
from data.sampling.batches import Batch, evaluation_batches, held_out_batches, num_evaluation_samples
from data.sampling.objectives.causal import Causal
from data.sampling.objectives.table import refuse_other_records
from data.sampling.settings import SamplingSettings
from data.sampling.sources import open_held_out
from data.shards import PreparedData, TokenStream
from data.tokenization.comparison import beginnings_differ, tokens_differ
from data.tokenization.loading import load_tokenizer
from launch.checkpoints.opening import OpenedModel
from model.config import ModelConfig
from model.layers import Stream


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """The evaluation batches of one source."""

    batches: Iterator[Batch]
    num_samples: int
    stream: TokenStream
    """The tokens of the split."""


def window_sets(
    config: ModelConfig,
    folders: Mapping[str, PreparedData],
    split: str,
    micro_batch_size: int,
    length: int,
    stride: int,
    limit_samples: int | None = None,
) -> dict[str, EvaluationSet]:
    """Return windows over the whole text of each folder; the arguments are those of Task.evaluation_sets."""
    sets = {}
    for name, folder in _with_split(folders, split).items():
        refuse_other_records(Causal, folder, split)
        stream, end = folder.splits[split], folder.end_of_text
        batches = evaluation_batches(
            stream, length, micro_batch_size, end, limit_samples=limit_samples, document_mask=config.document_mask, stride=stride
        )
        count = num_evaluation_samples(stream, length, stride)
        sets[name] = EvaluationSet(batches, min(count, limit_samples or count), stream)
    return sets


def sample_sets(
    config: ModelConfig,
    folders: Mapping[str, PreparedData],
    sampling: SamplingSettings,
    split: str,
    micro_batch_size: int,
    length: int,
    limit_samples: int | None = None,
) -> dict[str, EvaluationSet]:
    """Return samples of the objective from each folder; the arguments are those of Task.evaluation_sets."""
    chosen = _with_split(folders, split)
    samples = open_held_out(chosen, sampling, length, config.document_mask, config.architecture, config.token_types, split)
    if not samples:
        raise UserError(f"The {split} split of {', '.join(chosen)} has no document. Prepare the data with a larger --held_out.")
    sets = {}
    for name, one in samples.items():
        batches = held_out_batches(one, micro_batch_size, limit_samples=limit_samples)
        sets[name] = EvaluationSet(batches, min(one.num_samples, limit_samples or one.num_samples), chosen[name].splits[split])
    return sets


def _with_split(folders: Mapping[str, PreparedData], split: str) -> dict[str, PreparedData]:
    """Return the folders that have the split, or, if none has it, the first one, which raises the error when it is read."""
    return {name: folder for name, folder in folders.items() if len(folder.splits[split])} or dict(list(folders.items())[:1])


def mismatched_tokens(opened: OpenedModel, prepared: PreparedData, name: str) -> list[str]:
    """Return an error message for each way in which a folder's tokens are not the model's; `name` names the model in them."""
    complaints = []
    if prepared.vocab_size > opened.config.vocab_size:
        complaints.append(
            f"{prepared.folder} has token ids up to {prepared.vocab_size - 1}; the vocabulary of {name} has {opened.config.vocab_size} ids."
        )
    tokenizer, other = opened.tokenizer, prepared.tokenizer_path
    has_same_name = tokenizer is not None and tokenizer.name == other.name
    if tokenizer and has_same_name and tokenizer.read_bytes() == other.read_bytes():
        if load_tokenizer(tokenizer).settings != load_tokenizer(other).settings:
            complaints.append(f"{prepared.folder} was tokenized with different settings next to {other.name} than {name} was trained with.")
    elif tokenizer and has_same_name and tokenizer.suffix != ".json":
        complaints.append(f"{prepared.folder} was tokenized with a different {other.name} than {name} was trained with.")
    elif tokenizer and not complaints and tokens_differ(prepared, tokenizer):  # tokenizer.json files may differ in their post-processors
        complaints.append(f"{prepared.folder} was tokenized with {other.name}, which gives different ids than {name}'s {tokenizer.name}.")
    if tokenizer and not complaints and opened.config.architecture == "decoder":
        complaints += filter(None, [beginnings_differ(prepared, tokenizer, name)])
    return complaints


def first_inputs(batches: Sequence[Batch], device: torch.device) -> list[Stream]:
    """Return what the first layer reads of each batch, on the device."""
    return [Stream.from_tensors(batch.map(lambda tensor: tensor.to(device)).inputs) for batch in batches]
