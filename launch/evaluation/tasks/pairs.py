"""Pairs: the second text of each document is predicted from the first, as in translation and summarization."""

from data.sampling.objectives import pairs as objectives
from launch.evaluation.tasks.text_to_text import TextToText


class Pairs(TextToText):
    """Prediction of the second text of a document from the first."""

    objective = objectives.Pairs
