"""The table of tasks, and the choice of a model's task."""

from data.command_line import UserError
from data.sampling.objectives.table import default_objective
from data.sampling.settings import Architecture, ObjectiveName
from launch.checkpoints.opening import OpenedModel
from launch.evaluation.tasks.causal import Causal
from launch.evaluation.tasks.classification import Classification
from launch.evaluation.tasks.masked import Masked
from launch.evaluation.tasks.pairs import Pairs
from launch.evaluation.tasks.prefix import Prefix
from launch.evaluation.tasks.span_corruption import SpanCorruption
from launch.evaluation.tasks.task import Task

TASKS: dict[ObjectiveName, Task] = {task.name: task for task in (Causal(), Prefix(), Masked(), Classification(), SpanCorruption(), Pairs())}
"""All tasks by name. task_of takes the first that fits a model."""


def task_named(objective: ObjectiveName | None, architecture: Architecture) -> Task:
    """Return the task of a run: data.objective, or the default for the model's architecture."""
    return TASKS[objective or default_objective(architecture).name]


def task_of(opened: OpenedModel, objective: ObjectiveName | None = None) -> Task:
    """Return the task of a model: `objective` if given, else the run's, else the first one in the table that fits the model.

    Raises UserError if the objective is for another architecture.
    """
    config = opened.config
    if not (name := objective or opened.recipe.get("data", {}).get("objective")):
        return next(task for task in TASKS.values() if task.fits(config))
    if TASKS[name].architecture != config.architecture:
        allowed = " or ".join(task.name for task in TASKS.values() if task.architecture == config.architecture)
        raise UserError(
            f"--objective {name} does not apply to architecture {config.architecture}, which {opened.folder} has. Use {allowed}."
        )
    return TASKS[name]
