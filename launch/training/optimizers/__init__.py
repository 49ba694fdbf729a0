"""The optimizers that a run can train with. A new one is a file in this folder and a line in OPTIMIZERS."""

from launch.training.optimizers.adamw import AdamW
from launch.training.optimizers.base import Optimizer
from launch.training.settings import OptimizerSettings

OPTIMIZERS: dict[str, type[Optimizer]] = {AdamW.name: AdamW}
"""Optimizer by the name under which checkpoints record it."""


def optimizer_for(settings: OptimizerSettings) -> Optimizer:
    """Return the optimizer of a run."""
    return AdamW(settings)
