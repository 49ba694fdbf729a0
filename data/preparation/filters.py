"""Simple filters on the text of one document: what is too short, too strange or too repetitive to learn from.

Gopher: Rae et al. 2021, arXiv 2112.11446, appendix A1.1.  C4: Raffel et al. 2020, arXiv 1910.10683, section 2.2.
Words are what white space parts; CJK ideographs and kana, which it does not part, are a word each.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import pairwise

from data.command_line import UserError


@dataclass(frozen=True)
class FilterSettings:
    """Limits that a document has to keep, each inclusive; those not given are not looked at, and cost nothing."""

    min_characters: int | None = None
    """Fewest characters."""
    max_characters: int | None = None
    """Most characters."""
    min_words: int | None = None
    """Fewest words. Gopher: 50."""
    max_words: int | None = None
    """Most words. Gopher: 100000."""
    min_mean_word_length: float | None = None
    """Fewest characters a word, on average. Gopher: 3. Not for Chinese or Japanese, where a character is a word."""
    max_mean_word_length: float | None = None
    """Most characters a word, on average. Gopher: 10."""
    max_symbol_share: float | None = None
    """Most # signs a word, or ellipses a word (... or …), whichever are more; from 0 to 1. Gopher: 0.1."""
    min_alphabetic_share: float | None = None
    """Least share of words that hold a letter, from 0 to 1. Gopher: 0.8."""
    max_bullet_lines: float | None = None
    """Largest share of lines that begin with a bullet or a dash, from 0 to 1. Gopher: 0.9. Here as below, empty lines do not count."""
    max_ellipsis_lines: float | None = None
    """Largest share of lines that end in an ellipsis, from 0 to 1. Gopher: 0.3."""
    min_stop_words: int | None = None
    """How many of the, be, to, of, and, that, have, with there must be. Gopher: 2. For English only."""
    max_repeated_lines: float | None = None
    """Largest share of lines that came before in the document, from 0 to 1. Gopher: 0.3."""
    max_repeated_line_characters: float | None = None
    """Largest share of characters in such lines, from 0 to 1. Gopher: 0.2."""
    max_repeated_paragraphs: float | None = None
    """Largest share of paragraphs, parted by empty lines, that came before in the document, from 0 to 1. Gopher: 0.3."""
    max_top_bigram: float | None = None
    """Largest share of the words' characters that lie in the commonest pair of neighbouring words, if it comes more than once; from 0 to 1.
    Gopher: 0.2."""
    min_sentences: int | None = None
    """Fewest ends of a sentence. C4: 3."""
    max_curly_brackets: int | None = None
    """Most { signs, which tell programs from prose. C4: 0."""
    max_lorem_ipsum: int | None = None
    """How often a printer's "lorem ipsum" may come. C4: 0."""


def reason_to_drop(text: str, filters: FilterSettings) -> str | None:
    """The name of the first setting whose limit the text breaks, in the order above, or None for one that keeps them all."""
    views = _Views(text)
    for name, measure, limit in _limits(filters):
        excess = measure(views) - limit
        if (excess < 0) if name.startswith("min_") else (excess > 0):
            return name
    return None


def check(filters: FilterSettings) -> None:
    """Raise UserError for a limit that cannot be meant: negative, infinite, a share above 1, a least amount above the most."""
    for name, _, limit in _limits(filters):
        most = 1 if name.partition("_")[2] in _SHARES else math.inf
        if not (math.isfinite(limit) and 0 <= limit <= most):
            raise UserError(f"--filters.{name} {limit} must be {'from 0 to 1' if most == 1 else 'a finite number of at least 0'}.")
        other = getattr(filters, name.replace("min_", "max_"), None)
        if name.startswith("min_") and other is not None and limit > other:
            raise UserError(f"--filters.{name} {limit} is above --filters.{name.replace('min_', 'max_')} {other}: every document would go.")


class _Views:
    """A text cut into words, lines and paragraphs, each when first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        if self.text.isascii():
            return self.text.split()
        return UNSPACED_CHARACTERS.sub(lambda run: f" {' '.join(run[0])} ", self.text).split()

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def repeated_lines(self) -> list[str]:
        return _repeated(self.lines)


# Scripts that put no space between words: kana, CJK ideographs with their extensions.
UNSPACED_CHARACTERS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LETTER = re.compile(r"[^\W\d_]")
_BULLETS = ("-", "*", "•", "‣", "◦", "▪", "·", "–")
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_EMPTY_LINES = re.compile(r"\n\s*\n")
# A full stop ends a sentence before white space, closing quotes and brackets aside; those of Chinese and Japanese end one anywhere.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?!\S)|[。！？]+""")
_LOREM_IPSUM = re.compile("lorem ipsum", re.IGNORECASE)


def _repeated(pieces: list[str]) -> list[str]:
    """Those that came before."""
    seen: set[str] = set()
    return [piece for piece in pieces if piece in seen or seen.add(piece)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean_word_length(views: _Views) -> float:
    return _share(sum(map(len, views.words)), len(views.words))


def _symbol_share(views: _Views) -> float:
    text = views.text
    return _share(max(text.count("#"), text.count("...") + text.count("…")), len(views.words))


def _alphabetic_share(views: _Views) -> float:
    return _share(sum(1 for word in views.words if word.isalpha() or _LETTER.search(word)), len(views.words))


def _bullet_lines(views: _Views) -> float:
    return _share(sum(line.startswith(_BULLETS) for line in views.lines), len(views.lines))


def _ellipsis_lines(views: _Views) -> float:
    return _share(sum(line.endswith(("...", "…")) for line in views.lines), len(views.lines))


def _stop_words(views: _Views) -> int:
    return len({word.strip(string.punctuation).lower() for word in set(views.words)} & _STOP_WORDS)


def _repeated_lines(views: _Views) -> float:
    return _share(len(views.repeated_lines), len(views.lines))


def _repeated_line_characters(views: _Views) -> float:
    return _share(sum(map(len, views.repeated_lines)), sum(map(len, views.lines)))


def _repeated_paragraphs(views: _Views) -> float:
    paragraphs = [paragraph for paragraph in map(str.strip, _EMPTY_LINES.split(views.text)) if paragraph]
    return _share(len(_repeated(paragraphs)), len(paragraphs))


def _top_bigram(views: _Views) -> float:
    pairs = Counter(pairwise(views.words))
    most = max(pairs.values(), default=0)
    if most < 2:
        return 0.0
    length = max(len(first) + len(second) for (first, second), count in pairs.items() if count == most)
    return min(1.0, length * most / sum(map(len, views.words)))  # "ha ha ha" holds its pair twice, in three words


_AMOUNTS: dict[str, Callable[[_Views], float]] = {
    "characters": lambda views: len(views.text),
    "words": lambda views: len(views.words),
    "mean_word_length": _mean_word_length,
    "stop_words": _stop_words,
    "sentences": lambda views: len(_SENTENCE_END.findall(views.text)),
    "curly_brackets": lambda views: views.text.count("{"),
    "lorem_ipsum": lambda views: len(_LOREM_IPSUM.findall(views.text)),
}
_SHARES: dict[str, Callable[[_Views], float]] = {
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
def _limits(filters: FilterSettings) -> list[tuple[str, Callable[[_Views], float], float]]:
    """Of each limit that is set: its name, min_ or max_ and what is measured, the measure, and the limit."""
    measures = _AMOUNTS | _SHARES
    given = ((field.name, getattr(filters, field.name)) for field in fields(filters))
    return [(name, measures[name.partition("_")[2]], limit) for name, limit in given if limit is not None]
