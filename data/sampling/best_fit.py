"""Documents packed into samples without cuts."""

import bisect
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from data.sampling.samples import Piece
from data.shards import Shard, TokenStream

_SUMMED_AT_ONCE = 64
"""Number of documents between two stored sums of full samples; finding a sample reads the lengths of this many documents."""


class BestFit:
    """A best-fit-decreasing packing of the documents of a stream into samples of at most `content` tokens.

    If each piece needs `marks` special tokens of its own, a sample has room for `content + marks` tokens, so that a full piece fills
    one sample. The last `ends` tokens of each document are left out, and its begin-of-text token, if the stream has one.
    """

    def __init__(self, stream: TokenStream, content: int, marks: int = 0, ends: int = 0) -> None:
        self._first_documents = stream.first_documents
        begins = int(stream.begin_of_text is not None)
        self._shards = [_PackedShard(shard, content, marks, begins, ends) for shard in stream.shards]
        self._first_samples = [0, *itertools.accumulate(shard.num_samples for shard in self._shards)]

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return self._first_samples[-1]

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces that a sample holds, the longest one first."""
        shard, inside = self._locate(number)
        first = self._first_documents[shard]
        return [piece._replace(document=first + piece.document) for piece in self._shards[shard].pieces(inside)]

    def num_pieces(self, number: int) -> int:
        """Return the number of pieces in a sample, without reading which documents they are."""
        shard, inside = self._locate(number)
        return self._shards[shard].num_pieces(inside)

    def _locate(self, number: int) -> tuple[int, int]:
        """Return a sample's shard and its number in the shard."""
        shard = bisect.bisect_right(self._first_samples, number) - 1
        return shard, number - self._first_samples[shard]


class _PackedShard:
    """The samples of one shard: first the full ones in the order of the documents, then groups of bins that hold pieces of equal lengths.

    Among documents whose pieces are equally long, arithmetic on `_by_length` decides which one lies in which bin. `_by_length` holds
    the documents in the order of their pieces' lengths, four bytes a document; it is computed when the shard is first read.
    """

    def __init__(self, shard: Shard, content: int, marks: int, begins: int, ends: int) -> None:
        self._shard = shard
        self._content, self._begins, self._ends = content, begins, ends
        lengths = self._lengths()
        counts = np.bincount(lengths % content, minlength=content)
        next_of_length = np.cumsum(counts) - counts  # index in _by_length of the next document of each length
        bins: list[int] = []
        starts: list[int] = []
        entries: list[tuple[int, int, int]] = []
        for number, lengths_and_counts in best_fit_decreasing(np.concatenate([np.zeros(marks + 1, np.int64), counts[1:]])):
            bins.append(number)
            starts.append(len(entries))
            for length_with_marks, count in lengths_and_counts:
                length = length_with_marks - marks
                entries.append((int(next_of_length[length]), length, count))
                next_of_length[length] += number * count
        self._entries = np.array(entries, np.int32).reshape(-1, 3)
        self._entry_starts = np.array([*starts, len(entries)], np.int32)
        self._first_bins = np.cumsum([0, *bins])
        self._num_full = int((lengths // content).sum())
        self.num_samples = self._num_full + int(self._first_bins[-1])

    def pieces(self, number: int) -> list[Piece]:
        """Return the pieces of a sample; documents are counted inside the shard."""
        if number < self._num_full:
            return [self._full_piece(number)]
        before, entries = self._bin(number - self._num_full)
        pieces = []
        for first, length, count in entries.tolist():
            for document in self._by_length[first + before * count : first + (before + 1) * count].tolist():
                end = self._shard.document_start(document + 1) - self._shard.document_start(document) - self._ends
                pieces.append(Piece(document, end - length, length))
        return pieces

    def num_pieces(self, number: int) -> int:
        """Return the number of pieces in a sample, without `_by_length`, which `pieces` needs."""
        return 1 if number < self._num_full else int(self._bin(number - self._num_full)[1][:, 2].sum())

    def _bin(self, number: int) -> tuple[int, NDArray[np.int32]]:
        """Return how many bins of its group come before a bin, and the entries of the group.  -> a number, [lengths, 3]

        An entry is (index in `_by_length`, length, pieces of this length in a bin).
        """
        group = int(np.searchsorted(self._first_bins, number, side="right")) - 1
        return number - int(self._first_bins[group]), self._entries[self._entry_starts[group] : self._entry_starts[group + 1]]

    def _full_piece(self, number: int) -> Piece:
        block = int(np.searchsorted(self._full_before, number, side="right")) - 1
        first = block * _SUMMED_AT_ONCE
        ends = np.cumsum(self._lengths(first, first + _SUMMED_AT_ONCE) // self._content)
        number -= int(self._full_before[block])
        document = int(np.searchsorted(ends, number, side="right"))
        if document:
            number -= int(ends[document - 1])
        return Piece(first + document, self._begins + number * self._content, self._content)

    def _lengths(self, first: int = 0, last: int | None = None) -> NDArray[np.int64]:
        """Return the lengths of the documents without their first `begins` and last `ends` tokens.  -> [documents]"""
        return np.maximum(self._shard.document_lengths(first, last) - self._begins - self._ends, 0)

    @functools.cached_property
    def _by_length(self) -> NDArray[np.int32]:
        """Documents in the order of the lengths of their last pieces.  [documents]"""
        return np.argsort(self._lengths() % self._content, kind="stable").astype(np.int32)

    @functools.cached_property
    def _full_before(self) -> NDArray[np.int64]:
        """Number of full samples before every _SUMMED_AT_ONCE-th document."""
        full = self._lengths() // self._content
        sums = np.add.reduceat(full, np.arange(0, len(full), _SUMMED_AT_ONCE))
        return np.cumsum(sums) - sums


def best_fit_decreasing(counts: NDArray[np.int64]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Pack pieces into bins, the longest first, each into the fullest bin that has room.  [bin size], pieces by length -> groups of bins

    A group is (number of bins, contents of each of them as (length, count), longest first); counts[0] is not used. The result has as
    many bins as packing piece by piece, because pieces of one length fill equal bins one after the other. A length that fills a bin
    as far as it can at least halves the room in it, and only one bin a length stays partly filled. So there are few groups of few
    lengths, and the time depends on the number of different lengths, not on the number of pieces.
    """
    size = len(counts)
    by_room: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    rooms: list[int] = []  # keys of by_room, ascending

    def put(room: int, bins: int, inside: tuple[tuple[int, int], ...]) -> None:
        """Add bins that have room left for `room` tokens."""
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
