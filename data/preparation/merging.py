"""Units become shards: decide which documents stay and on which side, then copy their tokens, shard by shard.

What is decided is a pure function of the units in their order, and so is every byte that is written.
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

from data.files import publish_file, write_file
from data.preparation.duplicates import NUM_PERMUTATIONS, PLACED_DIGEST, exact_duplicates, near_duplicates
from data.preparation.work_units import EXAMPLES, document_dtype
from data.shards import PLACE, ShardWriter

SPLITS = ("train", "validation")
_DUPLICATE, _NEAR_DUPLICATE = 2, 3
"""What a document may be instead of a member of SPLITS[0] or SPLITS[1]."""
_REASONS = {_DUPLICATE: "duplicate", _NEAR_DUPLICATE: "near duplicate"}
_LENGTH_BINS = 40
"""Documents are counted by the power of two of their tokens."""
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Choice:
    """What decides which documents stay."""

    held_out: float
    drop_duplicates: bool
    near_duplicates: Literal["keep", "held_out", "drop"]
    similarity: float


@dataclass
class ShardPlan:
    """One shard: stretches of documents of units, of which those of its split are taken."""

    split: int
    prefix: str
    pieces: list[tuple[str, int, int]] = field(default_factory=list)
    """(unit, first document, one past the last)."""
    tokens: int = 0

    @property
    def name(self) -> str:
        """For files beside one another."""
        return self.prefix.replace("/", "-")


@dataclass
class Gone:
    """Documents that went for what only all units together show."""

    counts: Counter = field(default_factory=Counter)
    """By reason."""
    of_sources: Counter = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, int, NDArray]]] = field(default_factory=dict)
    """The first few of each reason: source, position, tokens."""


def is_held_out(digests: NDArray, fraction: float) -> NDArray[np.bool_]:
    """Whether documents are kept for validation: by a hash of their text, so that copies of one stay together, and each stays there
    whatever else comes or goes.  DIGEST [n] -> [n]
    """
    return digests["high"] % np.uint64(10**6) < fraction * 10**6


@dataclass(frozen=True)
class Join:
    """The units in a folder, on their way to shards in another."""

    units: Path
    joined: Path
    """Where what is known of finished shards is kept."""
    output: Path
    dtype: np.dtype
    """Of tokens."""
    num_texts: int
    vocab_size: int

    def decide(self, names: list[str], choice: Choice, begin_near: Callable[[], object]) -> Gone:
        """Write NAME.fates beside each unit, a byte a document: its split's number, or why it goes.

        Memory: three bytes a document, and what exact_duplicates and near_duplicates say; of the units' files one is open at a time.
        """
        digests = _Opened([self.units / f"{name}.digests" for name in names], PLACED_DIGEST)
        gone = exact_duplicates(digests) if choice.drop_duplicates else [np.zeros(len(part), np.bool_) for part in digests]
        held_out = []
        for part in digests:
            held_out.append(np.zeros(len(part), np.bool_))
            held_out[-1][part["place"]] = is_held_out(part, choice.held_out)
        fates = [np.where(dropped, _DUPLICATE, held).astype(np.uint8) for dropped, held in zip(gone, held_out, strict=True)]
        if choice.near_duplicates != "keep":
            begin_near()
            signed = _Opened([self.units / f"{name}.signatures" for name in names], np.dtype("<u4"), NUM_PERMUTATIONS)
            near = near_duplicates(signed, gone, held_out, choice.similarity, choice.near_duplicates)
            for fate, is_near in zip(fates, near, strict=True):
                fate[is_near] = _NEAR_DUPLICATE
        went = Gone()
        for name, fate in zip(names, fates, strict=True):
            fate.tofile(self.units / f"{name}.fates")
            if (fate >= len(SPLITS)).any():
                self._count(name, went)
        return went

    def _count(self, name: str, went: Gone) -> None:
        documents, fates = self._read(name)
        sources, numbers = np.unique(documents["source"][fates >= len(SPLITS)], return_counts=True)
        went.of_sources.update(dict(zip(sources.tolist(), numbers.tolist(), strict=True)))
        for fate, reason in _REASONS.items():
            places = np.flatnonzero(fates == fate)
            went.counts[reason] += len(places)
            examples = went.examples.setdefault(reason, [])
            for place in places[: EXAMPLES - len(examples)]:
                begin = int(documents["lengths"][:place].sum(dtype=np.int64))
                tokens = _mapped(self.units / f"{name}.tokens", self.dtype)[begin : begin + int(documents["lengths"][place, 0]) - 1]
                examples.append((int(documents["source"][place]), int(documents["position"][place]), np.array(tokens)))

    def plan(self, names: list[str], shard_tokens: int) -> list[ShardPlan]:
        """Which documents go into which shard, those of the first split first: a shard ends with the document that fills it."""
        plans: list[list[ShardPlan]] = [[] for _ in SPLITS]
        for name in names:
            documents, fates = self._read(name)
            sizes = documents["lengths"].sum(axis=1, dtype=np.int64)
            for split, begun in enumerate(plans):
                _add_to_shards(begun, split, name, np.flatnonzero(fates == split), sizes, shard_tokens)
        return [plan for begun in plans for plan in begun]

    def write_shard(self, plan: ShardPlan) -> dict:
        """Copy a shard's documents out of their units; what is to be known of it. Memory: the records and tokens of a unit."""
        token_counts, length_counts = np.zeros(self.vocab_size, np.int64), np.zeros(_LENGTH_BINS, np.int64)
        of_sources: dict[int, NDArray[np.int64]] = {}
        prefix = self.output / plan.prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        ends: list[list[int]] = []
        with ShardWriter(prefix, self.dtype, self.num_texts) as writer, open(f"{prefix}.places.{os.getpid()}.partial", "wb") as places:
            for name, first, last in plan.pieces:
                documents, fates = self._read(name)
                begin = int(documents["lengths"][:first].sum(dtype=np.int64))
                documents, is_member = documents[first:last], fates[first:last] == plan.split
                sizes = documents["lengths"].sum(axis=1, dtype=np.int64)
                tokens = _mapped(self.units / f"{name}.tokens", self.dtype)[begin : begin + int(sizes.sum())]
                if not is_member.all():
                    tokens = tokens[np.repeat(is_member, sizes)]
                    documents, sizes = documents[is_member], sizes[is_member]
                writer.add(tokens, documents["lengths"].reshape(-1))
                where = np.empty(len(documents), PLACE)
                where["source"], where["position"] = documents["source"], documents["position"]
                places.write(where.tobytes())
                digest.update(where.tobytes())
                ends += [where[0].tolist(), where[-1].tolist()]
                for start in range(0, len(tokens), _TOKENS_AT_ONCE):
                    token_counts += np.bincount(tokens[start : start + _TOKENS_AT_ONCE], minlength=self.vocab_size)
                length_counts += np.bincount(np.log2(np.maximum(sizes, 1)).astype(int), minlength=_LENGTH_BINS)
                for source in np.unique(documents["source"]).tolist():
                    its = documents["source"] == source
                    found = np.array([its.sum(), sizes[its].sum(), documents["bytes"][its].sum()], np.int64)
                    of_sources[source] = of_sources.get(source, 0) + found
            publish_file(places, f"{prefix}.places", sync_folder=False)
        counts = np.concatenate([length_counts, token_counts]).tobytes()
        write_file(self.joined / f"{plan.name}.counts", counts, self.joined / f"{plan.name}.counts.{os.getpid()}.partial")
        total = sum(of_sources.values())
        return {
            "prefix": plan.prefix,
            "documents": int(total[0]),
            "tokens": int(total[1]),
            "bytes": int(total[2]),
            "sources": [ends[0], ends[-1]],
            "sha256": writer.sha256 | {"places": digest.hexdigest()},
            "of_sources": {source: found.tolist() for source, found in of_sources.items()},
        }

    def counts(self, plans: list[ShardPlan]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How often each token, and each power of two of a document's length, occurs in finished shards.  -> [vocab_size], [bins]"""
        counts = np.zeros(_LENGTH_BINS + self.vocab_size, np.int64)
        for plan in plans:
            counts += np.fromfile(self.joined / f"{plan.name}.counts", np.int64)
        return counts[_LENGTH_BINS:], counts[:_LENGTH_BINS]

    def _read(self, name: str) -> tuple[NDArray, NDArray[np.uint8]]:
        """The records of a unit's documents, and their fates."""
        documents = np.fromfile(self.units / f"{name}.documents", document_dtype(self.num_texts))
        return documents, np.fromfile(self.units / f"{name}.fates", np.uint8)


def _add_to_shards(
    plans: list[ShardPlan], split: int, name: str, members: NDArray[np.int64], sizes: NDArray[np.int64], shard_tokens: int
) -> None:
    """Deal out the members of a unit's documents; the last plan may have room for the next unit's.  [members], [documents]"""
    tokens = np.cumsum(sizes[members])
    begun = before = 0
    while begun < len(members):
        if not plans or plans[-1].tokens >= shard_tokens:
            plans.append(ShardPlan(split, f"{SPLITS[split]}/{len(plans):05d}"))
        plan = plans[-1]
        filling = int(np.searchsorted(tokens, before + shard_tokens - plan.tokens))
        end = min(filling + 1, len(members))
        plan.pieces.append((name, int(members[begun]), int(members[end - 1]) + 1))
        plan.tokens += int(tokens[end - 1]) - before
        begun, before = end, int(tokens[end - 1])


class _Opened(Sequence):
    """Arrays in files, each mapped anew when it is asked for: a process may not have as many files open as there are units."""

    def __init__(self, paths: list[Path], dtype: np.dtype, width: int | None = None) -> None:
        self._paths, self._dtype, self._width = paths, dtype, width

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> NDArray:
        array = _mapped(self._paths[number], self._dtype)
        return array if self._width is None else array.reshape(-1, self._width)


def _mapped(path: Path, dtype: np.dtype) -> NDArray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
