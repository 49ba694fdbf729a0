"""The body of data/show.py: the samples of a step as text."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data.sampling.batch_plan import BatchPlan
from data.sampling.batches import TrainingBatches
from data.sampling.samples import Piece, Sample
from data.sampling.show_settings import ShowSettings, changes_of_run, read_run_record, segments_of_run
from data.sampling.sources import Sampling, fingerprint_of, open_folders, open_sampling


def show(settings: ShowSettings) -> Iterator[str]:
    """Yield the lines that describe a rank's micro-batches of a step, row by row."""
    if settings.run and (changes := changes_of_run(settings.run)):
        yield f"The run was resumed with changes: {'; '.join(changes)}. Earlier steps read other samples than those shown here."
    model, folders = settings.model, open_folders(settings.data.path)
    recorded = read_run_record(settings.run).get("data_fingerprint") if settings.run else None
    if recorded not in (None, fingerprint_of(folders.values())):
        paths = ", ".join(settings.data.path)
        yield f"The data in {paths} differs from the data that {settings.run} was trained on. The run read other samples than those here."
    sampling = open_sampling(
        folders,
        settings.data,
        model.sequence_length,
        model.document_mask,
        settings.seed,
        model.architecture,
        model.token_types,
    )
    plan = BatchPlan(settings.batch, model.sequence_length, segments=segments_of_run(settings))
    size = plan.size(settings.step - 1)
    share = settings.batch.accumulation_steps(settings.world_size, "world_size", size)
    batch = dataclasses.replace(
        settings.batch, global_batch_size=size, micro_batch_size=settings.batch.micro_batch_size or share, ramp=None
    )
    plan = dataclasses.replace(plan, batch=batch)
    batches = TrainingBatches(sampling.samples, sampling.blend, plan, settings.rank, settings.world_size)
    yield (
        f"step {settings.step}, rank {settings.rank} of {settings.world_size}: samples of {model.sequence_length}"
        f"{f' and {sampling.target_length}' if sampling.target_length else ''} tokens, {sampling.objective.brief}, seed {settings.seed}"
    )
    micro_batches = zip(batches.step_samples(settings.step - 1).tolist(), batches.step(settings.step - 1), strict=True)
    for number, (samples, micro_batch) in enumerate(micro_batches):
        for row, (source, epoch, sample) in enumerate(samples):
            yield f"micro-batch {number}, row {row}: {sampling.names[source]}, epoch {epoch}, sample {sample}"
            fields = Sample._make(None if field is None else field[row].numpy() for field in micro_batch)
            yield from _describe_sample(sampling, source, sample, fields, settings.characters)


def _describe_sample(sampling: Sampling, source: int, number: int, sample: Sample, characters: int) -> Iterator[str]:
    """Yield the documents of a sample with their text, in the order of its objective, its class and its padding."""
    for part in sampling.objective.shown_parts(sample, sampling.samples[source].documents(number)):
        if part.piece is not None:
            yield f"{_describe_piece(sampling, source, part.piece)}{part.remark}"
        for name, tokens in part.texts:
            yield f"    {name}{': ' if name else ''}{_shorten(_as_text(sampling, tokens), characters)}"
    if sample.classes is not None:
        yield f"    class: {int(sample.classes)}"
    padding = sum(int((segments == 0).sum()) for segments in (sample.segments, sample.source_segments) if segments is not None)
    if padding:
        yield f"  {padding} positions of padding"


def _describe_piece(sampling: Sampling, source: int, piece: Piece) -> str:
    """Return the place that a document came from, and which of its tokens the sample has."""
    folder, stream = list(sampling.folders.values())[source], sampling.samples[source].stream
    length = stream.document_start(piece.document + 1) - stream.document_start(piece.document)
    last = piece.first + piece.num_tokens - 1
    tokens = f"all {length} tokens" if piece.num_tokens == length else f"tokens {piece.first} to {last} of {length}"
    return f"  {folder.place_of('train', piece.document)}: {tokens}"


def _as_text(sampling: Sampling, ids: NDArray[np.int64]) -> str:
    """Return the text of ids as Python string literals on one line, with special tokens by name.  [n]"""
    tokenizer, special_names = sampling.tokenizer, sampling.tokenizer.special_names
    parts: list[str] = []
    ordinary: list[int] = []
    for token in [*ids.tolist(), None]:
        if token is not None and token not in special_names:
            ordinary.append(token)
            continue
        if ordinary:
            parts.append(repr(tokenizer.decode(ordinary)))
            ordinary = []
        if token is not None:
            parts.append(special_names[token])
    return " ".join(parts)


def _shorten(text: str, characters: int) -> str:
    if not characters or len(text) <= characters:
        return text
    return f"{text[: characters - characters // 2]} ... {text[len(text) - characters // 2 :]}"
