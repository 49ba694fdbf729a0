"""Span corruption: spans that were cut out of a text are predicted from the rest."""

from launch.evaluation.tasks.text_to_text import TextToText


class SpanCorruption(TextToText):
    """Span corruption (T5; Raffel et al. 2019, arXiv 1910.10683, section 3.1.4)."""

    name = "span_corruption"
    run_tokens = 8  # between two spans that were cut out
