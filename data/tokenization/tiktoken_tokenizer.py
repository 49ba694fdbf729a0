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
from data.tokenization.tokenizer import Tokenizer

_LONGEST_LINE = 1000  # of a tiktoken vocabulary that is looked at to tell what it is


class TiktokenTokenizer(Tokenizer):
    """A `.tiktoken` vocabulary: a line for each token, in base64, with its rank.

    How text is split before, and the special tokens, the file does not hold. They come from a tokenizer_config.json beside it:
    `pat_str`, as tiktoken calls the pattern, and `added_tokens_decoder`, {"ID": {"content": "TOKEN"}}, as Hugging Face's files
    for Llama 3 and Kimi have it. For the files that OpenAI publishes, known by name, they come from the library.
    """

    def __init__(self, path: Path, end_of_text: str | None) -> None:
        self.path, self.engine = path, f"tiktoken {tiktoken.__version__}"
        self.ranks = ranks = _read_ranks(path)
        configured = read_configuration(path.parent)
        if "pat_str" in configured:
            pattern, self.special_tokens = configured["pat_str"], _added_tokens(configured)
        else:
            pattern, self.special_tokens = _definition_of_name(path, ranks)
        if doubled := [token for token, number in self.special_tokens.items() if number in ranks.values()]:
            raise UserError(f"{path.with_name(CONFIGURATION)}: the id of {doubled[0]} is a token of {path.name} too.")
        try:
            self._model = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens)
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"{path} cannot be loaded: {error}.") from error
        self.settings = {
            "pat_str": pattern,
            "added_tokens_decoder": {str(number): {"content": token, "special": True} for token, number in self.special_tokens.items()},
        }
        self.vocab_size = self._model.n_vocab
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._set_end(end_of_text or self._known_end(self.special_tokens), self.special_tokens)

    def encode(self, text: str) -> list[int]:
        return self._model.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(int(token), b"") for token in ids).decode("utf-8", errors="replace")

    def _spellings(self) -> list[str]:
        return [self._bytes.get(token, b"").decode("utf-8", "replace") for token in range(self.vocab_size)]

    def _encode_each(self, texts: Sequence[str]) -> Iterable[NDArray]:
        return (self._model.encode_to_numpy(text, disallowed_special=()) for text in texts)


def holds_ranks(path: Path) -> bool:
    """Whether a file is a tiktoken vocabulary, which Llama 3 calls tokenizer.model and Kimi tiktoken.model."""
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
            raise UserError(f"{path}, line {number}: a line of a tiktoken vocabulary is a token in base64 and its rank.") from error
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks):
        raise UserError(f"{path} is no whole tiktoken vocabulary: {len(missing)} of the 256 bytes are not in it.")
    return ranks


def published_pattern(name: str) -> str | None:
    """How text is split in the vocabulary of this name that OpenAI publishes; None where it publishes none."""
    definition = _published_definition(name, lambda url, expected_hash: {})
    return definition["pat_str"] if definition else None


def _definition_of_name(path: Path, ranks: dict[bytes, int]) -> tuple[str, dict[str, int]]:
    """Pattern and special tokens of a vocabulary that OpenAI publishes."""

    def load(url: str, expected_hash: str) -> dict[bytes, int]:
        if sha256_of(path) != expected_hash:
            raise UserError(f"{path} is not the file of this name that OpenAI publishes: its sha256 is not {expected_hash}.")
        return ranks

    definition = _published_definition(path.stem, load)
    if definition is None:
        raise UserError(
            f"{path} does not say how text is split into words, and it bears no name that the tiktoken library knows. "
            f'Put "pat_str" and "added_tokens_decoder" into {path.with_name(CONFIGURATION)}.'
        )
    return definition["pat_str"], definition["special_tokens"]


def _published_definition(name: str, load: Callable[[str, str], dict[bytes, int]]) -> dict | None:
    """What the tiktoken library says of a vocabulary, with `load` for what would read its file from the network."""
    constructor = openai_public.ENCODING_CONSTRUCTORS.get(name)
    if constructor is None or "load_tiktoken_bpe" not in constructor.__code__.co_names:
        return None
    # The library's own function, in which one name means another function.
    return types.FunctionType(constructor.__code__, constructor.__globals__ | {"load_tiktoken_bpe": load})()
