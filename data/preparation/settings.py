"""Settings of data/prepare.py. This module imports nothing heavy, so that --help and a wrong setting are answered at once."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from data.command_line import UserError, describe
from data.preparation.filters import FilterSettings
from data.ranges import range_complaints

OnError = Literal["fail", "skip", "quarantine"]
STANDARD_INPUT = "-"
MIN_VOCAB_SIZE = 512
_TRAINING_SETTINGS = ("vocab_size", "pieces_within_words", "special_tokens")
"""Settings of a tokenizer that is trained here."""


@dataclass(frozen=True)
class PrepareSettings:
    """Settings that describe the text to prepare and how to prepare it."""

    input: tuple[str, ...] = ()
    """Files, folders (read recursively, links to folders included) and glob patterns. Supported: .txt .md .py (plain text), .jsonl
    .ndjson .json (one JSON object in each line), .csv .tsv, .parquet and .arrow, each plain or compressed as .gz .zst .xz .bz2. Also
    supported: .idx or .bin, a token file that Megatron-LM or gpt-neox wrote with the same tokenizer. "-" is standard input, which is
    stored in OUTPUT.partial until the work is done. Default, if dataset is not given either: the source code and documentation of
    Python's standard library."""
    input_format: Literal["txt", "jsonl", "csv", "tsv", "parquet", "arrow"] | None = None
    """Format of every input file (default: the format that each file's name ends in). Required for standard input and for files with
    another suffix or none."""
    dataset: str | None = None
    """Hugging Face dataset to read instead of input: NAME, NAME:CONFIG or a local folder. The dataset is streamed."""
    dataset_split: str = "train"
    """Split of the dataset to read."""
    text_field: str = "text"
    """Field (column) of a record that contains the text."""
    pair_field: str | None = None
    """Second field of each record: a translation or a label (text or a whole number). Each document then consists of two sequences."""
    columns: tuple[str, ...] = ()
    """Column names for .csv and .tsv files whose first line does not contain them."""
    separator: str | None = None
    """Separator between the documents of a plain text file: "blank" (empty lines), "line" (each line is a document), or a marker that is
    alone on its line (default: each file is one document)."""
    output: str = "prepared"
    """Folder to write. An existing folder is never overwritten. Unfinished work is kept in OUTPUT.partial."""
    tokenizer: str | None = None
    """Tokenizer: a SentencePiece .model, a Hugging Face tokenizer.json, a .tiktoken, or a folder that contains one of them (default: train
    a tokenizer on the text)."""
    end_of_text: str | None = None
    """Token of the given tokenizer that ends each document. Needed only if the tokenizer's files do not define it."""
    add_bos: bool | None = None
    """Begin each document with the given tokenizer's begin-of-text token, such as Llama 3's <|begin_of_text|>. Training, evaluation,
    generation and exported tokenizers follow it. Not supported with pair_field (default: true if the tokenizer itself puts the token
    before each text)."""
    gigatoken: bool = True
    """Tokenize with gigatoken, which is several times faster, if it gives the same ids. This is checked at the start and in every work
    unit."""
    vocab_size: Annotated[int, Ge(MIN_VOCAB_SIZE), Lt(2**31)] = 4096
    """Number of ids of the tokenizer to train, including the 256 bytes; at least 512."""
    tokenizer_kind: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of the tokenizer to train: bpe gives fewer tokens and trains faster, unigram tokenizes faster."""
    pieces_within_words: bool = False
    """Tokens of the tokenizer to train never cross a space or the border between letters and other characters. Use it for translation and
    for whole-word masking. Without it, the same text has fewer tokens."""
    tokenizer_characters: Annotated[int, Gt(0)] = 20_000_000
    """Number of characters to train the tokenizer on, taken from the beginning of files across the whole corpus."""
    special_tokens: tuple[str, ...] = ()
    """Additional special tokens of the tokenizer to train, for example those of fill-in-the-middle. Text is never tokenized to them."""
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.02
    """Fraction of the documents to hold out for validation, at least 0 and below 1. A hash of its text decides for each document."""
    exact_duplicates: Literal["drop", "keep"] = "drop"
    """drop: of documents with identical text, keep the first. keep: keep all of them."""
    near_duplicates: Literal["keep", "held_out", "drop"] = "keep"
    """held_out: drop held-out documents that are near-duplicates of a training document. drop: keep one document of each group of
    near-duplicates. keep: do not look for near-duplicates."""
    near_duplicate_similarity: Annotated[float, Ge(0.06), Le(1)] = 0.8
    """Jaccard similarity of five-word shingles (estimated by MinHash) from which two documents are near-duplicates; from 0.06 to 1."""
    filters: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    on_error: OnError = "fail"
    """Handling of a record that is not valid text. fail: stop and report it. skip: count it. quarantine: count it and write it to
    OUTPUT/quarantine.jsonl. After fail, the finished work is kept, and the same command with skip or quarantine resumes it."""
    max_errors: Annotated[int, Ge(0)] = 1000
    """Maximum number of invalid records to skip or quarantine; if there are more, the work stops."""
    shard_tokens: Annotated[int, Gt(0)] = 2**28
    """Number of tokens after which a new shard begins."""
    unit_megabytes: Annotated[float, Gt(0)] | None = None
    """Size of a work unit, in MiB of input: a process reads one unit at a time, and a crash loses at most that (default: 4 to 64, by the
    size of the corpus)."""
    workers: Annotated[int, Ge(0)] = 0
    """Number of worker processes; 0: one for each core. The output does not depend on it."""
    rank: Annotated[int, Ge(0)] | None = None
    """Index of this node, from 0 (default: the rank that srun sets, else 0). The output does not depend on the number of nodes."""
    world_size: Annotated[int, Gt(0)] | None = None
    """Number of nodes that work on this corpus, each with its own rank and the same disk (default: the number that srun sets, else 1)."""

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is not allowed."""
        complaints = self._input_complaints() + self._tokenizer_complaints()
        rank, world_size = rank_and_world_size(self)
        if rank >= world_size:
            complaints.append(f"{describe(self, 'rank')} must be below {describe(self, 'world_size')}.")
        if not Path(self.output).name:
            complaints.append(f"{describe(self, 'output')} is not the name of a folder. Give the name of a new folder.")
        for minimum, maximum in self.filters.minimums_above_maximums():
            names = f"{describe(self, f'filters.{minimum}')} is above {describe(self, f'filters.{maximum}')}"
            complaints.append(f"{names}: every document would be dropped.")
        return complaints

    def validate(self) -> None:
        """Raise UserError if a value is out of range or settings contradict each other. read_settings does this for a command line."""
        if complaints := range_complaints(self) or self.complaints():
            raise UserError("\n".join(complaints))

    def _input_complaints(self) -> list[str]:
        complaints = []
        if self.input and self.dataset:
            complaints.append(f"{describe(self, 'input')} and {describe(self, 'dataset')} are both given. Give only one of them.")
        if STANDARD_INPUT in self.input:
            if len(self.input) > 1 or self.input_format is None:
                complaints.append("input - is standard input. It must be the only input, and it needs input_format.")
            elif self.input_format in ("parquet", "arrow"):
                complaints.append(f"{describe(self, 'input_format')} is not supported for standard input. Use txt, jsonl, csv or tsv.")
            if rank_and_world_size(self)[1] > 1:
                complaints.append("input - is standard input, which only one node can read. Give files, or world_size 1.")
        if self.pair_field == self.text_field:
            complaints.append(f"{describe(self, 'pair_field')} must be another field than {describe(self, 'text_field')}.")
        if repeated := [name for name in (self.text_field, self.pair_field) if self.columns.count(name or "") > 1]:
            complaints.append(
                f'{describe(self, "columns")} has "{repeated[0]}" more than once. Give each column to read a name of its own.'
            )
        if self.separator is not None and (not self.separator.strip() or set(self.separator) & set("\r\n")):
            complaints.append(f'separator {self.separator!r} must be "blank", "line" or a marker that is alone on its line.')
        return complaints

    def _tokenizer_complaints(self) -> list[str]:
        if self.add_bos and self.pair_field is not None:
            message = "the objectives that read pairs put their own special tokens around a text. Remove one of the two"
            return [f"{describe(self, 'add_bos')} and {describe(self, 'pair_field')} are both given; {message}."]
        if not self.tokenizer:
            message = "applies only to a given tokenizer; a tokenizer that is trained here has"
            return [
                f"{describe(self, name)} {message} {own}."
                for name, own in (("end_of_text", "its own"), ("add_bos", "no begin-of-text token"))
                if getattr(self, name)
            ]
        training = [name for name in _TRAINING_SETTINGS if getattr(self, name) != getattr(PrepareSettings, name)]
        message = f"applies only to a tokenizer that is trained here, but {describe(self, 'tokenizer')} is given. Remove one of the two."
        return [f"{describe(self, name)} {message}" for name in training]


def rank_and_world_size(settings: PrepareSettings) -> tuple[int, int]:
    """Return (rank, world size): the settings, else those that srun sets, else (0, 1)."""
    rank, size = settings.rank, settings.world_size
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        rank = int(os.environ["SLURM_PROCID"]) if rank is None else rank
        size = int(os.environ["SLURM_STEP_NUM_TASKS"]) if size is None else size
    return rank or 0, 1 if size is None else size


def partial_folder(output: Path) -> Path:
    """Return the folder that holds the unfinished work of an output folder: OUTPUT.partial."""
    return output.with_name(f"{output.name}.partial")
