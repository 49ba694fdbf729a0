"""Span corruption: spans that were cut out of a text are predicted from the rest."""

from data.sampling.objectives import span_corruption as objectives
from launch.evaluation.tasks.text_to_text import TextToText


class SpanCorruption(TextToText):
    """Span corruption (T5; Raffel et al. 2019, arXiv 1910.10683, section 3.3.4)."""

    objective = objectives.SpanCorruption
    run_tokens = 8  # between two spans that were cut out
