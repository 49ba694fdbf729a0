"""What a trained model is asked about a split of prepared data: windows of the text, or samples of what it was trained for."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.command_line import UserError
from data.sampling.batches import Batch, evaluation_batches, held_out_batches, num_evaluation_samples
from data.sampling.sources import OBJECTIVES, SamplingSettings, open_held_out
from data.tokenization.comparison import tokenized_otherwise
from data.tokenization.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from data.sampling.batches import Batch
    from data.shards import PreparedData, TokenStream
    from launch.checkpoints.opening import OpenedModel


@dataclasses.dataclass(frozen=True)
class Questions:
    """Of one source."""

    batches: "Iterator[Batch]"
    num_samples: int
    stream: "TokenStream"


def sampling_of(opened: "OpenedModel", name: str, objective: str | None = None, labels: Iterable[str] = ()) -> SamplingSettings:
    """What samples ask for: as the run's did, or as the model of an exported folder can answer, and what is given over both.

    `name` is the model's in complaints. Raises UserError where labels and classes are not equally many.
    """
    fields = {field.name for field in dataclasses.fields(SamplingSettings)}
    config, data = opened.config, opened.recipe.get("data", {})
    known = {field: tuple(value) if isinstance(value, list) else value for field, value in data.items() if field in fields}
    known |= {"path": (), "weights": ()} | ({"objective": objective} if objective else {})
    known |= {"labels": tuple(labels)} if labels else {}
    if not known.get("objective"):
        default, other = OBJECTIVES[config.architecture]
        known["objective"] = other if config.prefix_attention or not config.token_head else default
    if not opened.recipe:
        known["next_sentence"] = known["objective"] == "masked" and config.num_classes == 2
        known["start_token"] = _start_token(opened) if config.architecture == "encoder_decoder" else None
    sampling = SamplingSettings(**known)
    if sampling.objective == "classification" and len(sampling.labels) != config.num_classes:
        raise UserError(
            f"labels are {len(sampling.labels)}; {name} tells {config.num_classes} classes apart. Give --labels, in their order."
        )
    return sampling


def questions(
    opened: "OpenedModel",
    folders: "dict[str, PreparedData]",
    sampling: SamplingSettings,
    split: str,
    micro_batch_size: int,
    length: int | None = None,
    stride: int | None = None,
    limit_samples: int | None = None,
) -> dict[str, Questions]:
    """Of each folder that has such a split, in a fixed order; `length` and `stride` in tokens are the model's context where not given.

    `limit_samples` takes so many of each, evenly spread. Raises UserError where there are none at all.
    """
    config = opened.config
    length = length or config.sequence_length
    stride = stride or length
    # Where all are empty the first is read all the same, and says so.
    chosen = {name: folder for name, folder in folders.items() if len(folder.splits[split])} or dict(list(folders.items())[:1])
    asked = {}
    if sampling.objective == "causal":
        for name, folder in chosen.items():
            stream, end = folder.splits[split], folder.end_of_text
            batches = evaluation_batches(
                stream, length, micro_batch_size, end, limit_samples=limit_samples, document_mask=config.document_mask, stride=stride
            )
            count = num_evaluation_samples(len(stream), length, stride)
            asked[name] = Questions(batches, min(count, limit_samples or count), stream)
        return asked
    samples = open_held_out(chosen, sampling, length, config.document_mask, config.architecture, config.token_types, split)
    if not samples:
        raise UserError(f"{split} of {', '.join(chosen)} has no document: prepare with a larger --held_out.")
    for name, one in samples.items():
        count = min(one.num_samples, limit_samples or one.num_samples)
        batches = held_out_batches(one, micro_batch_size, limit_samples=limit_samples)
        asked[name] = Questions(batches, count, chosen[name].splits[split])
    return asked


def strange_tokens(opened: "OpenedModel", prepared: "PreparedData", name: str) -> list[str]:
    """A sentence where a folder's tokens are not the model's."""
    complaints = []
    if prepared.vocab_size > opened.config.vocab_size:
        complaints.append(f"{prepared.folder} has token ids up to {prepared.vocab_size - 1}; {name} knows {opened.config.vocab_size}.")
    tokenizer, other = opened.tokenizer, prepared.tokenizer_path
    if tokenizer and tokenizer.name == other.name:
        if tokenizer.read_bytes() != other.read_bytes():
            complaints.append(f"{prepared.folder} was tokenized with another {other.name} than {name} was trained with.")
        elif load_tokenizer(tokenizer).settings != load_tokenizer(other).settings:
            complaints.append(f"{prepared.folder} was tokenized with other settings beside {other.name} than {name} was trained with.")
    elif tokenizer and not complaints and tokenized_otherwise(prepared, tokenizer):
        complaints.append(f"{prepared.folder} was tokenized by {other.name}, which gives other ids than {name}'s {tokenizer.name}.")
    return complaints


def _start_token(opened: "OpenedModel") -> str | None:
    """What data.start_token is to be for the decoder of an exported folder."""
    if opened.tokenizer is None:
        return None
    tokenizer = load_tokenizer(opened.tokenizer)
    start = opened.start_token(tokenizer)
    if start not in tokenizer.special_names:
        raise UserError(f"{opened.folder}/config.json: decoder_start_token_id {start} is no special token of {tokenizer.path}.")
    return None if start == tokenizer.end_of_text else tokenizer.special_names[start]


def first_inputs(batches: Sequence[Batch], device: torch.device) -> list[tuple[Tensor, ...]]:
    """What the first layer of the list takes."""
    return [batch.map(lambda tensor: tensor.to(device)).inputs for batch in batches]
