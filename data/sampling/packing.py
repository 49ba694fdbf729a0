"""Documents -> samples: joined and cut anywhere, or packed without cuts."""

import functools
import itertools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.best_fit import BestFit
from data.sampling.fill_in_the_middle import MARKS, FillInTheMiddle
from data.sampling.order import sample_generator
from data.sampling.samples import Piece, Sample, Samples, empty_sample
from data.shards import TokenStream


class CausalSamples(Samples):
    """What both ways of packing share: `content` tokens of documents a sample at most, and the room that marks may need beside it.

    The samples of two sources are told out of order by other draws if they have other numbers as `source`.
    """

    _looked_at = 512
    """Samples, evenly spread, whose numbers of pieces say what all have: few, for each is a read at another place of the index."""

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
        self.seed, self.source = seed, source
        self._fill = fill
        self._spare = fill.spare(sequence_length, type(self)(stream, sequence_length, end_of_text)._pieces_of_some()) if fill else 0
        self.content = sequence_length - MARKS * self._spare
        self.num_samples = self._count_samples()

    @functools.cached_property
    def filled_share(self) -> float:
        """Expected share of the pieces that are transformed; below the rate if samples lack room for the special tokens."""
        return self._fill.filled_share(self._spare, self._pieces_of_some()) if self._fill else 0.0

    def _count_samples(self) -> int:
        raise NotImplementedError

    def num_pieces(self, number: int) -> int:
        """How many documents(number) has, without looking which."""
        raise NotImplementedError

    def sample(self, number: int, epoch: int) -> Sample:
        """Its pieces one behind the other, padded; the fill-in-the-middle differs from epoch to epoch.

        What stands before a document is end_of_text, and so it is before a piece told out of order; before another piece it is
        the token that precedes it in its document.
        """
        pieces = self.documents(number)
        read = [self._read(piece) for piece in pieces]
        befores, texts = [int(tokens[0]) for tokens in read], [tokens[1:] for tokens in read]
        if self._fill:
            generator = sample_generator(self.seed, epoch, number, self.source)
            chosen = np.flatnonzero(generator.random(len(pieces)) < self._fill.rate)
            if len(chosen) > self._spare:  # not the first of them: best-fit packing puts the longest there
                chosen = generator.permutation(chosen)[: self._spare]
            for place in chosen:
                texts[place] = self._fill.transform(texts[place], self.end_of_text, generator)
                befores[place] = self.end_of_text
        tokens, segments, targets, *_ = empty_sample(self.sequence_length)
        end = 0
        for document, (before, text) in enumerate(zip(befores, texts, strict=True), start=1):
            start, end = end, end + len(text)
            tokens[start] = before
            tokens[start + 1 : end] = text[:-1]
            segments[start:end] = document if self.document_mask else 1
            targets[start:end] = text
        return Sample(tokens, segments, targets)

    def _pieces_of_some(self) -> NDArray[np.int64]:
        """How many each of the samples looked at has.  -> [samples]"""
        looked_at = min(self.num_samples, self._looked_at)
        return np.array([self.num_pieces(place * self.num_samples // looked_at) for place in range(looked_at)], np.int64)

    def _read(self, piece: Piece) -> NDArray[np.int64]:
        """The token before the piece, and its own.  -> [1 + count]"""
        start = self.stream.document_start(piece.document) + piece.first
        if piece.first:
            return self.stream.read(start - 1, piece.count + 1).astype(np.int64)
        return np.concatenate([[self.end_of_text], self.stream.read(start, piece.count)])


class PackedSamples(CausalSamples):
    """Documents joined to one row and cut every `content` tokens: sample i has the tokens i*content to (i+1)*content as targets.

    Every token is a target once an epoch, the first one too: end_of_text stands before it. Only the last sample is padded.
    With `document_mask` each document is a segment that begins with end_of_text as its input, so that nothing of another
    document is seen from it.
    """

    def _count_samples(self) -> int:
        return -(-len(self.stream) // self.content)

    def sample(self, number: int, epoch: int) -> Sample:
        return super().sample(number, epoch) if self._fill else self.window(number * self.content)

    def window(self, start: int) -> Sample:
        """The sample whose targets are the tokens from a place of the stream on."""
        tokens, segments, targets, *_ = empty_sample(self.sequence_length)
        count = min(self.sequence_length, len(self.stream) - start)
        if start:
            read = self.stream.read(start - 1, count + 1)
            tokens[:count], targets[:count] = read[:-1], read[1:]
        else:
            targets[:count] = self.stream.read(0, count)
            tokens[0], tokens[1:count] = self.end_of_text, targets[: count - 1]
        segments[:count] = 1
        if self.document_mask:
            starts = self.stream.document_starts(start, count)
            tokens[starts] = self.end_of_text
            inner = starts[starts > 0]
            segments[:count] += np.searchsorted(inner, np.arange(count), side="right")
        return Sample(tokens, segments, targets)

    def documents(self, number: int) -> list[Piece]:
        start = number * self.content
        edges = self._edges(number)
        documents = [self.stream.document_at(start + edge) for edge in edges[:-1]]
        first = start - self.stream.document_start(documents[0])
        return [
            Piece(document, 0 if edge else first, end - edge)
            for document, (edge, end) in zip(documents, itertools.pairwise(edges), strict=True)
        ]

    def num_pieces(self, number: int) -> int:
        return len(self._edges(number)) - 1

    def _edges(self, number: int) -> list[int]:
        """Where the pieces of a sample begin, and where the last one ends."""
        start = number * self.content
        count = min(self.content, len(self.stream) - start)
        return np.union1d([0, count], self.stream.document_starts(start, count)).tolist()


class BestFitSamples(CausalSamples):
    """Documents packed without cuts: one that fits into a sample is never divided, a longer one gives full samples and a last piece.

    Best-fit-decreasing, each shard on its own (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
    The rest of a sample is padding. Every token is a target once an epoch.
    """

    _looked_at = 4096  # Read in memory, and more than 512 because a few samples may hold most of the short documents.

    def _count_samples(self) -> int:
        return self._packing.num_samples

    def documents(self, number: int) -> list[Piece]:
        return self._packing.documents(number)

    def num_pieces(self, number: int) -> int:
        return self._packing.num_pieces(number)

    @functools.cached_property
    def _packing(self) -> "BestFit":
        return BestFit(self.stream, self.content)


def causal_samples(packing: Literal["packed", "best_fit"]) -> type[CausalSamples]:
    """Return the class of the samples for a value of data.packing."""
    return PackedSamples if packing == "packed" else BestFitSamples
