"""The interface of all tokenizers: text to token ids and back."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError, nearest

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Names of tokens that end a document, if a tokenizer does not name one."""
_SENTINEL = re.compile(r"<extra_id_\d+>")


class Tokenizer:
    """Ids from 0 to vocab_size - 1, of which `end_of_text` ends each document. A special token written in a text stays text."""

    path: Path
    vocab_size: int
    end_of_text: int
    end_of_text_token: str
    special_tokens: dict[str, int]
    """Ids that no text is encoded to, by name."""
    settings: dict
    """What decides the ids and is not in the file `path`, as it stands in a tokenizer_config.json."""
    engine: str
    """The library that encodes, and its version."""

    def file_bytes(self) -> bytes:
        """What its file holds, or would hold where it was given as several."""
        return self.path.read_bytes()

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int32]]:
        """The ids of all texts, each text's followed by end of text, and how many each has with it.  -> [tokens], [texts]"""
        return self._join([np.asarray(ids, dtype) for ids in self._encode_each(texts)], dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; end of text has none, and bytes that are no UTF-8 become U+FFFD."""
        raise NotImplementedError

    def special_token_id(self, token: str) -> int:
        if token not in self.special_tokens:
            hint = nearest(token, list(self.special_tokens))
            raise UserError(f'{self.path} has no special token "{token}".{hint} It has: {", ".join(self.special_tokens) or "none"}.')
        return self.special_tokens[token]

    @property
    def special_names(self) -> dict[int, str]:
        """Of special tokens and what ends a document, by id."""
        return {token: name for name, token in self.special_tokens.items()} | {self.end_of_text: self.end_of_text_token}

    @property
    def sentinels(self) -> dict[str, int]:
        """T5's names of what was cut out of a text, <extra_id_0> and so on, as far as they are special tokens, by name."""
        return {name: token for name, token in self.special_tokens.items() if _SENTINEL.fullmatch(name)}

    def start_token_id(self, token: str | None) -> int:
        """Of what a decoder behind an encoder reads before its first target; None: of what ends a document."""
        return self.end_of_text if token is None else self.special_token_id(token)

    def word_edges(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which ids begin a word, and behind which another word begins whatever comes: at spaces and line ends.  -> [vocab], [vocab]

        A space alone belongs to what follows. Of WordPiece a word begins where ## does not stand. A script that is written without
        spaces has no words here.
        """
        spelt = self._spellings()
        begins, ends = ([text[place].isspace() for text in spelt] for place in (slice(1), slice(-1, None)))
        return np.array(begins), np.array(ends) & np.array([text.strip(" ") != "" for text in spelt])

    def _spellings(self) -> Sequence[str]:
        """What each id stands for, with a space at its beginning where a word begins there.  [vocab]"""
        raise NotImplementedError

    def _encode_each(self, texts: Sequence[str]) -> Iterable[Sequence[int] | NDArray]:
        return map(self.encode, texts)

    def _join(self, encoded: Sequence[NDArray], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int32]]:
        assert self.vocab_size - 1 <= np.iinfo(dtype).max, f"{self.vocab_size} ids do not fit {dtype}"
        lengths = np.fromiter((len(ids) + 1 for ids in encoded), np.int32, len(encoded))
        tokens = np.full(lengths.sum(dtype=np.int64), self.end_of_text, dtype)
        if len(encoded):
            is_text = np.ones(len(tokens), dtype=bool)
            is_text[np.cumsum(lengths, dtype=np.int64) - 1] = False
            tokens[is_text] = np.concatenate(encoded)
        return tokens, lengths

    def _set_end(self, token: str, ids: Mapping[str, int]) -> None:
        if token not in ids:
            raise UserError(
                f'{self.path} has no token "{token}" to end a document with.{nearest(token, list(ids))} Set with --end_of_text.'
            )
        self.end_of_text_token, self.end_of_text = token, ids[token]

    def _known_end(self, ids: Mapping[str, int]) -> str:
        token = next((token for token in KNOWN_ENDS if token in ids), None)
        if token is None:
            raise UserError(f"{self.path}: none of {', '.join(KNOWN_ENDS)} is in it. Say with --end_of_text which token ends a document.")
        return token
