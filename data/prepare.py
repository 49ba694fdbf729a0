"""The door to data: corpus -> tokens -> memory-mapped shards.

    python data/prepare.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer.model --output prepared/

With nothing else, the text is Python's own standard library, and the tokenizer is learnt from it.
"""

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import tqdm
from numpy.typing import NDArray

from data.command_line import UserError, read_settings, run_door
from data.corpus import (
    Corpus,
    Document,
    dataset_corpus,
    drop_duplicates_and_empty,
    embedded_corpus,
    file_corpus,
    is_held_out,
)
from data.shards import MANIFEST, MANIFEST_FORMAT, PreparedData, ShardWriter, read_manifest, token_dtype
from data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer, train_sentencepiece

_CHUNK_CHARACTERS = 1_000_000  # what a worker tokenizes at a time
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and how."""

    input: tuple[str, ...] = ()
    """Files, folders (read whole) and globs: .txt .md .py and other plain text, .jsonl .ndjson, each plain or .gz .zst .xz .bz2.
    With neither input nor dataset: the source and documentation of Python's standard library."""
    dataset: str | None = None
    """A Hugging Face dataset instead: NAME, NAME:CONFIG or a folder that one can be loaded from. It is streamed."""
    dataset_split: str = "train"
    """Which split of the dataset to read."""
    text_field: str = "text"
    """The field of a JSON line or of a dataset's row that holds the text."""
    output: str = "prepared"
    """The folder to make. What is there already is never overwritten."""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, or a folder with one of them. Without it one is learnt from the text."""
    end_of_text: str | None = None
    """The token of a given tokenizer that ends each document, where its files do not say."""
    vocab_size: int = 4096
    """Ids of the tokenizer to learn, the 256 bytes among them."""
    tokenizer_kind: Literal["bpe", "unigram"] = "bpe"
    """How the tokenizer is learnt: bpe packs tighter and learns faster, unigram tokenizes faster."""
    tokenizer_characters: int = 20_000_000
    """Characters of text to learn the tokenizer from, taken from the beginning of every file."""
    held_out: float = 0.02
    """Share of the documents kept for validation, from 0 to below 1, chosen by a hash of each one's path and line."""
    shard_tokens: int = 2**28
    """Tokens after which a new shard is begun."""
    workers: int = 0
    """Processes that tokenize; 0 is one a core. The output does not depend on it."""


def main(arguments: Sequence[str]) -> None:
    prepare(read_settings(PrepareSettings, arguments, __doc__))


