"""Documents packed into samples without cuts."""

import bisect
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from data.sampling.samples import Piece
from data.shards import Shard, TokenStream

_SUMMED_AT_ONCE = 64
"""Documents between two stored sums of full samples: finding one of them reads the lengths of so many."""


class BestFit:
    """A best-fit-decreasing packing of the documents of a stream into samples of at most `content` tokens.

    Where each piece of a document comes with `marks` tokens of its own, samples have so many more positions: a full piece fills
    one. The last `ends` tokens of each document are left out.
    """

    def __init__(self, stream: TokenStream, content: int, marks: int = 0, ends: int = 0) -> None:
        self._first_documents = stream.first_documents
        self._shards = [_PackedShard(shard, content, marks, ends) for shard in stream.shards]
        self._first_samples = [0, *itertools.accumulate(shard.num_samples for shard in self._shards)]

    @property
    def num_samples(self) -> int:
        return self._first_samples[-1]

    def documents(self, number: int) -> list[Piece]:
        """What a sample holds, the longest piece first."""
        shard, inside = self._place(number)
        first = self._first_documents[shard]
        return [piece._replace(document=first + piece.document) for piece in self._shards[shard].pieces(inside)]

    def num_pieces(self, number: int) -> int:
        """Of a sample, without looking which."""
        shard, inside = self._place(number)
        return self._shards[shard].num_pieces(inside)

    def _place(self, number: int) -> tuple[int, int]:
        """A sample's shard, and its number there."""
        shard = bisect.bisect_right(self._first_samples, number) - 1
        return shard, number - self._first_samples[shard]


class _PackedShard:
    """One shard's samples: full ones in the order of the documents, then groups of bins that hold pieces of the same lengths.

    Which of the documents whose pieces are equally long lies in which bin is arithmetic on `_by_length`, the documents in the
    order of their pieces' lengths. That order, four bytes a document, is made when the shard is first read.
    """

    def __init__(self, shard: Shard, content: int, marks: int, ends: int) -> None:
        self._shard = shard
        self._content, self._ends = content, ends
        lengths = self._lengths()
        counts = np.bincount(lengths % content, minlength=content)
        places = np.cumsum(counts) - counts  # in _by_length, of the next document of each length
        bins, starts, entries = [], [], []
        for number, lengths_and_counts in best_fit_decreasing(np.concatenate([np.zeros(marks + 1, np.int64), counts[1:]])):
            bins.append(number)
            starts.append(len(entries))
            for length_with_marks, count in lengths_and_counts:
                length = length_with_marks - marks
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
                end = self._shard.document_start(document + 1) - self._shard.document_start(document) - self._ends
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
        ends = np.cumsum(self._lengths(first, first + _SUMMED_AT_ONCE) // self._content)
        number -= int(self._full_before[some])
        document = int(np.searchsorted(ends, number, side="right"))
        if document:
            number -= int(ends[document - 1])
        return Piece(first + document, number * self._content, self._content)

    def _lengths(self, first: int = 0, last: int | None = None) -> NDArray[np.int64]:
        """Of the documents, without their ends.  -> [documents]"""
        return np.maximum(self._shard.document_lengths(first, last) - self._ends, 0)

    @functools.cached_property
    def _by_length(self) -> NDArray[np.int32]:
        """[documents]"""
        return np.argsort(self._lengths() % self._content, kind="stable").astype(np.int32)

    @functools.cached_property
    def _full_before(self) -> NDArray[np.int64]:
        """Full samples before every _SUMMED_AT_ONCE-th document."""
        full = self._lengths() // self._content
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
