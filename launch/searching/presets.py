"""Presets: searches that are often needed, with all their points chosen from the recipe."""

import dataclasses
import math
import typing
from collections.abc import Callable

from data.command_line import UserError
from launch.searching.space import Dimension, Values, number_text, read_dimension
from launch.training.settings import OptimizerSettings, RunSettings

POINTS_OF_A_CURVE = 20
"""Validations of a run of batch_and_rate, and the fewest steps that it may have."""
LEAST_SIZES = 3
"""Fewest batch sizes of batch_and_rate: its curve has two unknowns."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A trial that is known before the search begins."""

    values: Values
    more: Values = dataclasses.field(default_factory=dict)
    """Settings that follow from the values and from the recipe."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset for one recipe."""

    space: list[Dimension]
    points: list[Point]


def expand(name: str, recipe: RunSettings) -> Preset:
    """Return the trials of a preset."""
    return PRESETS[name](recipe)


def _rate(recipe: RunSettings) -> Preset:
    """Return 7 learning rates: the recipe's, and three halvings and doublings of it."""
    rates = [number_text(recipe.optimizer.learning_rate * 2.0**power, False) for power in range(-3, 4)]
    space = read_dimension(f"optimizer.learning_rate {' '.join(rates)}")
    return Preset([space], [Point({space.name: rate}) for rate in rates])


def _optimizers(recipe: RunSettings) -> Preset:
    """Return each optimizer with 5 learning rates, a factor of 4 apart, the recipe's in the middle."""
    names = typing.get_args(typing.get_type_hints(OptimizerSettings)["name"])
    rates = [number_text(recipe.optimizer.learning_rate * 4.0**power, False) for power in range(-2, 3)]
    space = [read_dimension(f"optimizer.name {' '.join(names)}"), read_dimension(f"optimizer.learning_rate {' '.join(rates)}")]
    return Preset(space, [Point({"optimizer.name": name, "optimizer.learning_rate": rate}) for name in names for rate in rates])


def _batch_and_rate(recipe: RunSettings) -> Preset:
    """Return batches of 1, 2, 4, ... 32 times the recipe's, each with three rates around the one that the square root gives.

    All runs read the tokens of the recipe, and warm up for the same tokens. The rate is constant, so that the loss at any moment is that
    of a run of any length.
    """
    plan, points = recipe.batch_plan, []
    tokens, warmup = plan.tokens_before(plan.steps), plan.tokens_before(recipe.warmup_steps)
    sizes = [recipe.batch.global_batch_size * 2**power for power in range(6)]
    sizes = [size for size in sizes if tokens // (size * plan.sequence_length) >= POINTS_OF_A_CURVE]
    if len(sizes) < LEAST_SIZES:
        least = 2 ** (LEAST_SIZES - 1) * POINTS_OF_A_CURVE * plan.tokens(0)
        raise UserError(
            f"preset batch_and_rate needs {LEAST_SIZES} batch sizes with {POINTS_OF_A_CURVE} steps or more: runs of {least:,} tokens. "
            f"Those of this recipe have {tokens:,}. Raise train_steps or train_tokens, or lower batch.global_batch_size."
        )
    for size in sizes:
        steps = tokens // (size * plan.sequence_length)
        more = {
            "train_steps": "null",
            "train_tokens": str(tokens),
            "schedule.warmup_steps": "null",
            "schedule.warmup_tokens": str(warmup),
            "schedule.kind": "constant",
            "log.validation_interval": str(max(steps // POINTS_OF_A_CURVE, 1)),
        }
        for factor in (0.5, 1.0, 2.0):
            rate = recipe.optimizer.learning_rate * factor * math.sqrt(size / sizes[0])
            points.append(Point({"batch.global_batch_size": str(size), "optimizer.learning_rate": number_text(rate, False)}, more))
    rates = dict.fromkeys(point.values["optimizer.learning_rate"] for point in points)
    space = [
        read_dimension(f"batch.global_batch_size {' '.join(map(str, sizes))}"),
        read_dimension(f"optimizer.learning_rate {' '.join(rates)}"),
    ]
    return Preset(space, points)


PRESETS: dict[str, Callable[[RunSettings], Preset]] = {"rate": _rate, "optimizers": _optimizers, "batch_and_rate": _batch_and_rate}
"""Each preset by its name."""
