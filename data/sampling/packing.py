"""Samples of causal text: documents joined and cut anywhere, or packed without cuts."""

import functools
import itertools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.best_fit import BestFit
from data.sampling.fill_in_the_middle import MARKS, FillInTheMiddle
from data.sampling.order import sample_generator
from data.sampling.samples import IGNORED, Piece, Sample, Samples, empty_sample
from data.shards import TokenStream


class CausalSamples(Samples):
    """The part that both ways of packing share. A sample has at most `content` tokens of documents; the rest is room for special tokens.

    If the documents of the stream begin with begin_of_text, it is the first input of every piece, also of one that continues a
    document, because that is how a model with this token reads a text; it is never a target. `seed` and `source` decide which pieces
    fill-in-the-middle transforms, and how.
    """

    _num_probed = 512
    """Number of samples, evenly spread, whose pieces are counted to estimate the pieces of all. Each is a read at another place of the
    index, so the number is small."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        end_of_text: int,
        document_mask: bool = False,
        fill: FillInTheMiddle | None = None,
        seed: int = 0,
        source: int = 0,
    ) -> None:
        if len(stream) == 0:
            raise UserError("There are no tokens to train on: the training split is empty. Prepare more text.")
        self.stream = stream
        self.sequence_length = sequence_length
        self.end_of_text = end_of_text
        self.document_mask = document_mask
        self._has_beginnings = stream.begin_of_text is not None
        self._first_input = end_of_text if stream.begin_of_text is None else stream.begin_of_text
        self.seed, self.source = seed, source
        self._fill = fill
        self._spare = fill.spare(sequence_length, type(self)(stream, sequence_length, end_of_text)._probe_pieces()) if fill else 0
        self.content = sequence_length - MARKS * self._spare
        self.num_samples = self._count_samples()

    @functools.cached_property
    def filled_share(self) -> float:
        """Expected share of the pieces that are transformed; below the rate if samples lack room for the special tokens."""
        return self._fill.filled_share(self._spare, self._probe_pieces()) if self._fill else 0.0

    def _count_samples(self) -> int:
        """Return the number of samples in an epoch."""
        raise NotImplementedError

    def num_pieces(self, number: int) -> int:
        """Return the number of pieces in a sample, without reading which documents they are."""
        raise NotImplementedError

    def sample(self, number: int, epoch: int) -> Sample:
        """Return the pieces of a sample one after the other, padded. Fill-in-the-middle differs from epoch to epoch.

        The input before the first target of a document, or of a transformed piece, is end_of_text; before any other piece it is the
        token that precedes the piece in its document. With begin_of_text, it is the input before the first target of every piece.
        """
        pieces = self.documents(number)
        read = [self._read(piece) for piece in pieces]
        befores, texts = [int(tokens[0]) for tokens in read], [tokens[1:] for tokens in read]
        if self._fill:
            generator = sample_generator(self.seed, epoch, number, self.source)
            chosen = np.flatnonzero(generator.random(len(pieces)) < self._fill.rate)
            if len(chosen) > self._spare:  # a random choice: best-fit packing puts the longest pieces first
                chosen = generator.permutation(chosen)[: self._spare]
            for index in chosen:
                texts[index] = self._fill.transform(texts[index], self.end_of_text, generator)
                befores[index] = self._first_input
        tokens, segments, targets, *_ = empty_sample(self.sequence_length)
        end = 0
        for document, (before, text) in enumerate(zip(befores, texts, strict=True), start=1):
            start, end = end, end + len(text)
            tokens[start] = before
            tokens[start + 1 : end] = text[:-1]
            segments[start:end] = document if self.document_mask else 1
            targets[start:end] = text
        return Sample(tokens, segments, targets)

    def _probe_pieces(self) -> NDArray[np.int64]:
        """Return the number of pieces in each of some samples, evenly spread.  -> [samples]"""
        probed = min(self.num_samples, self._num_probed)
        return np.array([self.num_pieces(index * self.num_samples // probed) for index in range(probed)], np.int64)

    def _read(self, piece: Piece) -> NDArray[np.int64]:
        """Return the input before the first target of a piece, and the tokens of the piece.  -> [1 + num_tokens]"""
        start = self.stream.document_start(piece.document) + piece.first
        if piece.first and not self._has_beginnings:
            return self.stream.read(start - 1, piece.num_tokens + 1).astype(np.int64)
        return np.concatenate([[self._first_input], self.stream.read(start, piece.num_tokens)])


class PackedSamples(CausalSamples):
    """Documents joined to one row and cut every `content` tokens: sample i has the tokens i*content to (i+1)*content as targets.

    Every token is a target once an epoch. The first one is predicted from end_of_text. Only the last sample is padded.
    With `document_mask` each document is a segment whose first input is end_of_text, so that it sees nothing of another document.

    If documents begin with begin_of_text, the row begins after the first one. Inside a sample it stands where it stands in the row, as
    an input. At the position before, whose input is the end of the document before, nothing is predicted.
    """

    def _count_samples(self) -> int:
        return -(-(len(self.stream) - self._has_beginnings) // self.content)

    def sample(self, number: int, epoch: int) -> Sample:
        """Return a sample; without fill-in-the-middle it is the same in every epoch."""
        return super().sample(number, epoch) if self._fill else self.window(number * self.content)

    def window(self, start: int) -> Sample:
        """Return the sample whose targets are the sequence_length tokens that begin at index `start` of the row."""
        tokens, segments, targets, *_ = empty_sample(self.sequence_length)
        start += self._has_beginnings
        count = min(self.sequence_length, len(self.stream) - start)
        if start:
            read = self.stream.read(start - 1, count + 1)
            tokens[:count], targets[:count] = read[:-1], read[1:]
        else:
            targets[:count] = self.stream.read(0, count)
            tokens[0], tokens[1:count] = self.end_of_text, targets[: count - 1]
        segments[:count] = 1
        if not self.document_mask and not self._has_beginnings:
            return Sample(tokens, segments, targets)
        starts = self.stream.document_starts(start, count)
        if self._has_beginnings:
            if not (starts == 0).any():
                tokens[0] = self._first_input
            targets[starts] = IGNORED
            starts += 1  # where begin_of_text is the input
        elif self.document_mask:
            tokens[starts] = self.end_of_text
        if self.document_mask:
            inner = starts[starts > 0]
            segments[:count] += np.searchsorted(inner, np.arange(count), side="right")
        return Sample(tokens, segments, targets)

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order. With fill-in-the-middle they are without begin_of_text."""
        start = number * self.content + self._has_beginnings
        edges = self._edges(number)
        documents = [self.stream.document_at(start + edge) for edge in edges[:-1]]
        first = start - self.stream.document_start(documents[0])
        pieces = [
            Piece(document, 0 if edge else first, end - edge)
            for document, (edge, end) in zip(documents, itertools.pairwise(edges), strict=True)
        ]
        if self._fill and self._has_beginnings:
            pieces = [piece if piece.first else Piece(piece.document, 1, piece.num_tokens - 1) for piece in pieces]
        return [piece for piece in pieces if piece.num_tokens]

    def num_pieces(self, number: int) -> int:
        """Return the number of pieces in a sample, without reading which documents they are."""
        return len(self._edges(number)) - 1

    def _edges(self, number: int) -> list[int]:
        """Return the positions in a sample where its pieces begin, and where the last one ends."""
        start = number * self.content + self._has_beginnings
        count = min(self.content, len(self.stream) - start)
        return np.union1d([0, count], self.stream.document_starts(start, count)).tolist()


class BestFitSamples(CausalSamples):
    """Documents packed without cuts: one that fits into a sample is never divided; a longer one gives full samples and a last piece.

    Best-fit-decreasing, each shard on its own (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
    The rest of a sample is padding. Every token is a target once an epoch.
    """

    _num_probed = 4096  # in memory, and more than 512 because a few samples may hold most of the short documents

    def _count_samples(self) -> int:
        return self._packing.num_samples

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        return self._packing.documents(number)

    def num_pieces(self, number: int) -> int:
        """Return the number of pieces in a sample, without reading which documents they are."""
        return self._packing.num_pieces(number)

    @functools.cached_property
    def _packing(self) -> "BestFit":
        return BestFit(self.stream, self.content)


def causal_samples(packing: Literal["packed", "best_fit"]) -> type[CausalSamples]:
    """Return the class of the samples for a value of data.packing."""
    return PackedSamples if packing == "packed" else BestFitSamples
