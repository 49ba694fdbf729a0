"""One sample, the interface of all samples of a source, and padding."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.shards import TokenStream

IGNORED = -100
"""Target of a position that is not predicted. Equals IGNORED of model/loss.py, which data must not import."""


class Sample(NamedTuple):
    """One row of a batch, int64. Fields that the objective does not have are None."""

    tokens: NDArray[np.int64]
    """Ids that the network (in an encoder-decoder, its decoder) reads.  [sequence_length], or [target_length] if there is a source"""
    segments: NDArray[np.int64]
    """Number of the document inside the sample, from 1; negative in the prefix of a prefix-LM; 0 for padding; 1 everywhere if documents
    see one another.  Shape of `tokens`."""
    targets: NDArray[np.int64]
    """Id to predict at each position, or IGNORED.  Shape of `tokens`."""
    token_types: NDArray[np.int64] | None = None
    """Encoders only: 0 for the first text of a sample, 1 for the second.  Shape of `tokens`."""
    source: NDArray[np.int64] | None = None
    """Ids that the encoder of an encoder-decoder reads.  [sequence_length]"""
    source_segments: NDArray[np.int64] | None = None
    """Segments of `source`; a source has the number of its target.  [sequence_length]"""
    classes: NDArray[np.int64] | None = None
    """Class of the whole sample, or IGNORED.  A scalar."""


class Piece(NamedTuple):
    """The part of a document whose tokens are in one sample."""

    document: int
    """Index of the document in the stream, from 0."""
    first: int
    """Index of the piece's first token in the document."""
    num_tokens: int
    """Number of tokens."""


class Samples:
    """All samples of a source, by index. The documents of a sample are the same in every epoch; what it draws at random differs."""

    stream: TokenStream
    num_samples: int
    """Number of samples in an epoch."""
    sequence_length: int
    target_length: int | None = None
    """Tokens that the decoder of an encoder-decoder reads (its encoder reads sequence_length); None for other architectures."""
    start_token: int | None = None
    """Id that the decoder of an encoder-decoder reads before its first target; None for other architectures."""
    num_cut: int = 0
    """Number of documents that are too long for a sample, so that their ends are never read."""

    @property
    def padding_share(self) -> float:
        """Share of all positions that hold no token of a document to predict: padding and the room for special tokens."""
        return 1 - self.stream.num_predicted / (self.num_samples * (self.sequence_length + (self.target_length or 0)))

    @property
    def filled_share(self) -> float:
        """Share of the pieces of documents that fill-in-the-middle is expected to transform."""
        return 0.0

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds in every epoch, in order."""
        raise NotImplementedError

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        raise NotImplementedError


def empty_sample(sequence_length: int) -> Sample:
    """Return a sample of padding alone: tokens 0, segments 0, targets IGNORED."""
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
    """Return the sample of an encoder, padded to sequence_length.  [n] each, n at most sequence_length"""
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
    """Return the sample of an encoder-decoder, padded.  [n], [n], [m], [m]

    In each segment the decoder reads the start token and then its own targets, one position later.
    """
    sample, count = empty_sample(target_length), len(targets)
    sample.tokens[1:count] = targets[:-1]
    sample.tokens[:count][np.diff(segments, prepend=0) != 0] = start_token
    sample.targets[:count], sample.segments[:count] = targets, segments
    rows = np.zeros((2, sequence_length), np.int64)
    rows[:, : len(source)] = source, source_segments
    return sample._replace(source=rows[0], source_segments=rows[1])


def padding_like(sample: Sample) -> Sample:
    """Return a sample of the same shapes in which nothing is predicted."""
    empty = Sample._make(None if field is None else np.zeros_like(field) for field in sample)
    classes = None if sample.classes is None else np.full_like(sample.classes, IGNORED)
    return empty._replace(targets=np.full_like(sample.targets, IGNORED), classes=classes)


def require_length(sequence_length: int, least: int, objective: str, parts: str) -> None:
    """Raise UserError if a sample is too short for the smallest text and its special tokens."""
    if sequence_length < least:
        raise UserError(f"model.sequence_length is {sequence_length}; data.objective {objective} needs room for {parts}: at least {least}.")
