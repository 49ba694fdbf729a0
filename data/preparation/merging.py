"""Work units become shards: select the documents to keep and the split of each, then copy their tokens, shard by shard.

The selection is a pure function of the units in their order, and so is every byte that is written.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.file_array import FileArray
from data.files import publish_file, write_file
from data.preparation.duplicates import INDEXED_DIGEST, NUM_PERMUTATIONS, exact_duplicates, near_duplicates
from data.preparation.work_units import EXAMPLES, document_dtype
from data.shards import PLACE, ShardWriter

SPLITS = ("train", "validation")
_DUPLICATE, _NEAR_DUPLICATE = 2, 3
"""Verdicts on dropped documents; the verdict on a kept document is the index of its split in SPLITS."""
_REASONS = {_DUPLICATE: "duplicate", _NEAR_DUPLICATE: "near duplicate"}
_LENGTH_BINS = 40
"""Number of bins of the length histogram; bin b counts documents of 2**b to 2**(b + 1) - 1 tokens."""
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SelectionRules:
    """The rules that select which documents to keep (see the settings of the same names)."""

    held_out: float
    drop_duplicates: bool
    near_duplicates: Literal["keep", "held_out", "drop"]
    similarity: float


@dataclass
class ShardPlan:
    """The content of one shard: ranges of documents of units. Of each range, the documents of this split are taken."""

    split: int
    prefix: str
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """(unit, first document, one past the last)."""
    tokens: int = 0

    @property
    def name(self) -> str:
        """Name for files about this shard."""
        return self.prefix.replace("/", "-")


@dataclass
class DroppedDocuments:
    """Documents that were dropped as duplicates, which only a comparison of all units shows."""

    counts: Counter = field(default_factory=Counter)
    """Number of documents by reason."""
    counts_by_source: Counter = field(default_factory=Counter)
    """Number of documents by index of the source."""
    examples: dict[str, list[tuple[int, int, NDArray]]] = field(default_factory=dict)
    """(source, position, tokens) of the first few documents of each reason."""


def is_held_out(digests: NDArray, fraction: float) -> NDArray[np.bool_]:
    """Return True for documents that are held out for validation.  DIGEST [n] -> [n]

    A hash of the text decides, so that copies of one text are in the same split, whatever other documents the corpus has.
    """
    return digests["high"] % np.uint64(10**6) < fraction * 10**6


@dataclass(frozen=True)
class UnitMerger:
    """Merges the units in one folder into shards in another."""

    units_folder: Path
    join_folder: Path
    """Folder for the token counts of finished shards."""
    output: Path
    dtype: np.dtype
    """Type of the token ids."""
    texts_per_document: int
    vocab_size: int

    def select(self, names: list[str], rules: SelectionRules, before_near_duplicates: Callable[[], object]) -> DroppedDocuments:
        """Write NAME.verdicts for each unit, one byte a document: the index of its split, or the reason why it is dropped.

        Memory: three bytes a document, and what exact_duplicates and near_duplicates need. One file of the units is open at a time.
        """
        digests = _MappedFiles([self.units_folder / f"{name}.digests" for name in names], INDEXED_DIGEST)
        dropped = exact_duplicates(digests) if rules.drop_duplicates else [np.zeros(len(part), np.bool_) for part in digests]
        held_out = []
        for part in digests:
            held_out.append(np.zeros(len(part), np.bool_))
            held_out[-1][part["index"]] = is_held_out(part, rules.held_out)
        verdicts = [
            np.where(is_dropped, _DUPLICATE, is_validation).astype(np.uint8)
            for is_dropped, is_validation in zip(dropped, held_out, strict=True)
        ]
        if rules.near_duplicates != "keep":
            before_near_duplicates()
            signatures = _MappedFiles([self.units_folder / f"{name}.signatures" for name in names], np.dtype("<u4"), NUM_PERMUTATIONS)
            is_near_duplicate = near_duplicates(signatures, dropped, held_out, rules.similarity, rules.near_duplicates)
            for verdict, is_near in zip(verdicts, is_near_duplicate, strict=True):
                verdict[is_near] = _NEAR_DUPLICATE
        documents = DroppedDocuments()
        for name, verdict in zip(names, verdicts, strict=True):
            verdict.tofile(self.units_folder / f"{name}.verdicts")
            if (verdict >= len(SPLITS)).any():
                self._count_dropped(name, documents)
        return documents

    def _count_dropped(self, name: str, dropped: DroppedDocuments) -> None:
        documents, verdicts = self._read(name)
        sources, counts = np.unique(documents["source"][verdicts >= len(SPLITS)], return_counts=True)
        dropped.counts_by_source.update(dict(zip(sources.tolist(), counts.tolist(), strict=True)))
        for verdict, reason in _REASONS.items():
            indices = np.flatnonzero(verdicts == verdict)
            dropped.counts[reason] += len(indices)
            examples = dropped.examples.setdefault(reason, [])
            for index in indices[: EXAMPLES - len(examples)]:
                first = int(documents["lengths"][:index].sum(dtype=np.int64))
                length = int(documents["lengths"][index, 0]) - 1
                tokens = FileArray(self.units_folder / f"{name}.tokens", self.dtype)[first : first + length]
                examples.append((int(documents["source"][index]), int(documents["position"][index]), np.array(tokens)))

    def plan(self, names: list[str], shard_tokens: int) -> list[ShardPlan]:
        """Return which documents go into which shard, training shards first. A shard ends with the document that fills it."""
        plans_by_split: list[list[ShardPlan]] = [[] for _ in SPLITS]
        for name in names:
            documents, verdicts = self._read(name)
            sizes = documents["lengths"].sum(axis=1, dtype=np.int64)
            for split, plans in enumerate(plans_by_split):
                _add_to_shards(plans, split, name, np.flatnonzero(verdicts == split), sizes, shard_tokens)
        return [plan for plans in plans_by_split for plan in plans]

    def write_shard(self, plan: ShardPlan) -> dict:
        """Copy the documents of a shard out of their units, and return the shard's entry. Memory: the records and tokens of a unit."""
        token_counts, length_counts = np.zeros(self.vocab_size, np.int64), np.zeros(_LENGTH_BINS, np.int64)
        counts_by_source: dict[int, NDArray[np.int64]] = {}
        prefix = self.output / plan.prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        ends: list[list[int]] = []
        with (
            ShardWriter(prefix, self.dtype, self.texts_per_document) as writer,
            open(f"{prefix}.places.{os.getpid()}.partial", "wb") as places_file,
        ):
            for name, first, last in plan.ranges:
                documents, tokens, sizes = self._members(plan.split, name, first, last)
                writer.add(tokens, documents["lengths"].reshape(-1))
                places = np.empty(len(documents), PLACE)
                places["source"], places["position"] = documents["source"], documents["position"]
                places_file.write(places.tobytes())
                digest.update(places.tobytes())
                ends += [places[0].tolist(), places[-1].tolist()]
                for start in range(0, len(tokens), _TOKENS_AT_ONCE):
                    token_counts += np.bincount(tokens[start : start + _TOKENS_AT_ONCE], minlength=self.vocab_size)
                length_counts += np.bincount(np.log2(np.maximum(sizes, 1)).astype(int), minlength=_LENGTH_BINS)
                for source in np.unique(documents["source"]).tolist():
                    of_source = documents["source"] == source
                    counts = np.array([of_source.sum(), sizes[of_source].sum(), documents["bytes"][of_source].sum()], np.int64)
                    counts_by_source[source] = counts_by_source.get(source, 0) + counts
            publish_file(places_file, f"{prefix}.places", sync_folder=False)
        counts_file = self.join_folder / f"{plan.name}.counts"
        histograms = np.concatenate([length_counts, token_counts]).tobytes()
        write_file(counts_file, histograms, counts_file.with_name(f"{counts_file.name}.{os.getpid()}.partial"))
        total = np.sum(list(counts_by_source.values()), axis=0)
        return {
            "prefix": plan.prefix,
            "documents": int(total[0]),
            "tokens": int(total[1]),
            "bytes": int(total[2]),
            "sources": [ends[0], ends[-1]],
            "sha256": writer.sha256 | {"places": digest.hexdigest()},
            "of_sources": {source: counts.tolist() for source, counts in counts_by_source.items()},
        }

    def _members(self, split: int, name: str, first: int, last: int) -> tuple[NDArray, NDArray, NDArray[np.int64]]:
        """Return (records, tokens, tokens of each) of those documents of a unit's range that belong to a split."""
        documents, verdicts = self._read(name)
        start = int(documents["lengths"][:first].sum(dtype=np.int64))
        documents, is_member = documents[first:last], verdicts[first:last] == split
        sizes = documents["lengths"].sum(axis=1, dtype=np.int64)
        tokens = FileArray(self.units_folder / f"{name}.tokens", self.dtype)[start : start + int(sizes.sum())]
        if is_member.all():
            return documents, tokens, sizes
        return documents[is_member], tokens[np.repeat(is_member, sizes)], sizes[is_member]

    def counts(self, plans: list[ShardPlan]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the occurrences of each token and the length histogram of documents in finished shards.  -> [vocab_size], [bins]"""
        counts = np.zeros(_LENGTH_BINS + self.vocab_size, np.int64)
        for plan in plans:
            counts += np.fromfile(self.join_folder / f"{plan.name}.counts", np.int64)
        return counts[_LENGTH_BINS:], counts[:_LENGTH_BINS]

    def _read(self, name: str) -> tuple[NDArray, NDArray[np.uint8]]:
        """Return the records of a unit's documents, and the verdicts on them."""
        documents = np.fromfile(self.units_folder / f"{name}.documents", document_dtype(self.texts_per_document))
        return documents, np.fromfile(self.units_folder / f"{name}.verdicts", np.uint8)


def _add_to_shards(
    plans: list[ShardPlan], split: int, name: str, members: NDArray[np.int64], sizes: NDArray[np.int64], shard_tokens: int
) -> None:
    """Add the members of a unit's documents to the last plan, if it is not full, and to new plans.  [members], [documents]"""
    tokens = np.cumsum(sizes[members])
    start = tokens_before = 0
    while start < len(members):
        if not plans or plans[-1].tokens >= shard_tokens:
            plans.append(ShardPlan(split, f"{SPLITS[split]}/{len(plans):05d}"))
        plan = plans[-1]
        filling = int(np.searchsorted(tokens, tokens_before + shard_tokens - plan.tokens))
        end = min(filling + 1, len(members))
        plan.ranges.append((name, int(members[start]), int(members[end - 1]) + 1))
        plan.tokens += int(tokens[end - 1]) - tokens_before
        start, tokens_before = end, int(tokens[end - 1])


class _MappedFiles(Sequence):
    """Arrays in files. Each is mapped when it is read, because a process may not open as many files as there are units."""

    def __init__(self, paths: list[Path], dtype: np.dtype, width: int | None = None) -> None:
        self._paths, self._dtype, self._width = paths, dtype, width

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> NDArray:  # type: ignore[override]  # no slices
        path = self._paths[index]
        array = np.memmap(path, self._dtype, "r") if path.stat().st_size else np.empty(0, self._dtype)
        return array if self._width is None else array.reshape(-1, self._width)
