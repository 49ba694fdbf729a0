"""Settings of data/prepare.py. This module imports nothing heavy, so that --help and a wrong setting are answered at once."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.command_line import UserError
from data.preparation.filters import FilterSettings, check_filters

OnError = Literal["fail", "skip", "quarantine"]
STANDARD_INPUT = "-"
_MAX_VOCAB_SIZE = 2**31 - 1


@dataclass(frozen=True)
class PrepareSettings:
    """Settings that describe the text to prepare and how to prepare it."""

    input: tuple[str, ...] = ()
    """Files, folders (read recursively) and glob patterns. Supported: .txt .md .py and other plain text, .jsonl .ndjson, .csv .tsv,
    .parquet and .arrow, each plain or compressed as .gz .zst .xz .bz2. Also supported: .idx or .bin, a token file that Megatron-LM or
    gpt-neox wrote with the same tokenizer. "-" is standard input, which is stored in OUTPUT.partial until the work is done. Default, if
    dataset is not given either: the source code and documentation of Python's standard library."""
    input_format: Literal["txt", "jsonl", "csv", "tsv", "parquet", "arrow"] | None = None
    """Format of every input file (default: the format that each file's name ends in). Required for standard input."""
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
    gigatoken: bool = True
    """Tokenize with gigatoken, which is several times faster, if it gives the same ids. This is checked at the start and in every work
    unit."""
    vocab_size: int = 4096
    """Number of ids of the tokenizer to train, including the 256 bytes; at least 512."""
    tokenizer_kind: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of the tokenizer to train: bpe gives fewer tokens and trains faster, unigram tokenizes faster."""
    pieces_within_words: bool = False
    """Tokens of the tokenizer to train never cross a space or the border between letters and other characters. Use it for translation and
    for whole-word masking. Without it, the same text has fewer tokens."""
    tokenizer_characters: int = 20_000_000
    """Number of characters to train the tokenizer on, taken from the beginning of files across the whole corpus."""
    special_tokens: tuple[str, ...] = ()
    """Additional special tokens of the tokenizer to train, for example those of fill-in-the-middle. Text is never tokenized to them."""
    held_out: float = 0.02
    """Fraction of the documents to hold out for validation, at least 0 and below 1. A hash of its text decides for each document."""
    exact_duplicates: Literal["drop", "keep"] = "drop"
    """drop: of documents with identical text, keep the first. keep: keep all of them."""
    near_duplicates: Literal["keep", "held_out", "drop"] = "keep"
    """held_out: drop held-out documents that are near-duplicates of a training document. drop: keep one document of each group of
    near-duplicates. keep: do not look for near-duplicates."""
    near_duplicate_similarity: float = 0.8
    """Jaccard similarity of five-word shingles (estimated by MinHash) from which two documents are near-duplicates; from 0.06 to 1."""
    filters: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    on_error: OnError = "fail"
    """What to do with a record that is not valid text. fail: stop and report it. skip: count it. quarantine: count it and write it to
    OUTPUT/quarantine.jsonl. After fail, the finished work is kept, and the same command with skip or quarantine resumes it."""
    max_errors: int = 1000
    """Maximum number of invalid records to skip or quarantine; if there are more, the work stops."""
    shard_tokens: int = 2**28
    """Number of tokens after which a new shard begins."""
    unit_megabytes: float | None = None
    """Size of a work unit, in MiB of input: a process reads one unit at a time, and a crash loses at most that (default: 4 to 64, by the
    size of the corpus)."""
    workers: int = 0
    """Number of worker processes; 0: one for each core. The output does not depend on it."""
    rank: int | None = None
    """Index of this node, from 0 (default: the rank that srun sets, else 0). The output does not depend on the number of nodes."""
    world_size: int | None = None
    """Number of nodes that work on this corpus, each with its own rank and the same disk (default: the number that srun sets, else 1)."""

    def validate(self) -> None:
        """Raise UserError if a value is out of range or two settings contradict each other."""
        rank_and_world_size(self)
        partial_folder(Path(self.output))
        self._check_source()
        self._check_tokenizer()
        self._check_ranges()
        check_filters(self.filters)

    def _check_source(self) -> None:
        if self.input and self.dataset:
            raise UserError("--input and --dataset are both given. Give only one of them.")
        if STANDARD_INPUT in self.input:
            if len(self.input) > 1 or self.input_format is None:
                raise UserError("--input - is standard input. It must be the only input, and it needs --input_format.")
            if self.input_format in ("parquet", "arrow"):
                raise UserError(
                    f"--input_format {self.input_format} is not supported for standard input. Supported: txt, jsonl, csv and tsv."
                )
            if rank_and_world_size(self)[1] > 1:
                raise UserError("--input - is standard input, which only one node can read. Give files, or --world_size 1.")
        if self.pair_field == self.text_field:
            raise UserError(f'--pair_field and --text_field are both "{self.pair_field}". Give two different fields.')
        if self.separator is not None and (not self.separator.strip() or set(self.separator) & set("\r\n")):
            raise UserError(f'--separator {self.separator!r} must be "blank", "line" or a marker that is alone on its line.')

    def _check_tokenizer(self) -> None:
        training_options = {
            f"--vocab_size {self.vocab_size}": self.vocab_size != PrepareSettings.vocab_size,
            "--pieces_within_words": self.pieces_within_words,
            "--special_tokens": bool(self.special_tokens),
        }
        for option, is_given in training_options.items():
            if self.tokenizer and is_given:
                raise UserError(
                    f"{option} applies only to a tokenizer that is trained here, but --tokenizer {self.tokenizer} is given. "
                    "Remove one of the two."
                )
        if self.end_of_text and not self.tokenizer:
            raise UserError("--end_of_text applies only to a given --tokenizer; a tokenizer that is trained here has its own.")

    def _check_ranges(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held_out {self.held_out} must be at least 0 and below 1.")
        if self.unit_megabytes is not None and not 0 < self.unit_megabytes < float("inf"):
            raise UserError(f"--unit_megabytes {self.unit_megabytes} must be above 0.")
        if self.vocab_size > _MAX_VOCAB_SIZE:
            raise UserError(f"--vocab_size {self.vocab_size} must be at most {_MAX_VOCAB_SIZE}.")
        minimums = {"vocab_size": 512, "tokenizer_characters": 1, "shard_tokens": 1, "workers": 0, "max_errors": 0}
        for name, minimum in minimums.items():
            if getattr(self, name) < minimum:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {minimum}.")


def rank_and_world_size(settings: PrepareSettings) -> tuple[int, int]:
    """Return (rank, world size) from the settings, else from srun's environment. Raise UserError if they do not fit."""
    rank, size = settings.rank, settings.world_size
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        rank = int(os.environ["SLURM_PROCID"]) if rank is None else rank
        size = int(os.environ["SLURM_STEP_NUM_TASKS"]) if size is None else size
    rank, size = rank or 0, 1 if size is None else size
    if size < 1:
        raise UserError(f"--world_size {size} must be at least 1.")
    if not 0 <= rank < size:
        raise UserError(f"--rank {rank} must be from 0 to {size - 1}, because --world_size is {size}.")
    return rank, size


def partial_folder(output: Path) -> Path:
    """Return the folder that holds the unfinished work of an output folder: OUTPUT.partial."""
    if not output.name:
        raise UserError(f'--output "{output}" is not a valid folder name. Give the name of a new folder.')
    return output.with_name(f"{output.name}.partial")
