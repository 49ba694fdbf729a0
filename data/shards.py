"""The file format: token shards in Megatron's format, and a prepared folder of them.

PREFIX.bin holds the tokens, little-endian, without a header. PREFIX.idx, packed: the magic, u64 version 1, u8 dtype,
u64 sequences S, u64 documents + 1 D, S x i32 tokens in each sequence, S x i64 byte offset of each sequence,
D x i64 document boundaries in sequences, first 0, last S. We write one sequence a document.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import array
import bisect
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.file_array import AscendingFileArray, FileArray
from data.files import publish_file, sha256_of

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
PLACE = np.dtype([("source", "<u4"), ("position", "<u8")])
"""Entry of PREFIX.places, which is next to each shard: for each document its source (index in the manifest) and position in it."""

_HEADER = struct.Struct("<9sQBQQ")
_WRITTEN_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
# Megatron numbers 6 f64, 7 f32, 8 u16; gpt-neox 6 f32, 7 f64, 8 u16; DeepSpeed 6 u16, 7 u32, 8 u64. Tokens are integers, and
# the size of the .bin decides between the integers of a code.
_READ_CODES = {1: ["u1"], 2: ["i1"], 3: ["<i2"], 4: ["<i4"], 5: ["<i8"], 6: ["<u2"], 7: ["<u4"], 8: ["<u2", "<u8"]}
_UINT16_VOCAB_SIZE = 65_500  # Megatron's own bound
_CHECKED_AT_ONCE = 1 << 20
_DOCUMENTS_AT_ONCE = 64
_WRITTEN_AT_ONCE = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that tokens are stored as: two bytes if the vocabulary is below Megatron's bound, else four."""
    return np.dtype("<u2") if vocab_size < _UINT16_VOCAB_SIZE else np.dtype("<i4")


class ShardWriter:
    """A writer of PREFIX.bin and PREFIX.idx. Both files appear when it is closed, the .idx last.

    Memory: 4 bytes a sequence, which is 4 bytes a document if a document is one sequence.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, sequences_per_document: int = 1) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.sequences_per_document = sequences_per_document
        self.lengths = array.array("i")
        """Length of each sequence in tokens."""
        self.tokens = 0
        self.sha256: dict[str, str] = {}
        """Hashes of the two files, by "bin" and "idx"; empty until the writer is closed."""
        self._digest = hashlib.sha256()
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(f"{self.prefix}.bin.{os.getpid()}.partial", "wb")  # noqa: SIM115  closed by close()

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self.lengths) // self.sequences_per_document

    def add(self, tokens: NDArray, lengths: Sequence[int] | NDArray[np.int32] | None = None) -> None:
        """Write one document, or the joined sequences of several with their lengths, in the shard's dtype.  [tokens], [sequences]"""
        assert tokens.dtype == self.dtype, tokens.dtype
        stored = np.ascontiguousarray(tokens).data.cast("B")
        self._file.write(stored)
        self._digest.update(stored)
        self.lengths.extend([len(tokens)] if lengths is None else lengths)
        self.tokens += len(tokens)

    def close(self) -> None:
        """Publish the .bin, and then write and publish the .idx."""
        publish_file(self._file, f"{self.prefix}.bin", sync_folder=False)
        digest = hashlib.sha256()
        with open(f"{self.prefix}.idx.{os.getpid()}.partial", "wb") as file:
            for part in self._index():
                digest.update(part)
                file.write(part)
            publish_file(file, f"{self.prefix}.idx")
        self.sha256 = {"bin": self._digest.hexdigest(), "idx": digest.hexdigest()}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            os.unlink(self._file.name)

    def _index(self) -> Iterator[bytes]:
        """Yield the bytes of the .idx in parts."""
        lengths = np.frombuffer(self.lengths, "<i4")
        yield _HEADER.pack(MAGIC, VERSION, _WRITTEN_CODES[self.dtype], len(lengths), self.documents + 1)
        yield from (lengths[start : start + _WRITTEN_AT_ONCE].tobytes() for start in range(0, len(lengths), _WRITTEN_AT_ONCE))
        before = 0
        for start in range(0, len(lengths), _WRITTEN_AT_ONCE):
            ends = before + np.cumsum(lengths[start : start + _WRITTEN_AT_ONCE], dtype="<i8")
            yield (np.concatenate([[before], ends[:-1]]) * self.dtype.itemsize).astype("<i8").tobytes()
            before = int(ends[-1])
        for start in range(0, self.documents + 1, _WRITTEN_AT_ONCE):
            documents = np.arange(start, min(start + _WRITTEN_AT_ONCE, self.documents + 1), dtype="<i8")
            yield (documents * self.sequences_per_document).tobytes()


