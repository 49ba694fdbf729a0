"""Each filter at its limit and beyond it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.preparation.filters
from data.command_line import read_settings
from data.preparation.filters import FilterSettings, reason_to_drop
from data.ranges import range_complaints

PROSE = "The old house stood at the end of the road. Nobody had lived there for years! Would they have come back?"

# setting: (limit, a text at the limit, a text just beyond it)
BOUNDARIES = {
    "min_characters": (5, "häuse", "haus"),
    "max_characters": (5, "häuse", "häuser"),
    "min_words": (4, "one two\nthree  four", "one two three"),
    "max_words": (4, "春 ist 花月", "春江花月夜"),
    "min_mean_word_length": (3, "a bb ccc dddddd", "a bb ccc ddddd"),
    "max_mean_word_length": (3, "a bb ccc dddddd", "a bb ccc ddddddd"),
    "max_symbol_share": (0.5, "# a # b ... …", "a b... c d... e f…  …"),
    "min_alphabetic_share": (0.5, "a1 2 Ω 4", "a1 2 3 4 é"),
    "max_bullet_lines": (0.5, "- a\n\n  • b\nc\nd - \n", "- a\nb\n* c"),
    "max_ellipsis_lines": (0.5, "a...\nb", "a… \nb...\n\nc"),
    "min_stop_words": (2, "The cat (and the dog)", "the the THE"),
    "max_repeated_lines": (0.5, "a\na\nb\n b", "a\na\n\na\nb\nb"),
    "max_repeated_line_characters": (0.25, "abcd\nefgh\nabcd\nijkl", "abcd\nefg\nabcd\nijkl"),
    "max_repeated_paragraphs": (0.5, "a\nb\n\na\nb", "a\nb\n\na\nb\n \na\nb\n"),
    "max_top_bigram": (0.5, "a b x a b yzw", "a b x a b yz"),
    "min_sentences": (3, PROSE, "1.5 is a number, e.g.this... Two?!"),
    "max_curly_brackets": (1, "if (a) { b }", "{{a}"),
    "max_lorem_ipsum": (0, "lorem", "Lorem ipsum dolor"),
}


def test_every_limit_has_a_boundary_case():
    assert list(BOUNDARIES) == [field.name for field in dataclasses.fields(FilterSettings)]


@pytest.mark.parametrize("setting", BOUNDARIES)
def test_text_at_the_limit_is_kept_and_beyond_is_dropped(setting):
    limit, kept, dropped = BOUNDARIES[setting]
    filters = FilterSettings(**{setting: limit})
    assert reason_to_drop(kept, filters) is None
    assert reason_to_drop(dropped, filters) == setting


def test_reason_is_the_first_limit_exceeded():
    assert reason_to_drop("a {", FilterSettings(max_curly_brackets=0, min_words=3)) == "min_words"
    assert reason_to_drop("a b {", FilterSettings(max_curly_brackets=0, min_words=3)) == "max_curly_brackets"


def test_published_limits_keep_prose_and_drop_noise():
    gopher = FilterSettings(
        min_words=50,
        max_words=100_000,
        min_mean_word_length=3,
        max_mean_word_length=10,
        max_symbol_share=0.1,
        min_alphabetic_share=0.8,
        max_bullet_lines=0.9,
        max_ellipsis_lines=0.3,
        min_stop_words=2,
        max_repeated_lines=0.3,
        max_repeated_line_characters=0.2,
        max_repeated_paragraphs=0.3,
        max_top_bigram=0.2,
        min_sentences=3,
        max_curly_brackets=0,
        max_lorem_ipsum=0,
    )
    assert range_complaints(gopher) == [] and gopher.minimums_above_maximums() == []
    article = PROSE + (
        " It was said in the village that a sailor had built it and that he never came to live in it. In winter the river rose to the steps"
        " and on some nights people saw a light behind the shutters. We have asked those who remember; each of them tells another story."
    )
    assert reason_to_drop(article, gopher) is None
    assert reason_to_drop(PROSE, gopher) == "min_words"
    assert reason_to_drop("\n".join([article] * 3), gopher) == "max_repeated_lines"
    assert reason_to_drop("buy now " * 60, gopher) == "min_stop_words"
    assert reason_to_drop("that one to have " + "buy now " * 60, gopher) == "max_top_bigram"
    assert reason_to_drop("0 1 2 3 4 5 6 7 8 9 " * 20, gopher) == "min_mean_word_length"


@given(text=st.text(alphabet="ab .#\n-…春。{", max_size=60))
def test_fractions_are_between_0_and_1(text):
    """max_symbol_share is left out: it is relative to words and can be larger."""
    all_of_it = {name: 1.0 for name in BOUNDARIES if name.startswith("max_") and isinstance(BOUNDARIES[name][0], float)} | {
        "min_alphabetic_share": 0.0
    }
    del all_of_it["max_symbol_share"]
    assert reason_to_drop(text, FilterSettings(**all_of_it)) is None


@given(text=st.text(alphabet="ab 春\n", min_size=1, max_size=40).filter(str.strip))
def test_doubled_text_repeats_half_of_its_lines(text):
    twice = text + "\n" + text
    for setting in ("max_repeated_lines", "max_repeated_line_characters"):
        assert reason_to_drop(twice, FilterSettings(**{setting: 0.49})) == setting
    assert reason_to_drop(text + "\n\n" + text, FilterSettings(max_repeated_paragraphs=0.49)) == "max_repeated_paragraphs"


@given(text=st.text(max_size=60))
def test_default_settings_drop_nothing(text):
    assert reason_to_drop(text, FilterSettings()) is None


def test_limits_that_are_not_set_are_not_computed(monkeypatch):
    monkeypatch.setattr(data.preparation.filters, "Counter", None)
    assert reason_to_drop(PROSE, FilterSettings(min_words=3, max_repeated_lines=0.3)) is None


@pytest.mark.parametrize(
    "given_limits, message",
    [
        ({"min_words": -1}, "min_words is -1; it must be at least 0."),
        ({"max_mean_word_length": float("inf")}, "max_mean_word_length is inf; it must be a finite number."),
        ({"max_top_bigram": float("nan")}, "max_top_bigram is nan; it must be a finite number."),
        ({"max_bullet_lines": 90.0}, "max_bullet_lines is 90.0; it must be at least 0 and at most 1."),
    ],
)
def test_limits_out_of_range_are_refused(given_limits, message):
    assert range_complaints(FilterSettings(**given_limits)) == [message]


def test_a_minimum_above_its_maximum_is_found():
    assert FilterSettings(min_words=9, max_words=8, min_characters=1).minimums_above_maximums() == [("min_words", "max_words")]
    assert FilterSettings(min_words=9, max_words=9).minimums_above_maximums() == []
    assert FilterSettings().minimums_above_maximums() == [] == range_complaints(FilterSettings())


def test_limits_are_set_on_the_command_line():
    assert read_settings(FilterSettings, ["--min_words", "50", "--max_top_bigram", "0.2"], "") == FilterSettings(
        min_words=50, max_top_bigram=0.2
    )
