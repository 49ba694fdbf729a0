"""Documents -> samples: joined and cut anywhere, or packed without cuts."""

import bisect
import functools
import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.fill_in_the_middle import MARKS, FillInTheMiddle
from data.sampling.order import sample_generator
from data.shards import Shard, TokenStream

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

    def documents(self, number: int) -> list[Piece]:
        """What a sample holds in every epoch, in order."""
        raise NotImplementedError

    def sample(self, number: int, epoch: int) -> Sample:
        raise NotImplementedError


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

    @functools.cached_property
    def filled_share(self) -> float:
        """The share of pieces that is expected to be told out of order; below the rate where samples lack room for the marks."""
        return self._fill.filled_share(self._spare, self._pieces_of_some()) if self._fill else 0.0

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

    @property
    def num_samples(self) -> int:
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

    @property
    def num_samples(self) -> int:
        return self._packing.num_samples

    def documents(self, number: int) -> list[Piece]:
        return self._packing.documents(number)

    def num_pieces(self, number: int) -> int:
        return self._packing.num_pieces(number)

    @functools.cached_property
    def _packing(self) -> "BestFit":
        return BestFit(self.stream, self.content)


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


class Cuts:
    """Every document cut into pieces of `content` tokens and a last one of the rest, its end left out: pieces by number.

    Memory: 8 bytes for every _SUMMED_AT_ONCE documents.
    """

    def __init__(self, stream: TokenStream, content: int) -> None:
        self._stream, self._content = stream, content
        counts = self._counts(0, stream.num_documents)
        sums = np.add.reduceat(counts, np.arange(0, len(counts), _SUMMED_AT_ONCE))
        self._before = np.cumsum(sums) - sums
        self.num_pieces = int(counts.sum())
        self.num_documents = int((counts > 0).sum())
        """Those with text."""

    def piece(self, number: int) -> Piece:
        some = int(np.searchsorted(self._before, number, side="right")) - 1
        first = some * _SUMMED_AT_ONCE
        ends = np.cumsum(self._counts(first, first + _SUMMED_AT_ONCE))
        number -= int(self._before[some])
        document = int(np.searchsorted(ends, number, side="right"))
        place = (number - (int(ends[document - 1]) if document else 0)) * self._content
        length = int(self._stream.document_lengths(first + document, first + document + 1)[0]) - 1
        return Piece(first + document, place, min(self._content, length - place))

    def _counts(self, first: int, last: int) -> NDArray[np.int64]:
        """Pieces of documents.  -> [documents]"""
        return -(-np.maximum(self._stream.document_lengths(first, last) - 1, 0) // self._content)


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