class Shard:
    """A .bin/.idx pair of ours or of another tool. Opening checks the index and the file sizes, and raises UserError.

    Only what is asked for is read. A file that is truncated later is a UserError too.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._read_index(f"{prefix}.idx")
        stored = _open_file(f"{prefix}.bin")
        dtype = self._stored_dtype(len(stored))
        self.tokens = stored.part(dtype, 0, len(stored) // dtype.itemsize)
        self._check_offsets(f"{prefix}.idx")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._boundaries) - 1

    def document_start(self, document: int) -> int:
        """Return the index of a document's first token. For `document` equal to num_documents it is the number of tokens."""
        sequence = self._boundaries.value(document)
        return self._offsets.value(sequence) // self.tokens.itemsize if sequence < len(self._offsets) else len(self.tokens)

    def documents_before(self, place: int) -> int:
        """Return how many documents start before the token at index `place`."""
        sequence = self._offsets.bisect_left(place * self.tokens.itemsize, len(self._offsets))
        return self._boundaries.bisect_left(sequence, self.num_documents)

    def document_starts(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the token indices in [first, last) at which documents start.  -> [documents]"""
        sequences = self._boundaries[self.documents_before(first) : self.documents_before(last)]
        return self._offsets[sequences[sequences < len(self._offsets)]] // self.tokens.itemsize

    def document_lengths(self, first: int = 0, last: int | None = None) -> NDArray[np.int64]:
        """Return the number of tokens of each document in [first, last).  -> [documents]"""
        sequences = self._boundaries[first : None if last is None else last + 1]
        starts = np.full(len(sequences), self.tokens.nbytes, np.int64)
        inside = sequences < len(self._offsets)
        starts[inside] = self._offsets[sequences[inside]]
        return np.diff(starts) // self.tokens.itemsize

    def documents(self, first: int, last: int) -> Iterator[NDArray]:
        """Yield the tokens of each document in [first, last)."""
        for start in range(first, last, _DOCUMENTS_AT_ONCE):
            lengths = self.document_lengths(start, min(start + _DOCUMENTS_AT_ONCE, last))
            begin = self.document_start(start)
            yield from np.split(self.tokens[begin : begin + int(lengths.sum())], np.cumsum(lengths[:-1]))

    def sequences(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return first token and number of tokens of both sequences of documents, each of which has two.  [n] -> [n, 2], [n, 2]"""
        numbers = 2 * documents[:, None] + np.arange(3)
        edges = np.full(numbers.shape, self.tokens.nbytes, np.int64)
        inside = numbers < len(self._offsets)
        edges[inside] = self._offsets[numbers[inside]]
        edges //= self.tokens.itemsize
        return edges[:, :2], np.diff(edges)

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Number of tokens of both sequences of all documents, each of which has two.  [documents, 2]"""
        return self._lengths[:].reshape(-1, 2)

    @property
    def holds_pairs(self) -> bool:
        """True if each document has two sequences."""
        return all((np.diff(part) == 2).all() for part in _overlapping(self._boundaries))

    def _read_index(self, path: str) -> None:
        index = _open_file(path)
        if len(index) < _HEADER.size:
            raise UserError(f"{path} is {len(index)} bytes long; the header alone has {_HEADER.size}. The file is truncated.")
        magic, version, self._code, sequences, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{path} is not a Megatron index: it begins with {magic!r}, not with {MAGIC!r}.")
        if version != VERSION:
            raise UserError(f"{path} has version {version}; only version {VERSION} is supported.")
        if self._code not in _READ_CODES:
            raise UserError(f"{path} has dtype code {self._code}; valid codes are 1 to 8.")
        whole = _HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) != whole:
            raise UserError(
                f"{path} is {len(index)} bytes long; with {sequences} sequences and {boundaries} document boundaries it must have {whole}."
            )
        self._lengths = index.part("<i4", _HEADER.size, sequences)
        self._offsets = index.ascending_part("<i8", _HEADER.size + 4 * sequences, sequences)
        self._boundaries: AscendingFileArray | _EvenBoundaries
        self._boundaries = index.ascending_part("<i8", _HEADER.size + 12 * sequences, boundaries)
        if sequences == 0:
            raise UserError(f"{path} has no sequences.")
        if boundaries < 2 or self._boundaries[0] != 0 or self._boundaries[-1] != sequences:
            raise UserError(f"{path}: the document boundaries must go from 0 to {sequences}, the number of sequences.")
        counts = [(int(np.diff(part).min()), int(np.diff(part).max())) for part in _overlapping(self._boundaries)]
        least, most = min(least for least, _ in counts), max(most for _, most in counts)
        if least < 0:
            raise UserError(f"{path}: the document boundaries are not in ascending order.")
        if least == most:
            self._boundaries = _EvenBoundaries(least, boundaries)
        if any(part.min() < 0 for part in _in_parts(self._lengths)):
            raise UserError(f"{path}: a sequence has a negative length.")

    def _stored_dtype(self, num_bytes: int) -> np.dtype:
        """Return the integer type that fits both the dtype code and the size of the .bin."""
        num_tokens = sum(int(part.sum(dtype=np.int64)) for part in _in_parts(self._lengths))
        dtypes = [np.dtype(name) for name in _READ_CODES[self._code]]
        for dtype in dtypes:
            if num_bytes == num_tokens * dtype.itemsize:
                return dtype
        expected = " or ".join(f"{num_tokens * dtype.itemsize} ({dtype.name})" for dtype in dtypes)
        raise UserError(
            f"{self.prefix}.bin is {num_bytes} bytes long; for the {num_tokens} tokens and dtype code {self._code} of its .idx "
            f"it must have {expected}."
        )

    def _check_offsets(self, path: str) -> None:
        expected = 0
        for start in range(0, len(self._offsets), _CHECKED_AT_ONCE):
            ends = expected + np.cumsum(self._lengths[start : start + _CHECKED_AT_ONCE], dtype=np.int64) * self.tokens.itemsize
            offsets = self._offsets[start : start + _CHECKED_AT_ONCE]
            wrong = np.flatnonzero(offsets != np.concatenate([[expected], ends[:-1]]))
            if len(wrong):
                raise UserError(f"{path}: the offset of sequence {start + wrong[0]} is not where the sequence before it ends.")
            expected = int(ends[-1])


class _EvenBoundaries:
    """The document boundaries of a shard whose documents all have the same number of sequences, as ours do: nothing is read for them."""

    def __init__(self, sequences_per_document: int, count: int) -> None:
        self._step, self._count = sequences_per_document, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: slice) -> NDArray[np.int64]:
        return np.arange(*index.indices(self._count), dtype=np.int64) * self._step

    def value(self, index: int) -> int:
        """Return one boundary."""
        return index * self._step

    def bisect_left(self, value: int, end: int) -> int:
        """Return how many of the first `end` boundaries are below `value`."""
        return min(end, -(-value // self._step))


def bytes_per_token(streams: Collection["TokenStream"]) -> float:
    """Return the mean UTF-8 bytes of a predicted token in streams."""
    return sum(stream.num_bytes for stream in streams) / sum(stream.num_predicted for stream in streams)


class TokenStream:
    """All shards of a split as one row of tokens, with the starts of its documents."""

    def __init__(self, shards: list[Shard], num_bytes: int, vocab_size: int | None = None, begin_of_text: int | None = None) -> None:
        self.shards = shards
        self._vocab_size = vocab_size
        self.num_bytes = num_bytes
        """UTF-8 bytes of the text of all tokens, the divisor of bits per byte."""
        self.begin_of_text = begin_of_text
        """Id of the first token of each document, which is read and never predicted; None if documents begin with their text."""
        self._starts = [0, *itertools.accumulate(len(shard.tokens) for shard in shards)]
        self.first_documents = [0, *itertools.accumulate(shard.num_documents for shard in shards)]
        """Index in the stream of each shard's first document, and at the end the number of documents."""

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.first_documents[-1]

    @property
    def num_predicted(self) -> int:
        """Number of tokens without those that begin a document, which are not predicted."""
        return len(self) - (0 if self.begin_of_text is None else self.num_documents)

    def read(self, start: int, count: int) -> NDArray:
        """Return `count` tokens from index `start`, read-only if they are in one shard.  -> [count]"""
        assert start >= 0 and start + count <= len(self), f"tokens {start} to {start + count} of {len(self)}"
        parts = [shard.tokens[first:last] for shard, first, last, _ in self._touched(start, count)]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._check(tokens, lambda: [shard.prefix for shard, *_ in self._touched(start, count)])
        return tokens

    def document_starts(self, start: int, count: int) -> NDArray[np.int64]:
        """Return which of the `count` tokens from `start` are the first of a document, counted from `start`.  -> [documents]"""
        parts = [shard.document_starts(first, last) + (base - start) for shard, first, last, base in self._touched(start, count)]
        return np.unique(np.concatenate(parts))  # a document without tokens starts where the next one does

    def document_start(self, document: int) -> int:
        """Return the index of a document's first token. For `document` equal to num_documents it is the number of tokens."""
        if document == self.num_documents:
            return len(self)
        number = bisect.bisect_right(self.first_documents, document) - 1
        return self._starts[number] + self.shards[number].document_start(document - self.first_documents[number])

    def document_lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the number of tokens of each document in [first, last).  -> [documents]"""
        parts = [np.zeros(0, np.int64)]
        number = bisect.bisect_right(self.first_documents, first) - 1
        while first < min(last, self.num_documents):
            before, after = self.first_documents[number : number + 2]
            parts.append(self.shards[number].document_lengths(first - before, min(last, after) - before))
            first, number = after, number + 1
        return np.concatenate(parts)

    @property
    def holds_pairs(self) -> bool:
        """True if each document has two sequences, as data/prepare.py --pair_field writes them."""
        return all(shard.holds_pairs for shard in self.shards)

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Number of tokens of both sequences of all documents of pairs.  [documents, 2]"""
        return np.concatenate([shard.sequence_lengths for shard in self.shards])

    def sequences(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return first token and number of tokens of both sequences of documents of pairs.  [n] -> [n, 2], [n, 2]"""
        numbers = np.searchsorted(self.first_documents, documents, side="right") - 1
        starts, lengths = np.empty((2, len(documents), 2), np.int64)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            inside, lengths[chosen] = self.shards[number].sequences(documents[chosen] - self.first_documents[number])
            starts[chosen] = inside + self._starts[number]
        return starts, lengths

    def gather(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens at these indices.  [n] -> [n]"""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        tokens = np.empty(len(places), np.int64)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            tokens[chosen] = self.shards[number].tokens[places[chosen] - self._starts[number]]
        self._check(tokens, lambda: {self.shards[number].prefix for number in numbers.tolist()})
        return tokens

    def document_at(self, place: int) -> int:
        """Return the index of the document that the token at index `place` belongs to."""
        number = bisect.bisect_right(self._starts, place) - 1
        return self.first_documents[number] + self.shards[number].documents_before(place - self._starts[number] + 1) - 1

    def _check(self, tokens: NDArray, prefixes: Callable[[], Iterable[str]]) -> None:
        """Raise UserError if a token is not in the vocabulary."""
        if self._vocab_size is not None and tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise UserError(
                f"{', '.join(sorted(prefixes()))}.bin is damaged: it contains a token outside the {self._vocab_size} ids of the tokenizer."
            )

    def _touched(self, start: int, count: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Yield each shard that holds some of these tokens, the first and one past the last token in it, and its start in the stream."""
        number = bisect.bisect_right(self._starts, start) - 1
        end = start + count
        while start < end:
            base, after = self._starts[number], self._starts[number + 1]
            yield self.shards[number], start - base, min(end, after) - base, base
            start, number = after, number + 1


class PreparedData:
    """A folder that data/prepare.py wrote: one TokenStream a split, the tokenizer's file, and the manifest.

    Opening checks the sizes of all files and the indexes; `verify` reads every byte; `find_change` is for readers with long work.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        try:
            watched = {self.folder / MANIFEST: sha256_of(self.folder / MANIFEST)} | self._shard_hashes()
            self._watched = {path: (digest, _stamp(path)) for path, digest in watched.items()}
            tokenizer = self.manifest["tokenizer"]
            self.tokenizer_path = self.folder / tokenizer["file"]
            self.vocab_size: int = tokenizer["vocab_size"]
            self.end_of_text: int = tokenizer["end_of_text"]
            self.begin_of_text: int | None = tokenizer.get("begin_of_text")
            self.splits = {name: self._open_split(split) for name, split in self.manifest["splits"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder / MANIFEST} does not have the content that data/prepare.py writes: {type(error).__name__}, {error}."
            ) from error
        if not self.tokenizer_path.is_file():
            raise UserError(f"{self.tokenizer_path} is missing; {self.folder / MANIFEST} lists it as the tokenizer.")

    @property
    def fingerprint(self) -> str:
        """One hash of all tokens in their order."""
        shards = [(name, shard["sha256"]) for name, split in self.manifest["splits"].items() for shard in split["shards"]]
        return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tokens on the disk."""
        return sum(shard.tokens.nbytes for stream in self.splits.values() for shard in stream.shards)

    def place_of(self, split: str, document: int) -> str:
        """Return the origin of a document of a split, such as "a.jsonl, byte 1234"."""
        for shard in self.manifest["splits"][split]["shards"]:
            if document < shard["documents"]:
                break
            document -= shard["documents"]
        path = self.folder / f"{shard['prefix']}.places"
        if not path.exists():
            return "not recorded"  # prepared by an earlier version
        source, position = FileArray(path, PLACE)[document].tolist()
        return describe_place(self.manifest["sources"][source], self.manifest["position_unit"][source], position)

    def find_change(self) -> str | None:
        """Return a message about the first shard that has other bytes than the folder was opened with, or None.

        A file is hashed again only if its size, its time or its inode has changed: one that was only touched or copied back is the same.
        A deleted file can still be read while it is open, so it is no change.
        """
        for path, (digest, stamp) in self._watched.items():
            current = _stamp(path)
            if current is None or current == stamp:
                continue
            if sha256_of(path) != digest:
                return f"{path} was changed while it was read: its contents are not those with which {self.folder} was opened."
            self._watched[path] = digest, current
        return None

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Size and time of each watched file, by its path inside the folder: equal stamps mean that it was not written again."""
        stamps = {path.relative_to(self.folder).as_posix(): stamp for path, (_, stamp) in self._watched.items()}
        return {name: list(stamp[:2]) for name, stamp in stamps.items() if stamp is not None}

    def verify(self, earlier: dict[str, list[int]] | None = None) -> None:
        """Hash every file; with the `stamps` of an earlier time only those of another stamp.

        Raises UserError with the first file whose bytes have changed.
        """
        stamps = self.stamps
        tokenizer = self.manifest["tokenizer"]
        expected = {self.tokenizer_path: tokenizer["sha256"]}
        if "configuration_sha256" in tokenizer:  # earlier versions did not record it
            expected[self.folder / "tokenizer_config.json"] = tokenizer["configuration_sha256"]
        for path, digest in (expected | self._shard_hashes()).items():
            name = path.relative_to(self.folder).as_posix()
            is_known = earlier is not None and name in stamps and stamps[name] == earlier.get(name)
            if not is_known and sha256_of(path) != digest:
                raise UserError(f"{path} was changed after it was written: its sha256 is not the one in {self.folder / MANIFEST}.")

    def _shard_hashes(self) -> dict[Path, str]:
        """Return the SHA-256 of every file of the shards, by path, as the manifest lists it."""
        shards = [shard for split in self.manifest["splits"].values() for shard in split["shards"]]
        return {self.folder / f"{shard['prefix']}.{kind}": digest for shard in shards for kind, digest in shard["sha256"].items()}

    def _open_split(self, split: dict) -> TokenStream:
        shards = []
        for entry in split["shards"]:
            shard = Shard(self.folder / entry["prefix"])
            found = (shard.num_documents, len(shard.tokens))
            if found != (entry["documents"], entry["tokens"]):
                raise UserError(
                    f"{shard.prefix}.idx has {found[0]} documents and {found[1]} tokens; "
                    f"{self.folder / MANIFEST} lists {entry['documents']} and {entry['tokens']}."
                )
            shards.append(shard)
        return TokenStream(shards, split["bytes"], self.vocab_size, self.begin_of_text)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced: its size, time and inode. None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def describe_place(source: str, unit: str, position: int) -> str:
    """Return a document's origin as text: "a.jsonl, byte 1234"."""
    return source if unit == "file" else f"{source}, {unit} {position:,}"


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a prepared folder. Raises UserError if it is missing or invalid."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} is not a prepared data folder: {MANIFEST} is missing. Create one with data/prepare.py.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not have the content that data/prepare.py writes: {type(error).__name__}, {error}.") from error
    if found not in (1, MANIFEST_FORMAT):
        raise UserError(f"{path} has format {found}; supported formats are 1 and {MANIFEST_FORMAT}.")
    return manifest


def _open_file(path: str) -> FileArray:
    """Return the bytes of a file that is not empty."""
    file = FileArray(path, "u1")
    if len(file) == 0:
        raise UserError(f"{path} is empty.")
    return file


def _in_parts(values: FileArray) -> Iterator[NDArray]:
    """Yield an array in parts."""
    yield from (values[start : start + _CHECKED_AT_ONCE] for start in range(0, len(values), _CHECKED_AT_ONCE))


def _overlapping(values: FileArray | _EvenBoundaries) -> Iterator[NDArray]:
    """Yield parts of an array. Neighbouring parts share one value, so that each pair of consecutive values is in one part."""
    for start in range(0, len(values) - 1, _CHECKED_AT_ONCE):
        yield values[start : start + _CHECKED_AT_ONCE + 1]
