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

_PAGE_CHARACTERS = 4000  # of one training sentence, so that a newline and what follows it can be one piece
_UNIGRAM_PAGES = 500


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    kind: str = "bpe",
    special_tokens: Sequence[str] = (),
    within_words: bool = False,
) -> None:
    """Learn a vocabulary from texts and write it to `path`; kind is "bpe" or "unigram".

    `special_tokens` are among its ids, behind end of text, and no text is encoded to them.

    Whatever is no piece is spelt in bytes, and nothing is normalised, so every text comes back as it was. Pieces may hold
    spaces and newlines ("return self.", a line's end with the next one's indentation): a token of source code is then 4.2
    bytes long instead of 3.5 at 4,096 pieces (cf. SuperBPE, Liu et al. 2025, arXiv 2503.13423). With `within_words` none goes on
    behind a space, or from a letter to a digit or another sign.
    """
    pages = _pages(texts, num_characters=(vocab_size - 258) // 2)
    if kind == "unigram":  # what it takes grows faster than the text: ten seconds for these, five minutes for ten times as many
        pages = pages[:: len(pages) // _UNIGRAM_PAGES + 1]
    model = io.BytesIO()
    if refused := [token for token in special_tokens if not token or token == END_OF_TEXT or special_tokens.count(token) > 1]:
        raise UserError(f"special_tokens holds {refused[0]!r}; each must be a name of its own.")
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
            required_chars=string.ascii_letters + string.digits + string.punctuation,  # else a rare capital is in no piece
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            control_symbols=list(special_tokens),
            bos_id=-1,
            pad_id=-1,
            num_threads=8,  # fixed, because the sums of "unigram" depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_why_not(error, vocab_size)) from error
    Path(path).write_bytes(model.getvalue())


def _pages(texts: Iterable[str], num_characters: int) -> list[str]:
    """Texts by the page, in which only the commonest characters stand for themselves.

    The others, of which Chinese has more than a small vocabulary can hold, become tabs, which SentencePiece puts into no piece.
    """
    pages = [text[start : start + _PAGE_CHARACTERS] for text in texts for start in range(0, len(text), _PAGE_CHARACTERS)]
    counts = Counter(itertools.chain.from_iterable(pages))
    rare = {ord(character): "\t" for character, _ in counts.most_common()[num_characters:]}
    return [page.translate(rare) for page in pages] if rare else pages


def _why_not(error: RuntimeError, vocab_size: int) -> str:
    """SentencePiece's sentence, without the place in its source, in the words of our settings."""
    if most := re.search(r"Please set it to a value <= (\d+)", str(error)):
        return f"This text is too short to learn {vocab_size} pieces from it; vocab_size can be {most[1]} at most. Or give a tokenizer."
    return f"No vocabulary of {vocab_size} pieces can be learnt from this text: {str(error).rpartition('] ')[2] or 'it is empty.'}"
