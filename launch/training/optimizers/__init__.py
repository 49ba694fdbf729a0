"""The optimizers that a run can train with. A new one is a file in this folder, a line in OPTIMIZERS and a name in OptimizerSettings."""

from launch.training.optimizers.adamw import AdamW
from launch.training.optimizers.base import Optimizer
from launch.training.optimizers.lamb import Lamb
from launch.training.optimizers.lars import Lars
from launch.training.optimizers.lion import Lion
from launch.training.optimizers.muon import Muon
from launch.training.optimizers.sgd import SGD
from launch.training.settings import OptimizerSettings

OPTIMIZERS: dict[str, type[Optimizer]] = {
    AdamW.name: AdamW,
    Lamb.name: Lamb,
    Lars.name: Lars,
    Lion.name: Lion,
    Muon.name: Muon,
    SGD.name: SGD,
}
"""Optimizer by its name in the settings and in checkpoints."""


def optimizer_for(settings: OptimizerSettings) -> Optimizer:
    """Return the optimizer of a run."""
    return OPTIMIZERS[settings.name](settings)
