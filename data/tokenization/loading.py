"""Opening, speeding up and copying the tokenizer of a file or folder."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError
from data.tokenization.companions import copy_companions, published_configuration, role_tokens
from data.tokenization.configuration import configured_end, read_configuration
from data.tokenization.gigatoken_tokenizer import GigatokenTokenizer, texts_to_compare
from data.tokenization.huggingface_tokenizer import HuggingFaceTokenizer, merges_of
from data.tokenization.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenization.tiktoken_tokenizer import TiktokenTokenizer, holds_ranks
from data.tokenization.tokenizer import EncodingError, Tokenizer

_FILE_NAMES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def load_tokenizer(
    path: str | Path, end_of_text: str | None = None, fast: bool = False, threads: int = 1, add_bos: bool | None = None
) -> Tokenizer:
    """Return the tokenizer of a file or folder. Raises UserError if there is none.

    `path` is a SentencePiece model, a tokenizer.json, a .tiktoken file, the first of GPT-2's two files (PREFIXvocab.json and
    PREFIXmerges.txt), or a folder that holds one of them. A document ends with the token `end_of_text`, else with `eos_token` of a
    tokenizer_config.json next to the file, else with the file's own. `add_bos` determines whether it begins with the begin-of-text token
    (default: as the files state, see Tokenizer.set_beginning). `threads` is 1, or the number of threads that encode_documents may use
    if the library has a choice. `fast` encodes with gigatoken, without a check: use it for a tokenizer for which `fastest` has found
    the same ids.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _FILE_NAMES if (path / name).is_file()] + sorted(path.glob("*.tiktoken"))
        found += [file for file in sorted(path.glob("*vocab.json")) if merges_of(file)]
        if not found:
            raise UserError(
                f"{path} contains no tokenizer: none of {', '.join(_FILE_NAMES)}, a .tiktoken file, or vocab.json with merges.txt."
            )
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"{path}: no such file. Give a SentencePiece .model, a Hugging Face tokenizer.json or a .tiktoken file as the tokenizer."
        )
    end_of_text = end_of_text or configured_end(path.parent)
    if path.suffix == ".json":
        tokenizer: Tokenizer = HuggingFaceTokenizer(path, end_of_text, threads)
    elif holds_ranks(path):
        tokenizer = TiktokenTokenizer(path, end_of_text)
    else:
        tokenizer = SentencePieceTokenizer(path, end_of_text, threads)
    configuration = role_tokens(path.parent) | read_configuration(path.parent)
    sibling = path.with_name("tokenizer.json")
    if path.suffix != ".json" and sibling.is_file() and {"add_bos", "add_bos_token"}.isdisjoint(configuration):
        with contextlib.suppress(UserError):
            configuration["add_bos_token"] = load_tokenizer(sibling).adds_bos  # transformers reads it in place of this file
    tokenizer.set_beginning(configuration, add_bos)
    return GigatokenTokenizer(tokenizer) if fast else tokenizer


def fastest(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[Tokenizer, str]:
    """Return the tokenizer accelerated by gigatoken if that gives the same ids, else the given one, and a message that names the reason.

    The ids are compared on a part of the sample that takes a moment, and on texts that are hard to tokenize.
    """
    try:
        fast = GigatokenTokenizer(tokenizer)
    except UserError as error:
        return tokenizer, f"Tokenizing with {tokenizer.engine}: {error}"
    num_compared = 0
    for text in texts_to_compare(tokenizer, sample):
        with contextlib.suppress(EncodingError):  # a document that the tokenizer cannot encode is reported where it is read
            if fast.encode(text) != tokenizer.encode(text):
                return tokenizer, f"Tokenizing with {tokenizer.engine}: gigatoken gives other ids, for {text[:60]!r} among others."
            num_compared += 1
    return fast, f"Tokenizing with {fast.engine}, whose ids for {num_compared} texts are those of {tokenizer.engine}."


def copy_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Copy a tokenizer's file into a folder, under a name that load_tokenizer looks for, with the files that belong to it.

    Its tokenizer_config.json is copied without code, with the tokenizer's begin and end of text and settings.
    """
    suffix = tokenizer.path.suffix
    name = (
        "tokenizer.json" if suffix == ".json" else f"{tokenizer.path.stem}.tiktoken" if holds_ranks(tokenizer.path) else "tokenizer.model"
    )
    copy = Path(folder) / name
    if not copy.exists() or not copy.samefile(tokenizer.path):
        copy.write_bytes(tokenizer.file_bytes())
    configuration = published_configuration(tokenizer.path.parent) | tokenizer.settings
    roles = {"eos_token": tokenizer.end_of_text_token}
    if tokenizer.begin_of_text_token is not None or suffix == ".json":
        configuration |= {"add_bos": tokenizer.adds_bos}
    if tokenizer.begin_of_text_token is not None:
        roles |= {"bos_token": tokenizer.begin_of_text_token}
    copy_companions(tokenizer.path.parent, Path(folder), configuration, roles)
    return copy
