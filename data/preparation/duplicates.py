"""Exact duplicates, found by digests of the text, and near-duplicates, found by MinHash signatures.

Every result is a pure function of the documents in their order: it is the same on every machine and for every number of workers.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from data.command_line import UserError
from data.preparation.filters import UNSPACED_CHARACTERS
from data.sampling.order import mix

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
INDEXED_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<u4")])
NUM_PERMUTATIONS = 128

BYTES_AT_ONCE = 2**28  # working memory of both searches, for a corpus of any size
_BYTES_PER_DIGEST = 128  # working memory that exact_duplicates needs for one digest: records, keys and orders
_WORDS_PER_SHINGLE = 5
_NEIGHBOURS = 16  # documents of a band's group, on either side, that a document is compared with
_FURTHER_ENTRIES = 16  # entries of the signature that a band's group is sorted by
_PROBABILITY_TO_FIND = 0.999
_SEED = 5  # seed of the permutations; it can be any number but must never change

_FOREIGN_PUNCTUATION = re.compile(r"[^\x00-\x7f](?<!\w)")
_ASCII_PUNCTUATION_TO_SPACE = bytes(byte if byte > 127 or chr(byte).isalnum() else 32 for byte in range(256))


def digest_of(text: str) -> bytes:
    """Return a hash of the text, 16 bytes; np.frombuffer reads many in a row as DIGEST."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST.itemsize).digest()


def sorted_digests(digests: NDArray) -> NDArray:
    """Sort digests, equal ones by index; each keeps its index in the input.  DIGEST [n] -> INDEXED_DIGEST [n]"""
    indexed = np.empty(len(digests), INDEXED_DIGEST)
    order = np.lexsort((digests["low"], digests["high"]))
    indexed["high"], indexed["low"], indexed["index"] = digests["high"][order], digests["low"][order], order
    return indexed


