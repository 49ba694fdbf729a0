"""Prefix language modelling: each token after a prefix is predicted; the tokens of the prefix attend to one another."""

from data.sampling.objectives import prefix as objectives
from launch.evaluation.tasks.causal import Decoding


class Prefix(Decoding):
    """Prefix language modelling (T5's prefix LM; Raffel et al. 2019, arXiv 1910.10683, section 3.2.1)."""

    objective = objectives.Prefix
    prefix_attention = True
