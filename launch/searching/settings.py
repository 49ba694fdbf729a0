"""Settings of launch/search.py."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from data.command_line import describe, read_settings
from launch import REPOSITORY
from launch.searching.space import NOT_SEARCHED, Dimension, read_dimension

DEFAULT_TRIALS = 20
_ADVICE = {"config": " (--recipe)", "output": " (--output is the folder of the search)"}
METHODS_THAT_LEARN = ("tpe", "gp")
"""Methods whose proposals depend on the results of earlier trials."""


@dataclasses.dataclass(frozen=True)
class RungSettings:
    """Early stopping of weak trials (ASHA, Li et al. 2018, arXiv 1810.05934).

    A trial stops at a rung, with a checkpoint, and resumes when its score there is among the best 1 / factor.
    """

    first_tokens: Annotated[float, Gt(0)] | None = None
    """Tokens at which a trial reaches the first rung. Each further rung needs factor times as many (default: no rungs)."""
    factor: Annotated[int, Ge(2)] = 3
    """Ratio of a rung's tokens to those of the rung before it, and of the trials at a rung to those that go on."""
    decay: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of a rung's tokens for which a branch of the run trains on with a falling rate. The score of the rung is that of the branch,
    because rates rank otherwise after a decay (default: no branch)."""


@dataclasses.dataclass(frozen=True)
class BranchSettings:
    """The branches of preset critical_batch."""

    parent: str | None = None
    """Folder of the run with the checkpoint that is branched. All its settings are kept."""
    step: Annotated[int, Gt(0)] | None = None
    """Step of that checkpoint (default: the newest)."""
    tokens: Annotated[float, Gt(0)] | None = None
    """Tokens that each branch reads. The largest batch should have 32 steps or more."""
    tolerance: Annotated[float, Ge(0)] = 0.01
    """Loss, in nats, by which a larger batch may be worse than a smaller one."""


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """A search: the settings that are tried, and how."""

    output: str
    """Folder of the search: search.json, trials/, report.html. A second start with the same folder continues the search."""
    preset: Literal["rate", "optimizers", "batch_and_rate", "critical_batch"] | None = None
    """In place of space and method: 7 learning rates around the recipe's (rate); every optimizer with 5 rates (optimizers); batches of 1
    to 32 times the recipe's, with 3 rates each, and the critical batch that follows from them (batch_and_rate); a checkpoint that trains
    on with batches of 1/2 to 8 times its own, and the largest that loses nothing (critical_batch)."""
    space: tuple[str, ...] = ()
    """Settings of launch/pretrain.py to search, a text for each: "NAME VALUE VALUE ..." (a list), or "NAME log LOW HIGH" or "NAME linear
    LOW HIGH" (a range). "NAME log LOW HIGH N" is a list of N values at equal ratios, linear at equal distances. A range whose bounds
    are whole numbers has whole numbers only."""
    method: Literal["grid", "random", "qmc", "tpe", "gp"] = "random"
    """Which values are tried: every combination of lists (grid); random values; a Sobol sequence (qmc), which covers a space more evenly;
    values proposed from the scores so far, by Parzen estimators (tpe, Bergstra et al. 2011) or a Gaussian process (gp)."""
    trials: Annotated[int, Gt(0)] | None = None
    """Number of trials, which a later start may raise (default: 20; grid: every combination)."""
    repeat: Annotated[int, Gt(0)] = 1
    """Runs of each trial, with seeds that follow those of the recipe. The score of a trial is their mean."""
    objective: str = "loss/validation"
    """Curve in metrics.jsonl whose last value is the score of a run."""
    maximize: bool = False
    """True if a higher score is better, as for an accuracy."""
    recipe: str = str(REPOSITORY / "launch" / "recipes" / "demo.yaml")
    """Recipe of all trials: a YAML file for launch/pretrain.py."""
    settings: tuple[str, ...] = ()
    """Settings of launch/pretrain.py for all trials, over those of the recipe: a text "NAME VALUE" for each."""
    launcher: str = ""
    """Command that starts the ranks of a run, such as "deepspeed --num_accelerators 2 --master_port {port}". {port} becomes a free port
    (default: one process)."""
    workers: Annotated[int, Gt(0)] = 1
    """Runs at a time in this process. They share its cores and its GPUs equally."""
    seed: int = 1
    """Seed of the proposals."""
    branch: BranchSettings = dataclasses.field(default_factory=BranchSettings)
    rungs: RungSettings = dataclasses.field(default_factory=RungSettings)

    @property
    def dimensions(self) -> list[Dimension]:
        """The settings that are searched."""
        return [read_dimension(text) for text in self.space]

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is invalid."""
        return [
            *_complaints_about_texts(self),
            *_complaints_about_space(self),
            *_complaints_about_rungs(self),
            *_complaints_about_branch(self),
        ]


