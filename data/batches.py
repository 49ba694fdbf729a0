"""Samples -> batches, one objective a function."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.command_line import UserError
from data.order import rank_share, sample_numbers
from data.shards import TokenStream

IGNORED = -100
"""The target of a position that is none. It is model/loss.py's number, written again because data does not import model."""


class Batch(NamedTuple):
    """One micro-batch, each field [micro_batch_size, sequence_length] int64."""

    tokens: Tensor
    segments: Tensor
    """The number of the document inside the sample, from 1; 0 for padding; all 1 where documents are not told apart."""
    targets: Tensor
    """The token that comes next, or IGNORED."""


def target_tokens(batches: list[Batch]) -> int:
    """How many targets count."""
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)


class CausalBatches:
    """Next-token prediction on a packed stream: sample i reads tokens i*L to (i+1)*L, so each token but the first is a target once.

    With `document_mask` the segments number the documents of a sample, and the first token of a document is nobody's target:
    nothing before it says which document comes.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        document_mask: bool = False,
    ) -> None:
        share = micro_batch_size * world
        if global_batch_size % share:
            below = global_batch_size // share * share
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"data_parallel_size {world} = {share}. Nearest: {f'{below} or ' if below else ''}{below + share}."
            )
        if len(stream) <= sequence_length:
            raise UserError(
                f"The {len(stream)} tokens to train on do not fill one sample of sequence_length {sequence_length}, which reads "
                f"{sequence_length + 1}. Prepare more text or shorten the sequence."
            )
        self.stream = stream
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.document_mask = document_mask
        self.num_samples = (len(stream) - 1) // sequence_length

    def step(self, number: int) -> list[Batch]:
        """This rank's micro-batches of an optimizer step, counted from 0."""
        samples = sample_numbers(number, self.global_batch_size, self.num_samples, self.seed)
        share = rank_share(samples, self.micro_batch_size, self.rank, self.world)
        return [_gather(self.stream, numbers, self.sequence_length, self.document_mask, self.sequence_length) for numbers in share]


def evaluation_batches(
    stream: TokenStream,
    sequence_length: int,
    micro_batch_size: int,
    rank: int = 0,
    world: int = 1,
    limit_samples: int | None = None,
    document_mask: bool = False,
    stride: int | None = None,
) -> Iterator[Batch]:
    """The whole stream in a fixed order, every token but the first a target once; the last sample is padded.

    Each rank gets the same number of batches, the last ones padding where there is nothing left, because ranks must call the
    model together. `limit_samples` takes so many samples, evenly spread. Samples begin `stride` tokens apart (default: side by
    side); where they overlap, the later one reads the tokens again without counting them.
    """
    if len(stream) < 2:
        raise UserError(f"The split to evaluate on has {len(stream)} tokens: no document was held out. Prepare with a larger --held_out.")
    stride = stride or sequence_length
    num_samples = 1 + max(0, -(-(len(stream) - 1 - sequence_length) // stride))
    taken = min(num_samples, limit_samples or num_samples)
    samples = np.arange(taken, dtype=np.int64) * num_samples // taken
    padding = np.full(-taken % (micro_batch_size * world), len(stream), dtype=np.int64)  # past the end: nothing in it
    for numbers in rank_share(np.concatenate([samples, padding]), micro_batch_size, rank, world):
        yield _gather(stream, numbers, sequence_length, document_mask, stride)


def _gather(stream: TokenStream, samples: NDArray[np.int64], sequence_length: int, document_mask: bool, stride: int) -> Batch:
    """[micro_batch_size] sample numbers -> Batch, padded where the stream ends."""
    shape = (len(samples), sequence_length)
    tokens, segments, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, sample in enumerate(samples):
        start = int(sample) * stride
        count = min(sequence_length, len(stream) - 1 - start)
        if count <= 0:
            continue
        read = stream.read(start, count + 1)
        tokens[row, :count], targets[row, :count], segments[row, :count] = read[:-1], read[1:], 1
        if document_mask:
            starts = stream.document_starts(start + 1, count)  # of the targets; the next input of each is one place on
            targets[row, starts] = IGNORED
            segments[row, :count] += np.searchsorted(starts, np.arange(count), side="left")
        if sample > 0:
            targets[row, : sequence_length - stride] = IGNORED  # the sample before has counted them
    return Batch(torch.from_numpy(tokens), torch.from_numpy(segments), torch.from_numpy(targets))
