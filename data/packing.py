"""Documents -> samples: joined and cut anywhere, or packed without cuts."""

import bisect
import functools
import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.fill_in_the_middle import MARKS, FillInTheMiddle, sample_generator
from data.shards import Shard, TokenStream

IGNORED = -100
"""The target of a position that is none. It is model/loss.py's number, written again because data does not import model."""

Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Tokens, segments and targets of a sample, each [sequence_length]; padding has 0, 0 and IGNORED."""

_SUMMED_AT_ONCE = 64
"""Documents between two stored sums of full samples: finding one of them reads the lengths of so many."""


class Piece(NamedTuple):
    """A part of a document, whose tokens are targets of a sample."""

    document: int
    """Its number in the stream, from 0."""
    first: int
    """The place inside the document of the piece's first token."""
    count: int
    """Tokens."""


class Samples:
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

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        raise NotImplementedError

    @property
    def padding_share(self) -> float:
        """The part of all positions that holds no token of a document; the room for marks is in it."""
        return 1 - len(self.stream) / (self.num_samples * self.sequence_length)

    @functools.cached_property
    def filled_share(self) -> float:
        """The share of pieces that is expected to be told out of order; below the rate where samples lack room for the marks."""
        return self._fill.filled_share(self._spare, self._pieces_of_some()) if self._fill else 0.0

    def documents(self, number: int) -> list[Piece]:
        """What a sample has as targets, in order."""
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
        tokens, segments, targets = empty_sample(self.sequence_length)
        end = 0
        for document, (before, text) in enumerate(zip(befores, texts, strict=True), start=1):
            start, end = end, end + len(text)
            tokens[start] = before
            tokens[start + 1 : end] = text[:-1]
            segments[start:end] = document if self.document_mask else 1
            targets[start:end] = text
        return tokens, segments, targets

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


