"""Simple filters on the text of one document, which drop text that is too short, too noisy or too repetitive.

Gopher: Rae et al. 2021, arXiv 2112.11446, appendix A1.1.  C4: Raffel et al. 2020, arXiv 1910.10683, section 2.2.
Words are separated by white space; CJK ideographs and kana, which are written without spaces, are one word each.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import pairwise
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True)
class FilterSettings:
    """Limits for each document, all inclusive. A limit that is not set is not computed and costs no time."""

    min_characters: Annotated[int, Ge(0)] | None = None
    """Minimum number of characters."""
    max_characters: Annotated[int, Ge(0)] | None = None
    """Maximum number of characters."""
    min_words: Annotated[int, Ge(0)] | None = None
    """Minimum number of words. Gopher: 50."""
    max_words: Annotated[int, Ge(0)] | None = None
    """Maximum number of words. Gopher: 100000."""
    min_mean_word_length: Annotated[float, Ge(0)] | None = None
    """Minimum mean number of characters in a word. Gopher: 3. Not for Chinese or Japanese, where each character is a word."""
    max_mean_word_length: Annotated[float, Ge(0)] | None = None
    """Maximum mean number of characters in a word. Gopher: 10."""
    max_symbol_share: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum ratio of # signs to words, and of ellipses (... or …) to words; from 0 to 1. Gopher: 0.1."""
    min_alphabetic_share: Annotated[float, Ge(0), Le(1)] | None = None
    """Minimum fraction of words that contain a letter, from 0 to 1. Gopher: 0.8."""
    max_bullet_lines: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum fraction of lines that begin with a bullet or a dash, from 0 to 1; empty lines do not count. Gopher: 0.9."""
    max_ellipsis_lines: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum fraction of lines that end in an ellipsis, from 0 to 1; empty lines do not count. Gopher: 0.3."""
    min_stop_words: Annotated[int, Ge(0)] | None = None
    """Minimum number of different words among: the, be, to, of, and, that, have, with. Gopher: 2. For English only."""
    max_repeated_lines: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum fraction of lines that repeat an earlier line of the document, from 0 to 1; empty lines do not count. Gopher: 0.3."""
    max_repeated_line_characters: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum fraction of characters in lines that repeat an earlier line, from 0 to 1. Gopher: 0.2."""
    max_repeated_paragraphs: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum fraction of paragraphs (separated by empty lines) that repeat an earlier paragraph, from 0 to 1. Gopher: 0.3."""
    max_top_bigram: Annotated[float, Ge(0), Le(1)] | None = None
    """Maximum fraction of the words' characters that are in the most frequent pair of neighbouring words, if it occurs more than once; from
    0 to 1. Gopher: 0.2."""
    min_sentences: Annotated[int, Ge(0)] | None = None
    """Minimum number of sentences, counted by their ends. C4: 3."""
    max_curly_brackets: Annotated[int, Ge(0)] | None = None
    """Maximum number of { signs, which are frequent in programs and rare in prose. C4: 0."""
    max_lorem_ipsum: Annotated[int, Ge(0)] | None = None
    """Maximum number of occurrences of "lorem ipsum". C4: 0."""

    def minimums_above_maximums(self) -> list[tuple[str, str]]:
        """Return (name of the minimum, name of the maximum) of each pair that no document can satisfy."""
        limits = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}
        pairs = [(name, name.replace("min_", "max_")) for name in limits if name.startswith("min_")]
        return [(minimum, maximum) for minimum, maximum in pairs if maximum in limits and limits[minimum] > limits[maximum]]


def reason_to_drop(text: str, filters: FilterSettings) -> str | None:
    """Return the name of the first setting, in the order of FilterSettings, whose limit the text exceeds, or None."""
    views = _TextViews(text)
    for name, measure, limit in _limits(filters):
        excess = measure(views) - limit
        if (excess < 0) if name.startswith("min_") else (excess > 0):
            return name
    return None


class _TextViews:
    """A text cut into words and lines; each view is computed when it is first used."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Words of the text; each CJK ideograph and kana is a word."""
        if self.text.isascii():
            return self.text.split()
        return UNSPACED_CHARACTERS.sub(lambda run: f" {' '.join(run[0])} ", self.text).split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty, without white space around them."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def repeated_lines(self) -> list[str]:
        """Lines that repeat an earlier line."""
        return _repeated(self.lines)


# Scripts without spaces between words: kana, CJK ideographs with their extensions.
UNSPACED_CHARACTERS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LETTER = re.compile(r"[^\W\d_]")
_BULLETS = ("-", "*", "•", "‣", "◦", "▪", "·", "–")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_EMPTY_LINES = re.compile(r"\n\s*\n")
# A full stop ends a sentence if white space follows (after closing quotes and brackets); a Chinese or Japanese full stop always does.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?!\S)|[。！？]+""")
_LOREM_IPSUM = re.compile("lorem ipsum", re.IGNORECASE)


def _repeated(pieces: list[str]) -> list[str]:
    """Return the pieces that repeat an earlier piece."""
    seen: set[str] = set()
    repeated = []
    for piece in pieces:
        if piece in seen:
            repeated.append(piece)
        seen.add(piece)
    return repeated


def _fraction(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean_word_length(views: _TextViews) -> float:
    return _fraction(sum(map(len, views.words)), len(views.words))


def _symbol_share(views: _TextViews) -> float:
    text = views.text
    return _fraction(max(text.count("#"), text.count("...") + text.count("…")), len(views.words))


def _alphabetic_share(views: _TextViews) -> float:
    return _fraction(sum(1 for word in views.words if word.isalpha() or _LETTER.search(word)), len(views.words))


def _bullet_lines(views: _TextViews) -> float:
    return _fraction(sum(line.startswith(_BULLETS) for line in views.lines), len(views.lines))


def _ellipsis_lines(views: _TextViews) -> float:
    return _fraction(sum(line.endswith(("...", "…")) for line in views.lines), len(views.lines))


def _stop_words(views: _TextViews) -> int:
    return len({word.strip(string.punctuation).lower() for word in set(views.words)} & _STOP_WORDS)


def _repeated_lines(views: _TextViews) -> float:
    return _fraction(len(views.repeated_lines), len(views.lines))


def _repeated_line_characters(views: _TextViews) -> float:
    return _fraction(sum(map(len, views.repeated_lines)), sum(map(len, views.lines)))


def _repeated_paragraphs(views: _TextViews) -> float:
    paragraphs = [paragraph for paragraph in map(str.strip, _EMPTY_LINES.split(views.text)) if paragraph]
    return _fraction(len(_repeated(paragraphs)), len(paragraphs))


def _top_bigram(views: _TextViews) -> float:
    pairs = Counter(pairwise(views.words))
    highest = max(pairs.values(), default=0)
    if highest < 2:
        return 0.0
    length = max(len(first) + len(second) for (first, second), count in pairs.items() if count == highest)
    return min(1.0, length * highest / sum(map(len, views.words)))  # "ha ha ha" contains its pair twice, in three words


_MEASURES: dict[str, Callable[[_TextViews], float]] = {
    "characters": lambda views: len(views.text),
    "words": lambda views: len(views.words),
    "mean_word_length": _mean_word_length,
    "stop_words": _stop_words,
    "sentences": lambda views: len(_SENTENCE_END.findall(views.text)),
    "curly_brackets": lambda views: views.text.count("{"),
    "lorem_ipsum": lambda views: len(_LOREM_IPSUM.findall(views.text)),
    "symbol_share": _symbol_share,
    "alphabetic_share": _alphabetic_share,
    "bullet_lines": _bullet_lines,
    "ellipsis_lines": _ellipsis_lines,
    "repeated_lines": _repeated_lines,
    "repeated_line_characters": _repeated_line_characters,
    "repeated_paragraphs": _repeated_paragraphs,
    "top_bigram": _top_bigram,
}


@cache
def _limits(filters: FilterSettings) -> list[tuple[str, Callable[[_TextViews], float], float]]:
    """Return (name, function that measures a text, limit) of each limit that is set."""
    limits = ((field.name, getattr(filters, field.name)) for field in fields(filters))
    return [(name, _MEASURES[name.partition("_")[2]], limit) for name, limit in limits if limit is not None]
