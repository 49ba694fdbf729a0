"""The interface of all tokenizers: text to token ids and back."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError, nearest
from data.tokenization.configuration import token_content
from data.tokenization.library_errors import library_errors_as

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Names of tokens that end a document, if a tokenizer does not name one."""
WHERE_END_IS_SET = "--end_of_text of data/prepare.py, or as eos_token in the tokenizer_config.json next to that file"
"""Where a person sets the token that ends a document, for messages: the other scripts have no such option."""
_SHOWN_CHARACTERS = 40  # of a text in an error message
_SENTINEL = re.compile(r"<extra_id_\d+>")


class EncodingError(UserError):
    """A text that a tokenizer's library cannot encode. `reason` names the tokenizer and the library's message."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Tokenizer:
    """A tokenizer: text to token ids and back. The name of a special token in a text is encoded as text, not as the token."""

    path: Path
    """The file that the tokenizer was read from."""
    vocab_size: int
    """Number of ids, which go from 0 to vocab_size - 1."""
    end_of_text: int
    """Id that ends each document."""
    end_of_text_token: str
    """Name of that token."""
    begin_of_text: int | None = None
    """Id of the token that may begin each document; None if the tokenizer has none."""
    begin_of_text_token: str | None = None
    """Name of that token."""
    adds_bos: bool = False
    """True if each document begins with that token."""
    special_tokens: dict[str, int]
    """Ids that no text is encoded to, by the names of their tokens."""
    settings: dict
    """Settings that decide the ids and are not in the file `path`, as in a tokenizer_config.json."""
    engine: str
    """Name and version of the library that encodes."""

    def file_bytes(self) -> bytes:
        """Return the content of the tokenizer's file; if it was read from several files, the content of one equivalent file."""
        return self.path.read_bytes()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin of text and end of text. Raises EncodingError if the library cannot encode it."""
        with library_errors_as(lambda reason: self._encoding_error([text], reason)):
            return self._encode_text(text)

    @property
    def beginning(self) -> list[int]:
        """Ids before the text of each document: begin of text if `adds_bos`, else none."""
        return [self.begin_of_text] if self.adds_bos and self.begin_of_text is not None else []

    def encode_beginning(self, text: str) -> list[int]:
        """Return the ids of a document that begins with a text, without end of text."""
        return self.beginning + self.encode(text)

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int32]]:
        """Return the ids of all texts, each after `beginning` and before end of text, and the length of each.  -> [tokens], [texts]

        Raises EncodingError if the library cannot encode one of the texts.
        """
        with library_errors_as(lambda reason: self._encoding_error(texts, reason)):
            encoded = [np.asarray(ids, dtype) for ids in self._encode_each(texts)]
        return self._join(encoded, dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids. End of text is dropped, and bytes that are not valid UTF-8 become U+FFFD."""
        raise NotImplementedError

    def special_token_id(self, token: str) -> int:
        """Return the id of a special token. Raises UserError, with the nearest name, if there is no such token."""
        if token not in self.special_tokens:
            hint = nearest(token, list(self.special_tokens))
            raise UserError(f'{self.path} has no special token "{token}".{hint} It has: {", ".join(self.special_tokens) or "none"}.')
        return self.special_tokens[token]

    @property
    def special_names(self) -> dict[int, str]:
        """Names of the special tokens and of the tokens that begin and end a text, by id."""
        begin = {self.begin_of_text: self.begin_of_text_token} if self.begin_of_text_token and self.begin_of_text is not None else {}
        return {token: name for name, token in self.special_tokens.items()} | begin | {self.end_of_text: self.end_of_text_token}

    @property
    def sentinels(self) -> dict[str, int]:
        """Ids of the special tokens that T5 puts in place of cut-out spans (<extra_id_0>, <extra_id_1>, ...), by name."""
        return {name: token for name, token in self.special_tokens.items() if _SENTINEL.fullmatch(name)}

    def start_token_id(self, token: str | None) -> int:
        """Return the id that the decoder of an encoder-decoder reads first: that of `token`, or of end of text if it is None."""
        return self.end_of_text if token is None else self.special_token_id(token)

    def word_edges(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which ids begin a word, and which ids are always followed by the beginning of a word.  -> [vocab], [vocab]

        Words are separated by spaces and line ends. A space alone belongs to the text after it. In WordPiece, tokens without ## begin a
        word. A script that is written without spaces has no word boundaries here.
        """
        texts = self._texts_of_ids()
        begins, ends = ([text[part].isspace() for text in texts] for part in (slice(1), slice(-1, None)))
        return np.array(begins), np.array(ends) & np.array([text.strip(" ") != "" for text in texts])

    def _texts_of_ids(self) -> Sequence[str]:
        """Return the text of each id, with a space at its beginning if a word begins there.  [vocab]"""
        raise NotImplementedError

    def _encode_text(self, text: str) -> list[int]:
        """Return the ids of a text, without end of text; errors are the library's own."""
        raise NotImplementedError

    def _encode_each(self, texts: Sequence[str]) -> Iterable[Sequence[int] | NDArray]:
        """Yield the ids of each text, without end of text; errors are the library's own."""
        return map(self._encode_text, texts)

    def _encoding_error(self, texts: Sequence[str], reason: str) -> EncodingError:
        reason = f"{self.path} ({self.engine}): {reason}"
        num_characters = sum(map(len, texts))
        return EncodingError(
            f"The text {texts[0][:_SHOWN_CHARACTERS]!r} ({num_characters:,} characters) cannot be tokenized with {reason}.", reason
        )

    def _join(self, encoded: Sequence[NDArray], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int32]]:
        assert self.vocab_size - 1 <= np.iinfo(dtype).max, f"{self.vocab_size} ids do not fit {dtype}"
        marks = 1 + len(self.beginning)
        lengths = np.fromiter((len(ids) + marks for ids in encoded), np.int32, len(encoded))
        tokens = np.full(lengths.sum(dtype=np.int64), self.end_of_text, dtype)
        if len(encoded):
            is_text = np.ones(len(tokens), dtype=bool)
            ends = np.cumsum(lengths, dtype=np.int64)
            is_text[ends - 1] = False
            if self.beginning:
                is_text[ends - lengths] = False
                tokens[ends - lengths] = self.begin_of_text
            tokens[is_text] = np.concatenate(encoded)
        return tokens, lengths

    def set_beginning(self, configuration: Mapping[str, Any], add_bos: bool | None = None) -> None:
        """Set `begin_of_text` and `adds_bos` from the tokenizer's file and the tokenizer_config.json next to it.

        The first of these decides whether it is added: the argument `add_bos`; `add_bos` of the configuration, which copy_tokenizer
        writes; the file itself; `add_bos_token` of the configuration, as in transformers 5. Raises UserError if it is to be added and
        there is none.
        """
        token, file_adds = self._own_beginning()
        if set(configuration) == {"eos_token"}:  # of a folder by an earlier version, which never added a token
            configuration = {"add_bos": False} | dict(configuration)
        if not file_adds and (name := token_content(configuration.get("bos_token"))) and self._id_of(name) is not None:
            token = name
        stated = configuration.get("add_bos") if add_bos is None else add_bos
        if stated is None:
            stated = configuration.get("add_bos_token") is True if file_adds is None else file_adds
        if token is None and add_bos:
            raise UserError(
                f"--add_bos true needs a token that begins a text, and {self.path} has none: neither the file nor bos_token of a "
                "tokenizer_config.json next to it names one. Use --add_bos false."
            )
        if token is not None:
            self.begin_of_text_token, self.begin_of_text, self.adds_bos = token, self._id_of(token), bool(stated)

    def _own_beginning(self) -> tuple[str | None, bool | None]:
        """Return the token that the file names for the beginning of a text, and whether it is put there; None where it states neither."""
        return None, None

    def _id_of(self, name: str) -> int | None:
        """Return the id of a special token; None if there is no such token."""
        return self.special_tokens.get(name)

    def _set_end(self, token: str, ids: Mapping[str, int]) -> None:
        if token not in ids:
            raise UserError(
                f'{self.path} has no token "{token}" to end a document with.{nearest(token, list(ids))} Set it with {WHERE_END_IS_SET}.'
            )
        self.end_of_text_token, self.end_of_text = token, ids[token]

    def _known_end(self, ids: Mapping[str, int]) -> str:
        token = next((token for token in KNOWN_ENDS if token in ids), None)
        if token is None:
            raise UserError(
                f"{self.path} has none of the tokens {', '.join(KNOWN_ENDS)}. Give the token that ends a document with {WHERE_END_IS_SET}."
            )
        return token
