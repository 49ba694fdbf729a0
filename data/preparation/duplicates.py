"""Which documents came before: word for word, by digests, and nearly, by MinHash.

Every answer is a pure function of what is given, in the order given: the same on every machine and for every number of workers.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.preparation.filters import UNSPACED_CHARACTERS
from data.sampling.order import mix

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
PLACED_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
NUM_PERMUTATIONS = 128

BYTES_AT_ONCE = 2**28  # working memory of the finishing steps, whatever the corpus
_BYTES_PER_DIGEST = 128  # of it, what exact_duplicates needs for a digest under its hands: records, keys and orders
_WORDS_PER_SHINGLE = 5
_NEIGHBOURS = 16  # so many of a band's group on either side a document is compared with
_FURTHER_ENTRIES = 16  # by which a band's group is ordered
_CHANCE_TO_FIND = 0.999
_SEED = 5  # of the permutations; any number, always the same

_FOREIGN_PUNCTUATION = re.compile(r"[^\x00-\x7f](?<!\w)")
_ASCII_PUNCTUATION_TO_SPACE = bytes(byte if byte > 127 or chr(byte).isalnum() else 32 for byte in range(256))


def digest_of(text: str) -> bytes:
    """Sixteen bytes that only this text has; np.frombuffer reads many in a row as DIGEST."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST.itemsize).digest()


def sorted_digests(digests: NDArray) -> NDArray:
    """DIGEST [n] -> PLACED_DIGEST [n]: in rising order, each with the place where it stood, equal ones by place."""
    placed = np.empty(len(digests), PLACED_DIGEST)
    order = np.lexsort((digests["low"], digests["high"]))
    placed["high"], placed["low"], placed["place"] = digests["high"][order], digests["low"][order], order
    return placed


