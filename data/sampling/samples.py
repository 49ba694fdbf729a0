"""A sample, the samples of a source, and padding."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.shards import TokenStream

IGNORED = -100
"""The target of a position that is none. It is model/loss.py's number, written again because data does not import model."""


class Sample(NamedTuple):
    """One row of a batch, int64; None for what the objective does not have."""

    tokens: NDArray[np.int64]
    """What the network reads, a decoder behind an encoder included.  [sequence_length], or [target_length] where there is a source"""
    segments: NDArray[np.int64]
    """The number of the document inside the sample, from 1, negative in the prefix of a prefix-LM; 0 for padding; all 1 where documents
    are not told apart.  As `tokens`."""
    targets: NDArray[np.int64]
    """What is to be said at each place, or IGNORED.  As `tokens`."""
    token_types: NDArray[np.int64] | None = None
    """Of an encoder: 0 for the first text of a sample, 1 for the second.  As `tokens`."""
    source: NDArray[np.int64] | None = None
    """What the encoder of an encoder-decoder reads.  [sequence_length]"""
    source_segments: NDArray[np.int64] | None = None
    """The source that belongs to a target has its number.  [sequence_length]"""
    classes: NDArray[np.int64] | None = None
    """Of the whole sample, or IGNORED.  A scalar."""


class Piece(NamedTuple):
    """A part of a document, whose tokens are targets of a sample."""

    document: int
    """Its number in the stream, from 0."""
    first: int
    """The place inside the document of the piece's first token."""
    count: int
    """Tokens."""


class Samples:
    """What training reads of a source, by number: which samples there are is fixed, what each draws at random differs by epoch."""

    stream: TokenStream
    num_samples: int
    """Samples of an epoch."""
    sequence_length: int
    target_length: int | None = None
    """Tokens of the decoder of an encoder-decoder, whose encoder reads sequence_length; None elsewhere."""
    start_token: int | None = None
    """What that decoder reads before its first target."""
    num_cut: int = 0
    """Documents whose ends are never read, because they are too long."""

    @property
    def padding_share(self) -> float:
        """The part of all positions that holds no token of a document: padding, and the room for marks."""
        return 1 - len(self.stream) / (self.num_samples * (self.sequence_length + (self.target_length or 0)))

    @property
    def filled_share(self) -> float:
        """Share of the pieces of documents that fill-in-the-middle is expected to transform."""
        return 0.0

    def documents(self, number: int) -> list[Piece]:
        """What a sample holds in every epoch, in order."""
        raise NotImplementedError

    def sample(self, number: int, epoch: int) -> Sample:
        raise NotImplementedError


def empty_sample(sequence_length: int) -> Sample:
    """Padding alone: 0, 0 and IGNORED."""
    zeros = np.zeros((2, sequence_length), np.int64)
    return Sample(zeros[0], zeros[1], np.full(sequence_length, IGNORED, np.int64))


def encoder_sample(
    sequence_length: int,
    tokens: NDArray[np.int64],
    segments: NDArray[np.int64],
    targets: NDArray[np.int64],
    token_types: NDArray[np.int64] | None = None,
    classes: np.int64 | None = None,
) -> Sample:
    """Padded.  [n] each, n up to sequence_length"""
    sample, count = empty_sample(sequence_length), len(tokens)
    sample.tokens[:count], sample.segments[:count], sample.targets[:count] = tokens, segments, targets
    types = None if token_types is None else np.pad(token_types, (0, sequence_length - count))
    return sample._replace(token_types=types, classes=None if classes is None else np.array(classes, np.int64))


def encoder_decoder_sample(
    sequence_length: int,
    target_length: int,
    start_token: int,
    source: NDArray[np.int64],
    source_segments: NDArray[np.int64],
    targets: NDArray[np.int64],
    segments: NDArray[np.int64],
) -> Sample:
    """Padded; the decoder reads the start token and then its targets, segment by segment.  [n], [n], [m], [m]"""
    sample, count = empty_sample(target_length), len(targets)
    sample.tokens[1:count] = targets[:-1]
    sample.tokens[:count][np.diff(segments, prepend=0) != 0] = start_token
    sample.targets[:count], sample.segments[:count] = targets, segments
    rows = np.zeros((2, sequence_length), np.int64)
    rows[:, : len(source)] = source, source_segments
    return sample._replace(source=rows[0], source_segments=rows[1])


def padding_like(sample: Sample) -> Sample:
    """A sample of the same shapes in which nothing counts."""
    empty = Sample(*(None if field is None else np.zeros_like(field) for field in sample))
    classes = None if sample.classes is None else np.full_like(sample.classes, IGNORED)
    return empty._replace(targets=np.full_like(sample.targets, IGNORED), classes=classes)


def require_length(sequence_length: int, least: int, objective: str, parts: str) -> None:
    """Raise UserError if a sample is too short for the smallest text and its special tokens."""
    if sequence_length < least:
        raise UserError(f"model.sequence_length is {sequence_length}; data.objective {objective} needs room for {parts}: at least {least}.")
