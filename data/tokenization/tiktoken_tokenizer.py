"""The tokenizer of a .tiktoken vocabulary."""

import base64
import binascii
import re
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tiktoken
from numpy.typing import NDArray
from tiktoken_ext import openai_public

from data.command_line import UserError
from data.files import sha256_of
from data.tokenization.configuration import CONFIGURATION, read_configuration
from data.tokenization.library_errors import library_errors_as
from data.tokenization.tokenizer import Tokenizer

# The library splits with a backtracking engine whose stack has a million entries: one for each character of a run of white space, or two.
_LONG_RUN_CHARACTERS = 400_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_LONG_RUN_CHARACTERS},}}")  # the lookbehind makes a search linear
_LONGEST_LINE = 1000  # of a tiktoken vocabulary that is looked at to tell what it is


class TiktokenTokenizer(Tokenizer):
    """The tokenizer of a `.tiktoken` vocabulary, which has a line for each token: its bytes in base64 and its rank.

    The file does not hold the pattern that splits a text, nor the special tokens. They come from a tokenizer_config.json next to it:
    `pat_str`, as tiktoken calls the pattern, and `added_tokens_decoder`, {"ID": {"content": "TOKEN"}}, as Hugging Face's files
    for Llama 3 and Kimi have it. For the files that OpenAI publishes they come from the tiktoken library, by the file's name.
    """

    def __init__(self, path: Path, end_of_text: str | None) -> None:
        self.path, self.engine = path, f"tiktoken {tiktoken.__version__}"
        self.ranks = ranks = _read_ranks(path)
        configured = read_configuration(path.parent)
        if "pat_str" in configured:
            pattern, self.special_tokens = configured["pat_str"], _added_tokens(configured)
        else:
            pattern, self.special_tokens = _definition_of_name(path, ranks)
        if duplicates := [token for token, number in self.special_tokens.items() if number in ranks.values()]:
            raise UserError(f"{path.with_name(CONFIGURATION)}: the id of {duplicates[0]} is also the id of a token in {path.name}.")
        with library_errors_as(lambda reason: UserError(f"{path} cannot be loaded: {reason}.")):
            self._model = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens)
        self.settings = {
            "pat_str": pattern,
            "added_tokens_decoder": {str(number): {"content": token, "special": True} for token, number in self.special_tokens.items()},
        }
        self.vocab_size = self._model.n_vocab
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._set_end(end_of_text or self._known_end(self.special_tokens), self.special_tokens)

    def _encode_text(self, text: str) -> list[int]:
        ids = self._encode_long_runs(text) if len(text) >= _LONG_RUN_CHARACTERS and _LONG_RUN.search(text) else None
        return self._model.encode_ordinary(text) if ids is None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without end of text."""
        return b"".join(self._bytes.get(int(token), b"") for token in ids).decode("utf-8", errors="replace")

    def _texts_of_ids(self) -> list[str]:
        return [self._bytes.get(token, b"").decode("utf-8", "replace") for token in range(self.vocab_size)]

    def _encode_each(self, texts: Sequence[str]) -> Iterable[Sequence[int] | NDArray]:
        for text in texts:
            is_long = len(text) >= _LONG_RUN_CHARACTERS
            yield self._encode_text(text) if is_long else self._model.encode_to_numpy(text, disallowed_special=())

    def _encode_long_runs(self, text: str) -> list[int] | None:
        """Return the ids of a text with long runs of white space, or None if it cannot be split in this way.

        The library also offers to split with the `regex` package, which needs no stack. A pattern may mean something else there, so both
        ways are compared on the same text with shorter runs.
        """
        shorter = _LONG_RUN.sub(lambda run: run[0][:1000] + run[0][-1000:], text)
        try:
            is_equal = self._model._encode_only_native_bpe(shorter) == self._model.encode_ordinary(shorter)
        except Exception:  # `regex` cannot read the pattern, for example
            is_equal = False
        return self._model._encode_only_native_bpe(text) if is_equal else None


def holds_ranks(path: Path) -> bool:
    """Return True if a file is a tiktoken vocabulary. Llama 3 names it tokenizer.model, and Kimi tiktoken.model."""
    with open(path, "rb") as file:
        return path.suffix == ".tiktoken" or re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(_LONGEST_LINE)) is not None


def _added_tokens(configuration: dict) -> dict[str, int]:
    return {entry["content"]: int(number) for number, entry in configuration.get("added_tokens_decoder", {}).items()}


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}, line {number}: invalid line. Each line of a tiktoken vocabulary is a token in base64 and its rank."
            ) from error
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks):
        raise UserError(f"{path} is not a complete tiktoken vocabulary: {len(missing)} of the 256 bytes are missing.")
    return ranks


def published_pattern(name: str) -> str | None:
    """Return the pattern that splits text in OpenAI's vocabulary of this name; None if OpenAI publishes no such vocabulary."""
    definition = _published_definition(name, lambda url, expected_hash: {})
    return definition["pat_str"] if definition else None


def _definition_of_name(path: Path, ranks: dict[bytes, int]) -> tuple[str, dict[str, int]]:
    """Return the pattern and the special tokens of a vocabulary that OpenAI publishes."""

    def load(url: str, expected_hash: str) -> dict[bytes, int]:
        """Return the ranks in place of those at the URL, if the file is the published one."""
        if sha256_of(path) != expected_hash:
            raise UserError(f"{path} is not the file of this name that OpenAI publishes: its sha256 is not {expected_hash}.")
        return ranks

    definition = _published_definition(path.stem, load)
    if definition is None:
        raise UserError(
            f"{path} does not contain the pattern that splits a text into words, and the tiktoken library does not know its name. "
            f'Put "pat_str" and "added_tokens_decoder" into {path.with_name(CONFIGURATION)}.'
        )
    return definition["pat_str"], definition["special_tokens"]


def _published_definition(name: str, load: Callable[[str, str], dict[bytes, int]]) -> dict | None:
    """Return the tiktoken library's definition of a vocabulary; `load` replaces the function that would download its file."""
    constructor = openai_public.ENCODING_CONSTRUCTORS.get(name)
    if constructor is None or "load_tiktoken_bpe" not in constructor.__code__.co_names:
        return None
    # The library's own function, with its function for downloads replaced.
    return types.FunctionType(constructor.__code__, constructor.__globals__ | {"load_tiktoken_bpe": load})()