def exact_duplicates(parts: Sequence[NDArray]) -> list[NDArray[np.bool_]]:
    """True where the same digest came before, in this part or an earlier one.  Of each part: PLACED_DIGEST [n_i] -> bool [n_i]

    Each part is as sorted_digests made it, and may be a memory map: one range of digests is looked at at a time, so that all ranges
    together read each part once, in a constant of memory and a byte a document for the answer.
    """
    came_before = [np.zeros(len(part), np.bool_) for part in parts]
    num_ranges = sum(map(len, parts)) * _BYTES_PER_DIGEST // BYTES_AT_ONCE + 1
    starts = [0] * len(parts)
    for number in range(1, num_ranges + 1):
        ends = [_first_at_least(part, number * 2**64 // num_ranges, start) for part, start in zip(parts, starts, strict=True)]
        firsts, owners = [], []
        for owner, (part, start, end) in enumerate(zip(parts, starts, ends, strict=True)):
            for records, repeats in _repeats_inside(part, start, end):
                came_before[owner][records["place"][repeats]] = True
                firsts.append(records[~repeats])
                owners.append(np.full(len(firsts[-1]), owner, np.uint32))
        if firsts:
            digests, owner_of = np.concatenate(firsts), np.concatenate(owners)
            order = np.lexsort((digests["low"], digests["high"]))  # stable: equal ones stay in the order of their parts
            digests, owner_of = digests[order], owner_of[order]
            again = np.flatnonzero(_equals_the_one_before(digests))
            again = again[np.argsort(owner_of[again], kind="stable")]
            for owner, places in _by_owner(owner_of[again], digests["place"][again]):
                came_before[owner][places] = True
        starts = ends
    return came_before


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures of texts.  [documents] -> [documents, NUM_PERMUTATIONS]

    Of two texts, the share of entries that are equal estimates the Jaccard similarity of their shingles: all runs of five words,
    lower-cased and without punctuation, CJK characters and kana counting as words. A shorter text is one shingle of all its words, one
    without any word a shingle of its own.
    Broder 1997, "On the resemblance and containment of documents"; one pass for all permutations: Dahlgaard, Knudsen, Thorup 2017,
    arXiv 1704.04370, as rensa has it.
    """
    from rensa import RMinHash  # only near-duplicates need it

    if not texts:
        return np.empty((0, NUM_PERMUTATIONS), np.uint32)
    words = [_words(text) for text in texts]
    hashes = np.fromiter(map(_hash_of_word, chain.from_iterable(words)), np.uint64)
    shingles = hashes[: len(hashes) - _WORDS_PER_SHINGLE + 1].copy()
    for later in range(1, _WORDS_PER_SHINGLE):
        shingles = mix(shingles) + hashes[later : later + len(shingles)]
    num_words = np.array([len(each) for each in words])
    ends = np.cumsum(num_words)
    inside = np.ones(len(hashes), np.bool_)
    for back in range(1, _WORDS_PER_SHINGLE):  # a shingle that began here would reach into the next text
        inside[ends - back] = False
    borders = np.concatenate([[0], np.cumsum(num_words - _WORDS_PER_SHINGLE + 1)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(mix(shingles[inside[: len(shingles)]]), borders, NUM_PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32)


def bands_for(similarity: float) -> tuple[int, int]:
    """(bands, entries a band): the longest bands by which a pair of this similarity is found with a chance of at least 0.999.

    Two signatures of similarity s agree in all r entries of at least one of b bands with a chance of 1 - (1 - s^r)^b.
    Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4.2. UserError where no r will do.
    """
    for rows in range(NUM_PERMUTATIONS, 0, -1):
        bands = NUM_PERMUTATIONS // rows
        if 0 < similarity <= 1 and (1 - similarity**rows) ** bands <= 1 - _CHANCE_TO_FIND:
            return bands, rows
    raise UserError(f"A similarity of {similarity} cannot be looked for; it must be from 0.06 to 1.")


def near_duplicates(
    signatures: Sequence[NDArray[np.uint32]],
    dropped: Sequence[NDArray[np.bool_]],
    held_out: Sequence[NDArray[np.bool_]],
    similarity: float,
    which: Literal["held_out", "drop"],
) -> list[NDArray[np.bool_]]:
    """Which documents go because of a near-duplicate.  Of each part: [n_i, NUM_PERMUTATIONS], bool [n_i], bool [n_i] -> bool [n_i]

    A pair counts when the share of equal entries in its signatures is at least `similarity`; pairs join into clusters. Of a cluster,
    "drop" keeps the first training document, or the first document where all are held out; "held_out" drops every held-out document whose
    cluster has a training document, and nothing else. Documents `dropped` before take no part and are False in the answer.

    Where in a band (bands_for) up to 17 documents agree, every pair of them is compared. In a larger group each is compared with the
    first and with the 16 on either side, the group being in order of further entries, so that copies lie side by side; those
    already joined are not compared again. So the work is at most 17 comparisons a document and band.
    The estimate strays by sqrt(s (1 - s) / 128), 0.035 at 0.8: a pair 0.1 more similar than asked is missed about once in 1,000 at 0.7,
    once in 10,000 at 0.8.

    Signatures may be memory maps. Memory: a constant (BYTES_AT_ONCE), or one band's largest group, and 27 bytes a document.
    """
    bands, rows = bands_for(similarity)
    parts = _Parts(signatures)
    gone = np.concatenate([np.zeros(0, np.bool_), *dropped])
    for_validation = np.concatenate([np.zeros(0, np.bool_), *held_out])
    first_of = np.arange(len(gone))  # of each document an earlier one of its cluster; its own number if there is none
    bands_at_once = max(1, BYTES_AT_ONCE // (32 * max(1, len(gone))))
    for start in range(0, bands, bands_at_once):
        _join_by_bands(range(start, min(start + bands_at_once, bands)), rows, parts, gone, similarity, first_of)
    step = BYTES_AT_ONCE // 64
    for start in range(0, len(first_of), step):
        _first_of_cluster(first_of, np.arange(start, min(start + step, len(first_of))))
    if which == "held_out":
        has_training = np.zeros(len(gone), np.bool_)
        has_training[first_of[~for_validation & ~gone]] = True
        drop = for_validation & ~gone & has_training[first_of]
    else:
        drop = np.zeros(len(gone), np.bool_)
        members = np.flatnonzero(first_of != np.arange(len(first_of)))
        members = np.union1d(members, first_of[members])
        members = members[np.lexsort((for_validation[members], first_of[members]))]
        drop[members[1:]] = first_of[members[1:]] == first_of[members[:-1]]
    return [drop[end - len(part) : end] for part, end in zip(signatures, parts.ends, strict=True)]


class _Parts:
    """Signatures of several parts, numbered through."""

    def __init__(self, signatures: Sequence[NDArray[np.uint32]]) -> None:
        self.signatures = signatures
        self.ends = np.cumsum([len(part) for part in signatures], dtype=np.int64)

    def rows(self, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        """[n] -> [n, NUM_PERMUTATIONS]"""
        rows = np.empty((len(documents), NUM_PERMUTATIONS), np.uint32)
        owners = np.searchsorted(self.ends, documents, side="right")
        order = np.argsort(owners, kind="stable")
        for owner, places in _by_owner(owners[order], order):
            rows[places] = self.signatures[owner][documents[places] - (self.ends[owner] - len(self.signatures[owner]))]
        return rows

    def band_keys(self, bands: Sequence[int], rows: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """For each band and document a hash of the band's entries, and one of further entries.  2 x [bands, documents]"""
        keys = np.empty((2, len(bands), sum(map(len, self.signatures))), np.uint64)
        further = {band: ((band + 1) * rows // _FURTHER_ENTRIES + 1) * _FURTHER_ENTRIES % NUM_PERMUTATIONS for band in bands}
        step = BYTES_AT_ONCE // (32 * NUM_PERMUTATIONS)
        for part, end in zip(self.signatures, self.ends, strict=True):
            for start in range(0, len(part), step):
                columns = np.array(part[start : start + step].T, np.uint64, order="C")
                place = int(end) - len(part) + start
                documents = slice(place, place + columns.shape[1])
                further_key = {first: _folded(columns[first : first + _FURTHER_ENTRIES]) for first in set(further.values())}
                for number, band in enumerate(bands):
                    keys[0, number, documents] = _folded(columns[band * rows : (band + 1) * rows])
                    keys[1, number, documents] = further_key[further[band]]
        return keys[0], keys[1]


def _first_at_least(part: NDArray, high: int, start: int) -> int:
    """The first place from `start` on whose digest begins with at least `high`: bisection, so that a memory map is hardly read."""
    end = len(part)
    while start < end:
        middle = (start + end) // 2
        start, end = (middle + 1, end) if int(part[middle]["high"]) < high else (start, middle)
    return start


def _equals_the_one_before(digests: NDArray) -> NDArray[np.bool_]:
    equal = np.zeros(len(digests), np.bool_)
    equal[1:] = (digests["high"][1:] == digests["high"][:-1]) & (digests["low"][1:] == digests["low"][:-1])
    return equal


def _repeats_inside(part: NDArray, start: int, end: int) -> Iterator[tuple[NDArray, NDArray[np.bool_]]]:
    """The records of a range in pieces, and which of them are like the one before: a digest repeated without end fits, too."""
    step = BYTES_AT_ONCE // _BYTES_PER_DIGEST
    for piece in range(start, end, step):
        before = max(piece - 1, start)
        records = np.array(part[before : min(piece + step, end)])
        yield records[piece - before :], _equals_the_one_before(records)[piece - before :]


def _by_owner(owners: NDArray, values: NDArray) -> Iterator[tuple[int, NDArray]]:
    """The values of each owner, where owners rise."""
    present, starts = np.unique(owners, return_index=True)
    borders = np.append(starts, len(owners))
    for owner, start, end in zip(present.tolist(), borders[:-1], borders[1:], strict=True):
        yield owner, values[start:end]


def _words(text: str) -> list[bytes]:
    """At least _WORDS_PER_SHINGLE words, an empty one standing for each that is missing."""
    text = plain = text.lower()
    if not text.isascii():
        text = UNSPACED_CHARACTERS.sub(lambda run: f" {' '.join(run[0])} ", _FOREIGN_PUNCTUATION.sub(" ", text))
    words = text.encode().translate(_ASCII_PUNCTUATION_TO_SPACE).split() or [plain.encode()]
    return words + [b""] * (_WORDS_PER_SHINGLE - len(words))


@lru_cache(maxsize=2**17)  # some 20 MB, for the words that come again and again
def _hash_of_word(word: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")


def _folded(columns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each document's entries.  [entries, n] -> [n]"""
    folded = np.zeros(columns.shape[1], np.uint64)
    for column in columns:
        folded = mix(folded + np.uint64(0x9E3779B97F4A7C15) + column)
    return folded


def _join_by_bands(
    bands: Sequence[int], rows: int, parts: _Parts, gone: NDArray[np.bool_], similarity: float, first_of: NDArray[np.int64]
) -> None:
    for keys, order_keys in zip(*parts.band_keys(bands, rows), strict=True):
        for documents in _groups(keys, order_keys, gone):
            _join_similar(documents, keys, parts, similarity, first_of)


def _groups(keys: NDArray[np.uint64], order_keys: NDArray[np.uint64], gone: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Documents by key, those of a key by their order key and number; a slice of all keys at a time."""
    num_slices = len(keys) * 128 // BYTES_AT_ONCE + 1
    slice_of_key = 2**64 // num_slices + 1
    for number in range(num_slices):
        inside = (keys >= np.uint64(number * slice_of_key)) & ~gone
        if number + 1 < num_slices:
            inside &= keys < np.uint64((number + 1) * slice_of_key)
        documents = np.flatnonzero(inside)
        yield documents[np.lexsort((order_keys[documents], keys[documents]))]


def _join_similar(
    documents: NDArray[np.int64], keys: NDArray[np.uint64], parts: _Parts, similarity: float, first_of: NDArray[np.int64]
) -> None:
    """Join the similar ones among documents [n] that share a key and lie close in their order, or with the first of their key."""
    keys = keys[documents]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    sizes = np.diff(np.append(begins, len(keys)))
    shared = np.repeat(sizes > 1, sizes)  # most documents are alone with their key
    documents, sizes = documents[shared], sizes[sizes > 1]
    begins = np.cumsum(sizes) - sizes
    group_begin = np.repeat(begins, sizes)
    places = np.arange(len(documents))
    _join(documents[group_begin], documents, parts, similarity, first_of)
    for distance in range(1, min(_NEIGHBOURS, int(sizes.max(initial=1)) - 1) + 1):
        later = places[places - group_begin >= distance]
        _join(documents[later - distance], documents[later], parts, similarity, first_of)


def _join(left: NDArray[np.int64], right: NDArray[np.int64], parts: _Parts, similarity: float, first_of: NDArray[np.int64]) -> None:
    """Join the clusters of those pairs [n], [n] that are similar."""
    step = BYTES_AT_ONCE // (4 * 4 * NUM_PERMUTATIONS)
    for start in range(0, len(left), step):
        one, other = left[start : start + step], right[start : start + step]
        apart = _first_of_cluster(first_of, one) != _first_of_cluster(first_of, other)
        one, other = one[apart], other[apart]
        equal = (parts.rows(one) == parts.rows(other)).sum(axis=1)
        similar = equal >= similarity * NUM_PERMUTATIONS
        one, other = one[similar], other[similar]
        while len(one):
            one, other = _first_of_cluster(first_of, one), _first_of_cluster(first_of, other)
            apart = one != other
            one, other = one[apart], other[apart]
            np.minimum.at(first_of, np.maximum(one, other), np.minimum(one, other))


def _first_of_cluster(first_of: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first document of each one's cluster, by following those before it; the way is short from then on."""
    first = first_of[documents]
    while not np.array_equal(further := first_of[first], first):
        first = further
    first_of[documents] = first
    return first
