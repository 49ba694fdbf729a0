"""Opening, speeding up and copying the tokenizer of a file or folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError
from data.tokenization.configuration import CONFIGURATION, configured_end
from data.tokenization.gigatoken_tokenizer import GigatokenTokenizer, texts_to_compare
from data.tokenization.huggingface_tokenizer import HuggingFaceTokenizer, merges_of
from data.tokenization.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenization.tiktoken_tokenizer import TiktokenTokenizer, holds_ranks
from data.tokenization.tokenizer import Tokenizer

_FILE_NAMES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def load_tokenizer(path: str | Path, end_of_text: str | None = None, fast: bool = False, threads: int = 1) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds tokenizer.json, tokenizer.model or a .tiktoken file, or of GPT-2's two files,
    vocab.json and merges.txt (what stands before these names being the same), named by the first or by their folder.

    Which token ends a document: `end_of_text`, else `eos_token` of a tokenizer_config.json beside the file, else the file's own.
    `threads` is how many encode_documents may use, where the library leaves a choice: one, or more. `fast` has gigatoken encode,
    unchecked: for a tokenizer that `fastest` has found to give the same ids with it.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _FILE_NAMES if (path / name).is_file()] + sorted(path.glob("*.tiktoken"))
        found += [file for file in sorted(path.glob("*vocab.json")) if merges_of(file)]
        if not found:
            raise UserError(f"{path} holds neither {' nor '.join(_FILE_NAMES)} nor a .tiktoken file, nor vocab.json with merges.txt.")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file. A tokenizer is a SentencePiece .model, a Hugging Face tokenizer.json or a .tiktoken file.")
    end_of_text = end_of_text or configured_end(path.parent)
    if path.suffix == ".json":
        tokenizer: Tokenizer = HuggingFaceTokenizer(path, end_of_text, threads)
    elif holds_ranks(path):
        tokenizer = TiktokenTokenizer(path, end_of_text)
    else:
        tokenizer = SentencePieceTokenizer(path, end_of_text, threads)
    if not fast:
        return tokenizer
    return GigatokenTokenizer(tokenizer)


def fastest(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[Tokenizer, str]:
    """The tokenizer with gigatoken in front, where that gives the same ids on the sample and on hard texts, else as it was given.

    Of the sample so much is tried as takes a moment. The sentence with it says for the user which it is, and why.
    """
    try:
        fast = GigatokenTokenizer(tokenizer)
    except UserError as error:
        return tokenizer, f"Tokenizing with {tokenizer.engine}: {error}"
    tried = 0
    for text in texts_to_compare(tokenizer, sample):
        if fast.encode(text) != tokenizer.encode(text):
            return tokenizer, f"Tokenizing with {tokenizer.engine}: gigatoken gives other ids, for {text[:60]!r} among others."
        tried += 1
    return fast, f"Tokenizing with {fast.engine}, whose ids for {tried} texts were those of {tokenizer.engine}."


def copy_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Put a tokenizer's file into a folder under a name that load_tokenizer looks for, with what the file does not hold beside it."""
    suffix = tokenizer.path.suffix
    name = (
        "tokenizer.json" if suffix == ".json" else f"{tokenizer.path.stem}.tiktoken" if holds_ranks(tokenizer.path) else "tokenizer.model"
    )
    copy = Path(folder) / name
    if not copy.exists() or not copy.samefile(tokenizer.path):
        copy.write_bytes(tokenizer.file_bytes())
    settings = {"eos_token": tokenizer.end_of_text_token} | tokenizer.settings
    (Path(folder) / CONFIGURATION).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
    return copy