def prepare(settings: PrepareSettings, progress: Callable[[str], object] = print) -> PreparedData:
    """Make the folder `settings.output`, or find that it is there as these settings would make it.

    The folder appears whole or not at all. A folder that holds anything else is refused with UserError, as is a bad input.
    """
    _check(settings)
    corpus = _corpus(settings)
    tokenizer = load_tokenizer(settings.tokenizer, settings.end_of_text) if settings.tokenizer else None
    recorded = _record(settings, corpus, tokenizer)
    output = Path(settings.output)
    if output.exists():
        if not (output / MANIFEST).is_file():
            raise UserError(f"{output} exists and is no prepared folder; nothing is overwritten. Give another --output.")
        if any(read_manifest(output).get(name) != value for name, value in recorded.items()):
            raise UserError(f"{output} exists and was prepared from other text or with other settings. Give another --output.")
        progress(f"{output} holds exactly this already: nothing to do.")
        return PreparedData(output)
    partial = output.with_name(f"{output.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        manifest = recorded | _write(settings, corpus, tokenizer, partial, progress)
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(output)
    except OSError as error:  # a full disk, a folder that may not be written, another process that was faster
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(_summary(manifest, output))
    return PreparedData(output)


def _check(settings: PrepareSettings) -> None:
    if settings.input and settings.dataset:
        raise UserError("--input and --dataset are both given; the text comes from one of them.")
    if settings.tokenizer and settings.vocab_size != PrepareSettings.vocab_size:
        raise UserError(f"--vocab_size {settings.vocab_size} is for a tokenizer to learn; --tokenizer {settings.tokenizer} has its own.")
    if settings.end_of_text and not settings.tokenizer:
        raise UserError("--end_of_text is for a given --tokenizer; a learnt one has its own.")
    if not 0 <= settings.held_out < 1:
        raise UserError(f"--held_out {settings.held_out} must be at least 0 and below 1.")
    for name, least in {"vocab_size": 512, "tokenizer_characters": 1, "shard_tokens": 1, "workers": 0}.items():
        if getattr(settings, name) < least:
            raise UserError(f"--{name} {getattr(settings, name)} must be at least {least}.")


def _corpus(settings: PrepareSettings) -> Corpus:
    if settings.dataset:
        return dataset_corpus(settings.dataset, settings.dataset_split, settings.text_field)
    return file_corpus(settings.input, settings.text_field) if settings.input else embedded_corpus()


def _record(settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer | None) -> dict:
    """What decides the tokens: a folder with the same record holds the same."""
    chosen = dataclasses.asdict(settings) | {"input": list(settings.input)}
    del chosen["output"], chosen["workers"]
    given = {"sha256": _sha256(tokenizer.path), "end_of_text": tokenizer.end_of_text} if tokenizer else None
    return {"format": MANIFEST_FORMAT, "settings": chosen, "text": corpus.identity, "given_tokenizer": given}


def _write(settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer | None, folder: Path, progress: Callable[[str], object]) -> dict:
    """Tokenizer and shards into a folder; what the manifest says of them."""
    if tokenizer is None:
        progress(f"Learning a tokenizer of {settings.vocab_size} ids ...")
        texts = _beginnings(corpus, settings.tokenizer_characters, settings.held_out)
        train_sentencepiece(texts, folder / "tokenizer.model", settings.vocab_size, settings.tokenizer_kind)
        tokenizer = load_tokenizer(folder / "tokenizer.model")
    copy = copy_tokenizer(tokenizer, folder)
    dtype = token_dtype(tokenizer.vocab_size)
    dropped = {"empty": 0, "duplicate": 0}
    chunks = _chunks(drop_duplicates_and_empty(corpus.documents(), dropped))
    workers = settings.workers or _usable_cores()
    splits = {name: _SplitWriter(folder, name, dtype, settings.shard_tokens) for name in ("train", "validation")}
    for chunk, encoded in _report(_encode_in_order(copy, dtype, chunks, workers), progress):
        for document, tokens in zip(chunk, encoded, strict=True):
            splits["validation" if is_held_out(document.source, settings.held_out) else "train"].add(document, tokens)
    for split in splits.values():
        split.close()
    if not splits["train"].shards:
        raise UserError(
            "There is no document to train on: "
            + (f"--held_out {settings.held_out} takes every one." if splits["validation"].shards else "none has text in it.")
        )
    return {
        "tokenizer": {
            "file": copy.name,
            "sha256": _sha256(copy),
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
        },
        "splits": {name: split.totals() | {"shards": split.shards} for name, split in splits.items()},
        "dropped": dropped,
    }


class _SplitWriter:
    """The shards of one split, a new one whenever the last is full."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.shards: list[dict] = []
        self._writer: ShardWriter | None = None

    def add(self, document: Document, tokens: NDArray) -> None:
        if self._writer is None:
            prefix = f"{self.name}/{len(self.shards):05d}"
            self._writer = ShardWriter(self.folder / prefix, self.dtype)
            self.shards.append({"prefix": prefix, "bytes": 0, "sources": [document.source, document.source]})
        self._writer.add(tokens)
        self.shards[-1]["bytes"] += len(document.text.encode())
        self.shards[-1]["sources"][1] = document.source
        if self._writer.tokens >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.shards[-1] |= {"documents": len(self._writer.lengths), "tokens": self._writer.tokens, "sha256": self._writer.sha256}
            self._writer = None

    def totals(self) -> dict[str, int]:
        return {name: sum(shard[name] for shard in self.shards) for name in ("documents", "tokens", "bytes")}


def _beginnings(corpus: Corpus, characters: int, held_out: float) -> Iterator[str]:
    """So many characters to learn a tokenizer from: the beginning of every part, what a short one leaves going to the later ones."""
    for number, part in enumerate(corpus.parts):
        share = characters // (len(corpus.parts) - number)
        for document in part():
            if is_held_out(document.source, held_out):
                continue
            text = document.text[:share]
            yield text
            share -= len(text)
            characters -= len(text)
            if not share:
                break


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents by the megabyte, cut the same way whoever tokenizes them."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode_in_order(
    tokenizer: Path, dtype: np.dtype, chunks: Iterable[list[Document]], workers: int
) -> Iterator[tuple[list[Document], list[NDArray]]]:
    """Each chunk with its tokens, in the order in which they came, tokenized by several processes where there is more than one."""
    if workers == 1:
        yield from ((chunk, _encode(tokenizer, dtype, [document.text for document in chunk])) for chunk in chunks)
        return
    # Spawned, not forked: whoever calls may have PyTorch's threads running, which a forked process would wait for in vain.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode, tokenizer, dtype, [document.text for document in chunk])))
            if len(waiting) > 2 * workers:  # bounds the text in memory
                chunk, encoded = waiting.popleft()
                yield chunk, encoded.result()
        for chunk, encoded in waiting:
            yield chunk, encoded.result()


_tokenizer_of = cache(load_tokenizer)  # once a process


def _encode(tokenizer: Path, dtype: np.dtype, texts: list[str]) -> list[NDArray]:
    model = _tokenizer_of(tokenizer)
    return [np.array([*tokens, model.end_of_text], dtype) for tokens in model.encode_batch(texts)]


def _report(encoded: Iterable[tuple[list[Document], list[NDArray]]], progress: Callable[[str], object]) -> Iterator:
    """The same, while a terminal shows a bar and a file gets a line every few seconds."""
    characters, said = 0, time.monotonic()
    with tqdm.tqdm(desc="Tokenizing", unit=" characters", unit_scale=True, disable=None) as bar:
        for chunk, tokens in encoded:
            yield chunk, tokens
            done = sum(len(document.text) for document in chunk)
            characters += done
            bar.update(done)
            if bar.disable and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                progress(f"Tokenized {characters / 1e6:,.0f} million characters, as far as {chunk[-1].source} ...")
                said = time.monotonic()


def _summary(manifest: dict, output: Path) -> str:
    lines = [
        f"{name:<10} {split['documents']:>11,} documents {split['tokens']:>15,} tokens {split['bytes']:>16,} bytes"
        + (f"   {split['bytes'] / split['tokens']:.2f} bytes a token" if split["tokens"] else "")
        for name, split in manifest["splits"].items()
    ]
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in manifest["dropped"].items())
    return "\n".join([*lines, f"dropped    {dropped}", f"tokenizer  {manifest['tokenizer']['vocab_size']:,} ids", f"written to {output}"])


def _usable_cores() -> int:
    """The cores that a batch system left to this process, where the system can say, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    run_door(main)
