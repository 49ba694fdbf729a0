"""Learning a SentencePiece vocabulary from texts."""

import io
import itertools
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from data.command_line import UserError
from data.tokenization.tokenizer import END_OF_TEXT

_PAGE_CHARACTERS = 4000  # of one training sentence: long, so that a newline and the text after it can be one piece
_UNIGRAM_PAGES = 500  # at most: the time of "unigram" grows faster than the text (these take 10 seconds, 10 times as many 5 minutes)


class TextTooShort(UserError):
    """A text has too few different pieces for a vocabulary of the wanted size."""

    def __init__(self, vocab_size: int, largest: int) -> None:
        """`largest` is the size that no vocabulary of this text can exceed."""
        self.largest = largest
        super().__init__(
            f"This text is too short to learn {vocab_size} pieces from it. Use a vocab_size of at most {largest}, or give a tokenizer."
        )


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    kind: str = "bpe",
    special_tokens: Sequence[str] = (),
    within_words: bool = False,
) -> None:
    """Learn a vocabulary of `vocab_size` pieces from texts and write it to `path`; kind is "bpe" or "unigram".

    `special_tokens` get the ids after end of text; no text is encoded to them. Characters that are in no piece are encoded as bytes,
    and nothing is normalised, so decoding restores every text. Pieces may contain spaces and newlines ("return self.", or a line's end
    with the indentation of the next line): at 4,096 pieces a token of source code then has 4.2 bytes instead of 3.5 (cf. SuperBPE, Liu
    et al. 2025, arXiv 2503.13423). With `within_words` no piece continues after a space, or from a letter to a digit or another sign.
    Raises UserError if the texts are too short.
    """
    pages = _pages(texts, num_characters=(vocab_size - 258) // 2)
    if kind == "unigram":
        pages = pages[:: len(pages) // _UNIGRAM_PAGES + 1]
    model = io.BytesIO()
    if refused := [token for token in special_tokens if not token or token == END_OF_TEXT or special_tokens.count(token) > 1]:
        raise UserError(f"special_tokens contains {refused[0]!r}; each name must be non-empty, unique and not {END_OF_TEXT}.")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pages),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=within_words,
            split_by_unicode_script=within_words,
            max_sentencepiece_length=32,
            max_sentence_length=4 * _PAGE_CHARACTERS,
            required_chars=string.ascii_letters + string.digits + string.punctuation,  # else a rare capital letter is in no piece
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            control_symbols=list(special_tokens),
            bos_id=-1,
            pad_id=-1,
            num_threads=8,  # fixed: the sums of "unigram" depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _learning_error(error, vocab_size) from error
    Path(path).write_bytes(model.getvalue())


def _pages(texts: Iterable[str], num_characters: int) -> list[str]:
    """Cut texts into pages and keep only the most frequent characters.

    The others become tabs, which SentencePiece puts into no piece: Chinese has more characters than a small vocabulary can hold.
    """
    pages = [text[start : start + _PAGE_CHARACTERS] for text in texts for start in range(0, len(text), _PAGE_CHARACTERS)]
    counts = Counter(itertools.chain.from_iterable(pages))
    rare = {ord(character): "\t" for character, _ in counts.most_common()[num_characters:]}
    return [page.translate(rare) for page in pages] if rare else pages


def _learning_error(error: RuntimeError, vocab_size: int) -> UserError:
    """Return SentencePiece's message in terms of our settings, without the line of its source code."""
    if most := re.search(r"Please set it to a value <= (\d+)", str(error)):
        return TextTooShort(vocab_size, int(most[1]))
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"vocab_size {vocab_size} is too small for the 256 bytes, the characters and the special tokens. Use {least[1]} or more."
        )
    message = str(error).rpartition("] ")[2] or "it is empty. Give more text, or a --tokenizer."
    return UserError(f"A vocabulary of {vocab_size} pieces cannot be learnt from this text: {message}")
