"""Proposals: the values of the next trial. A pure function of the space, the seed, the trial's number and the scores so far.

Nothing is kept between two proposals, so that any number of workers can propose, and a worker that died leaves nothing behind: Optuna's
study is built anew, in memory, from the trials.
"""

import dataclasses
import logging
import math
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from launch.searching.space import Dimension, Values

WORSE_THAN_WORST = 0.1
"""Distance of the score that stands for a failed trial from the worst score, as a share of the worst."""
_FIRST_RANDOM = 10
"""Trials before tpe and gp follow the scores. The first ones are random."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A trial that a proposal takes into account."""

    values: Values
    score: float | None
    """Its score, lower is better; infinite if its runs failed or diverged; None while it has none."""
    rung: int | None = None
    """Index of the rung of that score; None if it is the last one."""


def propose(space: Sequence[Dimension], method: str, seed: int, number: int, known: Sequence[Known]) -> Values:
    """Return the values of trial `number`, counted from 0. Only tpe and gp use what is `known`."""
    if method in ("random", "qmc"):
        shares = _random_shares(len(space), seed, number) if method == "random" else _sobol_shares(len(space), seed, number)
        return {one.name: one.at(float(share)) for one, share in zip(space, shares, strict=True)}
    return _propose_by_optuna(space, method, seed, number, known)


def _random_shares(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number])).random(count)


def _sobol_shares(count: int, seed: int, number: int) -> np.ndarray:
    """Return point `number` of a scrambled Sobol sequence (Owen 1998)."""
    from scipy.stats import qmc  # its import takes as long as all others of a worker together

    points = qmc.Sobol(count, rng=np.random.default_rng(seed % 2**64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a number of points that is not a power of 2
        return points.random(number + 1)[-1]


def _propose_by_optuna(space: Sequence[Dimension], method: str, seed: int, number: int, known: Sequence[Known]) -> Values:
    optuna.logging.set_verbosity(logging.WARNING)
    drawn = int(np.random.default_rng([seed % 2**64, number]).integers(2**32))
    study = optuna.create_study(sampler=_sampler(method, drawn))
    study.add_trials(past_trials(space, known))
    distributions = {one.name: distribution(one) for one in space}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        asked = study.ask(distributions)
    return {one.name: as_text(one, asked.params[one.name]) for one in space}


def _sampler(method: str, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if method == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_FIRST_RANDOM)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_FIRST_RANDOM, multivariate=True, constant_liar=True)


def past_trials(space: Sequence[Dimension], known: Sequence[Known]) -> list[FrozenTrial]:
    """Return trials as Optuna has them. A failed one gets a score that is worse than the worst, or is left out if there is none."""
    distributions = {one.name: distribution(one) for one in space}
    finite = [one.score for one in known if one.score is not None and math.isfinite(one.score)]
    worst = max(finite) + WORSE_THAN_WORST * max(abs(max(finite)), max(finite) - min(finite)) if finite else None
    trials = []
    for one in known:
        score = worst if one.score is not None and not math.isfinite(one.score) else one.score
        if one.score is not None and score is None:
            continue
        trial = create_trial(
            params={dimension.name: as_number(dimension, one.values[dimension.name]) for dimension in space},
            distributions=distributions,
            value=score if one.rung is None else None,
            state=TrialState.RUNNING if score is None else TrialState.COMPLETE if one.rung is None else TrialState.PRUNED,
            intermediate_values={} if one.rung is None or score is None else {one.rung: score},
        )
        trials.append(trial)
    return trials


def distribution(one: Dimension) -> BaseDistribution:
    """Return a setting of the space as Optuna describes it."""
    if one.values:
        return CategoricalDistribution(one.values)
    if one.is_whole:
        return IntDistribution(int(one.low), int(one.high), log=one.is_log)
    return FloatDistribution(one.low, one.high, log=one.is_log)


def as_number(one: Dimension, text: str) -> str | float:
    """Return a value as Optuna has it: text for a list, a number for a range."""
    if one.values:
        return text
    return int(text) if one.is_whole else min(max(float(text), one.low), one.high)


def as_text(one: Dimension, value: str | float) -> str:
    """Return a value of Optuna as a command line has it."""
    return str(value) if one.values or one.is_whole else f"{value:.6g}"