def _complaints_about_texts(settings: SearchSettings) -> list[str]:
    """Return a message for each text that is empty or whose quotes do not match."""
    complaints = []
    for name, text in [*(("settings", text) for text in settings.settings), ("launcher", settings.launcher)]:
        try:
            words = shlex.split(text)
        except ValueError as error:
            complaints.append(f'{name} "{text}": {str(error).lower()}.')
        else:
            setting = words[0].removeprefix("--") if words else ""
            if name == "settings" and not setting:
                complaints.append('settings has an empty text. Give "NAME VALUE".')
            elif name == "settings" and setting in NOT_SEARCHED and setting != "seed":
                complaints.append(f"settings has {setting}, which the search sets for each run{_ADVICE.get(setting, '')}. Remove it.")
    return complaints


def _complaints_about_space(settings: SearchSettings) -> list[str]:
    if settings.preset:
        given = [name for name in ("space", "method", "trials") if getattr(settings, name) != getattr(SearchSettings, name, ())]
        return [f"{describe(settings, name)} has no effect with {describe(settings, 'preset')}. Remove one of them." for name in given]
    if not settings.space:
        return ['Give preset, or space, the settings to search, such as --space "optimizer.learning_rate log 1e-4 1e-2".']
    complaints, dimensions = [], []
    for text in settings.space:
        try:
            dimensions.append(read_dimension(text))
        except ValueError as error:
            complaints.append(f'space "{text}": {error}')
    names = [dimension.name for dimension in dimensions]
    complaints += [f"space has {name} twice; give each setting once." for name in dict.fromkeys(names) if names.count(name) > 1]
    if settings.method == "grid":
        complaints += [
            f'space "{one.name}" is a range, and {describe(settings, "method")} needs values. Add their number: "{one.text} 5", or use '
            "another method."
            for one in dimensions
            if not one.values
        ]
    return complaints


def _complaints_about_rungs(settings: SearchSettings) -> list[str]:
    rungs = settings.rungs
    if rungs.first_tokens is None:
        unused = [name for name in ("factor", "decay") if getattr(rungs, name) != getattr(RungSettings, name)]
        return [f"{describe(settings, f'rungs.{name}')} has no effect without rungs.first_tokens." for name in unused]
    if settings.repeat > 1:
        return [f"{describe(settings, 'repeat')} is not supported with {describe(settings, 'rungs.first_tokens')}. Remove one of them."]
    return []


def _complaints_about_branch(settings: SearchSettings) -> list[str]:
    branch, default = settings.branch, BranchSettings()
    if settings.preset != "critical_batch":
        given = [field.name for field in dataclasses.fields(branch) if getattr(branch, field.name) != getattr(default, field.name)]
        return [f"{describe(settings, f'branch.{name}')} has no effect without preset critical_batch." for name in given]
    complaints = [f"preset critical_batch needs branch.{name}." for name in ("parent", "tokens") if getattr(branch, name) is None]
    if settings.recipe != SearchSettings.recipe:
        complaints.append(f"{describe(settings, 'recipe')} has no effect with preset critical_batch, which keeps that of branch.parent.")
    if settings.repeat > 1:
        complaints.append(f"{describe(settings, 'repeat')} is not supported with preset critical_batch.")
    if settings.rungs.first_tokens is not None:
        complaints.append(f"{describe(settings, 'rungs.first_tokens')} is not supported with preset critical_batch.")
    return complaints


def read_search_settings(arguments: Sequence[str]) -> SearchSettings:
    """Read the settings from a command line; a first argument that is no option is the YAML file of the search.

    Raises UserError with every complaint.
    """
    words = [f"--config={arguments[0]}", *arguments[1:]] if arguments and not arguments[0].startswith("-") else list(arguments)
    return read_settings(SearchSettings, words, "Search for the best settings of a training run.")