def exact_duplicates(parts: Sequence[NDArray]) -> list[NDArray[np.bool_]]:
    """Return True for each document whose digest occurs before it, in this part or an earlier one.

    For each part: INDEXED_DIGEST [n_i] -> bool [n_i]. Each part is sorted by sorted_digests, and may be a memory map. The digests are
    compared one range of values at a time, so that each part is read once. Memory: a constant, and one byte a document for the result.
    """
    came_before = [np.zeros(len(part), np.bool_) for part in parts]
    num_ranges = sum(map(len, parts)) * _BYTES_PER_DIGEST // BYTES_AT_ONCE + 1
    starts = [0] * len(parts)
    for number in range(1, num_ranges + 1):
        ends = [_first_at_least(part, number * 2**64 // num_ranges, start) for part, start in zip(parts, starts, strict=True)]
        firsts, owners = [], []
        for owner, (part, start, end) in enumerate(zip(parts, starts, ends, strict=True)):
            for records, repeats in _repeats_inside(part, start, end):
                came_before[owner][records["index"][repeats]] = True
                firsts.append(records[~repeats])
                owners.append(np.full(len(firsts[-1]), owner, np.uint32))
        if firsts:
            digests, owner_of = np.concatenate(firsts), np.concatenate(owners)
            order = np.lexsort((digests["low"], digests["high"]))  # stable: equal digests stay in the order of their parts
            digests, owner_of = digests[order], owner_of[order]
            again = np.flatnonzero(_equals_previous(digests))
            again = again[np.argsort(owner_of[again], kind="stable")]
            for owner, places in _by_owner(owner_of[again], digests["index"][again]):
                came_before[owner][places] = True
        starts = ends
    return came_before


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return the MinHash signatures of texts.  [documents] -> [documents, NUM_PERMUTATIONS]

    The fraction of equal entries in two signatures estimates the Jaccard similarity of the texts' shingles. A shingle is a run of five
    words, lower-cased and without punctuation; each CJK character and kana is a word. A shorter text is one shingle of all its words; a
    text without words is one shingle of its own.
    Broder 1997, "On the resemblance and containment of documents"; one pass for all permutations: Dahlgaard, Knudsen, Thorup 2017,
    arXiv 1704.04370, as implemented by rensa.
    """
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
    for back in range(1, _WORDS_PER_SHINGLE):  # a shingle that begins here would extend into the next text
        inside[ends - back] = False
    borders = np.concatenate([[0], np.cumsum(num_words - _WORDS_PER_SHINGLE + 1)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(mix(shingles[inside[: len(shingles)]]), borders, NUM_PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32)


def bands_for(similarity: float) -> tuple[int, int]:
    """Return (bands, entries in a band): the longest bands that find a pair of this similarity with a probability of at least 0.999.

    Two signatures of similarity s agree in all r entries of at least one of b bands with a probability of 1 - (1 - s^r)^b.
    Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4.2. Raise UserError if the similarity is too low for any r.
    """
    for rows in range(NUM_PERMUTATIONS, 0, -1):
        bands = NUM_PERMUTATIONS // rows
        if 0 < similarity <= 1 and (1 - similarity**rows) ** bands <= 1 - _PROBABILITY_TO_FIND:
            return bands, rows
    raise UserError(f"near_duplicate_similarity is {similarity}; it must be from 0.06 to 1.")


def near_duplicates(
    signatures: Sequence[NDArray[np.uint32]],
    dropped: Sequence[NDArray[np.bool_]],
    held_out: Sequence[NDArray[np.bool_]],
    similarity: float,
    which: Literal["held_out", "drop"],
) -> list[NDArray[np.bool_]]:
    """Return True for each document to drop because of a near-duplicate.

    For each part: [n_i, NUM_PERMUTATIONS], bool [n_i], bool [n_i] -> bool [n_i].
    Two documents are near-duplicates if the fraction of equal entries in their signatures is at least `similarity`; near-duplicates form
    clusters. In each cluster, "drop" keeps the first training document, or the first document if all are held out; "held_out" drops
    every held-out document whose cluster contains a training document, and nothing else. Documents that are `dropped` already are ignored;
    their result is False.

    If up to 17 documents agree in a band (see bands_for), all pairs of them are compared. A larger group is sorted by further entries, so
    that similar documents are neighbours; each document is compared with the group's first and with 16 neighbours on either side, except
    those of its own cluster. So there are at most 17 comparisons for each document and band.
    The standard deviation of the estimate is sqrt(s (1 - s) / 128), which is 0.035 at 0.8: a pair whose similarity is 0.1 above the limit
    is missed about once in 1,000 at 0.7, and once in 10,000 at 0.8.

    Signatures may be memory maps. Memory: a constant (BYTES_AT_ONCE) or one band's largest group, and 27 bytes a document.
    """
    bands, rows = bands_for(similarity)
    parts = _Parts(signatures)
    is_dropped = np.concatenate([np.zeros(0, np.bool_), *dropped])
    is_held_out = np.concatenate([np.zeros(0, np.bool_), *held_out])
    first_of = np.arange(len(is_dropped))  # an earlier document of the same cluster; the document itself if there is none
    bands_at_once = max(1, BYTES_AT_ONCE // (32 * max(1, len(is_dropped))))
    for start in range(0, bands, bands_at_once):
        _join_by_bands(range(start, min(start + bands_at_once, bands)), rows, parts, is_dropped, similarity, first_of)
    step = BYTES_AT_ONCE // 64
    for start in range(0, len(first_of), step):
        _first_of_cluster(first_of, np.arange(start, min(start + step, len(first_of))))
    if which == "held_out":
        has_training = np.zeros(len(is_dropped), np.bool_)
        has_training[first_of[~is_held_out & ~is_dropped]] = True
        drop = is_held_out & ~is_dropped & has_training[first_of]
    else:
        drop = np.zeros(len(is_dropped), np.bool_)
        members = np.flatnonzero(first_of != np.arange(len(first_of)))
        members = np.union1d(members, first_of[members])
        members = members[np.lexsort((is_held_out[members], first_of[members]))]
        drop[members[1:]] = first_of[members[1:]] == first_of[members[:-1]]
    return [drop[end - len(part) : end] for part, end in zip(signatures, parts.ends, strict=True)]


class _Parts:
    """Signatures of several parts, indexed as one array."""

    def __init__(self, signatures: Sequence[NDArray[np.uint32]]) -> None:
        self.signatures = signatures
        self.ends = np.cumsum([len(part) for part in signatures], dtype=np.int64)

    def rows(self, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the signatures of documents.  [n] -> [n, NUM_PERMUTATIONS]"""
        rows = np.empty((len(documents), NUM_PERMUTATIONS), np.uint32)
        owners = np.searchsorted(self.ends, documents, side="right")
        order = np.argsort(owners, kind="stable")
        for owner, places in _by_owner(owners[order], order):
            rows[places] = self.signatures[owner][documents[places] - (self.ends[owner] - len(self.signatures[owner]))]
        return rows

    def band_keys(self, bands: Sequence[int], rows: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return, for each band and document, a hash of the band's entries and one of further entries.  2 x [bands, documents]"""
        keys = np.empty((2, len(bands), sum(map(len, self.signatures))), np.uint64)
        further = {band: ((band + 1) * rows // _FURTHER_ENTRIES + 1) * _FURTHER_ENTRIES % NUM_PERMUTATIONS for band in bands}
        step = BYTES_AT_ONCE // (32 * NUM_PERMUTATIONS)
        for part, end in zip(self.signatures, self.ends, strict=True):
            for start in range(0, len(part), step):
                columns = np.array(part[start : start + step].T, np.uint64, order="C")
                first_document = int(end) - len(part) + start
                documents = slice(first_document, first_document + columns.shape[1])
                further_key = {first: _folded(columns[first : first + _FURTHER_ENTRIES]) for first in set(further.values())}
                for number, band in enumerate(bands):
                    keys[0, number, documents] = _folded(columns[band * rows : (band + 1) * rows])
                    keys[1, number, documents] = further_key[further[band]]
        return keys[0], keys[1]


def _first_at_least(part: NDArray, high: int, start: int) -> int:
    """Return the first index from `start` whose digest is at least `high`, by bisection, which reads little of a memory map."""
    end = len(part)
    while start < end:
        middle = (start + end) // 2
        start, end = (middle + 1, end) if int(part[middle]["high"]) < high else (start, middle)
    return start


def _equals_previous(digests: NDArray) -> NDArray[np.bool_]:
    equal = np.zeros(len(digests), np.bool_)
    equal[1:] = (digests["high"][1:] == digests["high"][:-1]) & (digests["low"][1:] == digests["low"][:-1])
    return equal


def _repeats_inside(part: NDArray, start: int, end: int) -> Iterator[tuple[NDArray, NDArray[np.bool_]]]:
    """Yield the records of a range in pieces, and True for those that equal the previous one. The range may be larger than memory."""
    step = BYTES_AT_ONCE // _BYTES_PER_DIGEST
    for piece in range(start, end, step):
        before = max(piece - 1, start)
        records = np.array(part[before : min(piece + step, end)])
        yield records[piece - before :], _equals_previous(records)[piece - before :]


def _by_owner(owners: NDArray, values: NDArray) -> Iterator[tuple[int, NDArray]]:
    """Yield (owner, its values). `owners` must be sorted."""
    present, starts = np.unique(owners, return_index=True)
    borders = np.append(starts, len(owners))
    for owner, start, end in zip(present.tolist(), borders[:-1], borders[1:], strict=True):
        yield owner, values[start:end]


def _words(text: str) -> list[bytes]:
    """Return the words of a text, padded with empty words to at least _WORDS_PER_SHINGLE."""
    text = plain = text.lower()
    if not text.isascii():
        text = UNSPACED_CHARACTERS.sub(lambda run: f" {' '.join(run[0])} ", _FOREIGN_PUNCTUATION.sub(" ", text))
    words = text.encode().translate(_ASCII_PUNCTUATION_TO_SPACE).split() or [plain.encode()]
    return words + [b""] * (_WORDS_PER_SHINGLE - len(words))


@lru_cache(maxsize=2**17)  # about 20 MB, for frequent words
def _hash_of_word(word: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")


def _folded(columns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each document's entries.  [entries, n] -> [n]"""
    folded = np.zeros(columns.shape[1], np.uint64)
    for column in columns:
        folded = mix(folded + np.uint64(0x9E3779B97F4A7C15) + column)
    return folded


def _join_by_bands(
    bands: Sequence[int], rows: int, parts: _Parts, is_dropped: NDArray[np.bool_], similarity: float, first_of: NDArray[np.int64]
) -> None:
    for keys, order_keys in zip(*parts.band_keys(bands, rows), strict=True):
        for documents in _groups(keys, order_keys, is_dropped):
            _join_similar(documents, keys, parts, similarity, first_of)


def _groups(keys: NDArray[np.uint64], order_keys: NDArray[np.uint64], is_dropped: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Yield documents sorted by key, then by order key, then by index; one range of keys at a time."""
    num_slices = len(keys) * 128 // BYTES_AT_ONCE + 1
    slice_of_key = 2**64 // num_slices + 1
    for number in range(num_slices):
        inside = (keys >= np.uint64(number * slice_of_key)) & ~is_dropped
        if number + 1 < num_slices:
            inside &= keys < np.uint64((number + 1) * slice_of_key)
        documents = np.flatnonzero(inside)
        yield documents[np.lexsort((order_keys[documents], keys[documents]))]


def _join_similar(
    documents: NDArray[np.int64], keys: NDArray[np.uint64], parts: _Parts, similarity: float, first_of: NDArray[np.int64]
) -> None:
    """Join similar documents [n] that share a key and are neighbours in this order, and similar documents and the first of their key."""
    keys = keys[documents]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    sizes = np.diff(np.append(begins, len(keys)))
    shared = np.repeat(sizes > 1, sizes)  # most documents are the only one with their key
    documents, sizes = documents[shared], sizes[sizes > 1]
    begins = np.cumsum(sizes) - sizes
    group_begin = np.repeat(begins, sizes)
    places = np.arange(len(documents))
    _join(documents[group_begin], documents, parts, similarity, first_of)
    for distance in range(1, min(_NEIGHBOURS, int(sizes.max(initial=1)) - 1) + 1):
        later = places[places - group_begin >= distance]
        _join(documents[later - distance], documents[later], parts, similarity, first_of)


def _join(left: NDArray[np.int64], right: NDArray[np.int64], parts: _Parts, similarity: float, first_of: NDArray[np.int64]) -> None:
    """Join the clusters of those pairs [n], [n] that are similar enough."""
    step = BYTES_AT_ONCE // (4 * 4 * NUM_PERMUTATIONS)
    for start in range(0, len(left), step):
        one, other = left[start : start + step], right[start : start + step]
        is_separate = _first_of_cluster(first_of, one) != _first_of_cluster(first_of, other)
        one, other = one[is_separate], other[is_separate]
        equal = (parts.rows(one) == parts.rows(other)).sum(axis=1)
        similar = equal >= similarity * NUM_PERMUTATIONS
        one, other = one[similar], other[similar]
        while len(one):
            one, other = _first_of_cluster(first_of, one), _first_of_cluster(first_of, other)
            is_separate = one != other
            one, other = one[is_separate], other[is_separate]
            np.minimum.at(first_of, np.maximum(one, other), np.minimum(one, other))


def _first_of_cluster(first_of: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first document of each document's cluster, and shorten the path to it for later calls."""
    first = first_of[documents]
    while not np.array_equal(further := first_of[first], first):
        first = further
    first_of[documents] = first
    return first
