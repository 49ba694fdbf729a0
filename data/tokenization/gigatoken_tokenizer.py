"""gigatoken as the fast path of another tokenizer, for which it gives the same ids."""

import importlib.metadata
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import gigatoken
import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.tokenization.conversion import convert
from data.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenization.library_errors import is_library_error, library_errors_as
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer, read_model
from data.tokenization.tiktoken_tokenizer import TiktokenTokenizer, published_pattern
from data.tokenization.tokenizer import Tokenizer

_SCHEMES = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}  # gigatoken's names for tiktoken's patterns
# Other normalizers depend on the version of Unicode; with SentencePiece's tables gigatoken drops U+0737 next to some characters.
_SUPPORTED_NORMALIZERS = {"NFC", "Prepend", "Replace"}
_SAMPLE_CHARACTERS = 300_000
_PLANES = ((0x20, 0x250), (0x250, 0x2000), (0x2000, 0x3100), (0x3100, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000))
# gigatoken's cache of words grows without bound, by 90 bytes a word (its issue 36), so the tokenizer is rebuilt after this many.
CACHED_CHARACTERS = 100_000_000


class GigatokenTokenizer(Tokenizer):
    """A tokenizer that encodes with gigatoken, on one thread. Raises UserError if gigatoken cannot load it.

    gigatoken encodes the name of a special token in a text as the token, and the character U+2581 as a SentencePiece model's space.
    It also uses a newer version of Unicode to find letters and composed characters. Texts with one of these are encoded by the
    original tokenizer.
    """

    def __init__(self, reference: Tokenizer) -> None:
        self.reference = reference
        self.path, self.vocab_size, self.settings = reference.path, reference.vocab_size, reference.settings
        self.end_of_text, self.end_of_text_token = reference.end_of_text, reference.end_of_text_token
        self.begin_of_text, self.begin_of_text_token, self.adds_bos = (
            reference.begin_of_text,
            reference.begin_of_text_token,
            reference.adds_bos,
        )
        self.special_tokens = reference.special_tokens
        self.engine = f"gigatoken {importlib.metadata.version('gigatoken')}"
        normalizers = _normalizers(reference)
        if others := sorted(normalizers - _SUPPORTED_NORMALIZERS):
            raise UserError(f"gigatoken is not used for {reference.path}, which normalises text ({', '.join(others)}).")
        self._composes = "NFC" in normalizers
        self._load = _loader(reference)
        self._rebuild()
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[list(self.special_tokens.values())] = True
        self._assigned: set[str] = set()

    def _encode_text(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without end of text."""
        return self.reference.decode(ids)

    def _encode_each(self, texts: Sequence[str]) -> Iterator[NDArray]:
        return map(self._encode, texts)

    def _encode(self, text: str) -> NDArray:
        if self._has_same_ids(text):
            if self._cached_characters > CACHED_CHARACTERS:
                self._rebuild()
            self._cached_characters += len(text)
            try:
                ids = self._fast.encode(text)
                if not self._is_special[ids].any():
                    return ids
            except BaseException as error:
                if not is_library_error(error):
                    raise
                self._rebuild()  # the error may have left it half changed
        return np.array(self.reference.encode(text), dtype=np.uint32)

    def _has_same_ids(self, text: str) -> bool:
        """Return True if gigatoken gives the same ids for a text, special tokens aside."""
        if text.isascii():
            return True
        if isinstance(self.reference, SentencePieceTokenizer):
            return SPACE not in text
        return self._is_assigned(text) and (not self._composes or unicodedata.is_normalized("NFC", text))

    def _is_assigned(self, text: str) -> bool:
        """Return True if this Python's Unicode has all characters: letters and composition only change for new ones."""
        unchecked = set(text) - self._assigned
        self._assigned |= {character for character in unchecked if unicodedata.category(character) != "Cn"}
        return unchecked <= self._assigned

    def _rebuild(self) -> None:
        """Build gigatoken's tokenizer with an empty cache."""
        with library_errors_as(lambda reason: UserError(f"gigatoken cannot load {self.path}: {reason}.")):
            self._fast, self._cached_characters = self._load(), 0


def _loader(reference: Tokenizer) -> Callable[[], gigatoken.Tokenizer]:
    """Return a function that builds gigatoken's tokenizer."""
    if isinstance(reference, HuggingFaceTokenizer):
        contents: str | bytes = reference.file_bytes()
        return lambda: gigatoken.Tokenizer.from_json(contents)
    if isinstance(reference, TiktokenTokenizer):
        pattern = reference.settings["pat_str"]
        scheme = next((scheme for name, scheme in _SCHEMES.items() if published_pattern(name) == pattern), None)
        if scheme is None:
            raise UserError(f"gigatoken does not support the pattern with which {reference.path} splits text.")
        return lambda: gigatoken.Tokenizer.from_tiktoken(reference.path, scheme, reference.special_tokens)
    model = read_model(reference.path)
    # If pieces cross spaces, gigatoken cannot cache words; then our conversion is 1.5 times as fast.
    if model.trainer_spec.model_type == model.trainer_spec.BPE and not model.trainer_spec.split_by_whitespace:
        contents = convert(reference).to_str()
        return lambda: gigatoken.Tokenizer.from_json(contents)
    contents = reference.path.read_bytes()
    return lambda: gigatoken.Tokenizer.from_sentencepiece(contents)


def _normalizers(reference: Tokenizer) -> set[str]:
    """Return the names of the normalizers that a tokenizer applies to a text."""
    if isinstance(reference, HuggingFaceTokenizer):
        return reference.normalizers
    if isinstance(reference, SentencePieceTokenizer):
        normalizer = read_model(reference.path).normalizer_spec
        return {normalizer.name or "by a table"} if normalizer.precompiled_charsmap else set()
    return set()


def texts_to_compare(tokenizer: Tokenizer, sample: Sequence[str]) -> Iterator[str]:
    """Yield the beginning of a sample, and texts on which tokenizers differ: characters of every plane, long runs, unusual spaces."""
    left = _SAMPLE_CHARACTERS
    for text in sample:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            break
    yield from texts_of_many_kinds(tokenizer)
    draw = random.Random(0)
    for first, last in _PLANES:
        for _ in range(10):
            yield "".join(chr(draw.randrange(first, last)) for _ in range(200))
    everything = [chr(code) for first, last in _PLANES[:4] for code in range(first, last)]
    draw.shuffle(everything)
    yield from ("".join(everything[start : start + 500]) for start in range(0, len(everything), 500))
    for run in ("a", " ", "\n", "=", "é", "汉", "1", "\u0301", "\U0001f600", "ab ", " \n", "'s"):
        yield "x" + run * 3000 + "y"
        yield run * 700
    spaces = " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
    for _ in range(100):
        yield "".join(draw.choice([*spaces, "a", "B", "1", ".", "'ll", "'LL", "ſ", "\u0301"]) for _ in range(30))