class PackedSamples(Samples):
    """Documents joined to one row and cut every `content` tokens: sample i has the tokens i*content to (i+1)*content as targets.

    Every token is a target once an epoch, the first one too: end_of_text stands before it. Only the last sample is padded.
    With `document_mask` each document is a segment that begins with end_of_text as its input, so that nothing of another
    document is seen from it.
    """

    @property
    def num_samples(self) -> int:
        return -(-len(self.stream) // self.content)

    def sample(self, number: int, epoch: int) -> Sample:
        return super().sample(number, epoch) if self._fill else self.window(number * self.content)

    def window(self, start: int) -> Sample:
        """The sample whose targets are the tokens from a place of the stream on."""
        tokens, segments, targets = empty_sample(self.sequence_length)
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
        return tokens, segments, targets

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


class BestFitSamples(Samples):
    """Documents packed without cuts: one that fits into a sample is never divided, a longer one gives full samples and a last piece.

    Best-fit-decreasing, each shard on its own (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
    The rest of a sample is padding. Every token is a target once an epoch.
    """

    _looked_at = 4096  # Read in memory, and more than 512 because a few samples may hold most of the short documents.

    @property
    def num_samples(self) -> int:
        return self._first_samples[-1]

    def documents(self, number: int) -> list[Piece]:
        shard, inside = self._place(number)
        first = self.stream.first_documents[shard]
        return [piece._replace(document=first + piece.document) for piece in self._shards[shard].pieces(inside)]

    def num_pieces(self, number: int) -> int:
        shard, inside = self._place(number)
        return self._shards[shard].num_pieces(inside)

    def _place(self, number: int) -> tuple[int, int]:
        """A sample's shard, and its number there."""
        shard = bisect.bisect_right(self._first_samples, number) - 1
        return shard, number - self._first_samples[shard]

    @functools.cached_property
    def _shards(self) -> list["_PackedShard"]:
        return [_PackedShard(shard, self.content) for shard in self.stream.shards]

    @functools.cached_property
    def _first_samples(self) -> list[int]:
        """Of each shard, and the number of all."""
        return [0, *itertools.accumulate(shard.num_samples for shard in self._shards)]


class _PackedShard:
    """One shard's samples: full ones in the order of the documents, then groups of bins that hold pieces of the same lengths.

    Which of the documents whose pieces are equally long lies in which bin is arithmetic on `_by_length`, the documents in the
    order of their pieces' lengths. That order, four bytes a document, is made when the shard is first read.
    """

    def __init__(self, shard: Shard, content: int) -> None:
        self._shard = shard
        self._content = content
        lengths = shard.document_lengths()
        counts = np.bincount(lengths % content, minlength=content)
        places = np.cumsum(counts) - counts  # in _by_length, of the next document of each length
        bins, starts, entries = [], [], []
        for number, lengths_and_counts in best_fit_decreasing(counts):
            bins.append(number)
            starts.append(len(entries))
            for length, count in lengths_and_counts:
                entries.append((places[length], length, count))
                places[length] += number * count
        self._entries = np.array(entries, np.int32).reshape(-1, 3)
        self._entry_starts = np.array([*starts, len(entries)], np.int32)
        self._first_bins = np.cumsum([0, *bins])
        self._num_full = int((lengths // content).sum())
        self.num_samples = self._num_full + int(self._first_bins[-1])

    def pieces(self, number: int) -> list[Piece]:
        """The pieces of a sample, their documents counted inside the shard."""
        if number < self._num_full:
            return [self._full_piece(number)]
        before, entries = self._bin(number - self._num_full)
        pieces = []
        for place, length, count in entries.tolist():
            for document in self._by_length[place + before * count : place + (before + 1) * count].tolist():
                end = self._shard.document_start(document + 1) - self._shard.document_start(document)
                pieces.append(Piece(document, end - length, length))
        return pieces

    def num_pieces(self, number: int) -> int:
        """Of a sample, without the order of the documents that `pieces` needs."""
        return 1 if number < self._num_full else int(self._bin(number - self._num_full)[1][:, 2].sum())

    def _bin(self, number: int) -> tuple[int, NDArray[np.int32]]:
        """How many bins of its group come before a bin, and what is in each of them.  -> a number, [lengths, 3]"""
        group = int(np.searchsorted(self._first_bins, number, side="right")) - 1
        return number - int(self._first_bins[group]), self._entries[self._entry_starts[group] : self._entry_starts[group + 1]]

    def _full_piece(self, number: int) -> Piece:
        some = int(np.searchsorted(self._full_before, number, side="right")) - 1
        first = some * _SUMMED_AT_ONCE
        ends = np.cumsum(self._shard.document_lengths(first, first + _SUMMED_AT_ONCE) // self._content)
        number -= int(self._full_before[some])
        document = int(np.searchsorted(ends, number, side="right"))
        if document:
            number -= int(ends[document - 1])
        return Piece(first + document, number * self._content, self._content)

    @functools.cached_property
    def _by_length(self) -> NDArray[np.int32]:
        """[documents]"""
        return np.argsort(self._shard.document_lengths() % self._content, kind="stable").astype(np.int32)

    @functools.cached_property
    def _full_before(self) -> NDArray[np.int64]:
        """Full samples before every _SUMMED_AT_ONCE-th document."""
        full = self._shard.document_lengths() // self._content
        sums = np.add.reduceat(full, np.arange(0, len(full), _SUMMED_AT_ONCE))
        return np.cumsum(sums) - sums


def best_fit_decreasing(counts: NDArray[np.int64]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Pieces into bins, the longest first, each into the fullest bin that has room.  [bin size], pieces by length -> groups of bins

    A group is (how many bins, what is in each of them: (length, count), longest first); counts[0] says nothing. As many bins as
    a piece-by-piece packing has, for pieces of one length do the same to equal bins: they fill them one after the other. A
    length that fills a bin as far as it can at least halves its room, and only one bin a length is left half-filled: so there
    are few groups of few lengths, and the work is in the lengths that occur, not in the pieces.
    """
    size = len(counts)
    by_room: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending

    def put(room: int, bins: int, inside: tuple[tuple[int, int], ...]) -> None:
        if room not in by_room:
            by_room[room] = []
            bisect.insort(rooms, room)
        by_room[room].append((bins, inside))

    for length in (np.flatnonzero(counts[1:])[::-1] + 1).tolist():
        left = int(counts[length])
        while left:
            tightest = bisect.bisect_left(rooms, length)
            if tightest == len(rooms):
                put(size, left, ())  # new bins, more than enough
                continue
            room = rooms[tightest]
            bins, inside = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[tightest]
            count = min(room // length, left)
            filled = min(bins, left // count)
            put(room - count * length, filled, (*inside, (length, count)))
            left -= filled * count
            if filled < bins and inside:
                put(room, bins - filled, inside)
    return [(bins, list(inside)) for groups in by_room.values() for bins, inside in groups]


def empty_sample(sequence_length: int) -> Sample:
    """Padding alone."""
    return np.zeros(sequence_length, np.int64), np.zeros(sequence_length, np.int64), np.full(sequence_length, IGNORED, np.int64)
