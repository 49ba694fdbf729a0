"""Every whole number that a script takes: one that no computer can count with is refused in one sentence, and so is a negative one."""

import dataclasses
import typing

import pytest

from data.command_line import UserError, read_settings
from data.preparation.settings import PrepareSettings
from data.sampling.show_settings import ShowSettings
from launch.benchmarks.settings import CompressionSettings, GenerationSettings, PreparationSettings, TrainingStepSettings
from launch.compressing.settings import ExportSettings, PruneSettings, QuantizeSettings
from launch.evaluation.settings import CompareSettings, EvaluateSettings, GenerateSettings
from launch.training.planning.settings import PlanSettings
from launch.training.settings import RunSettings

CLASSES = (PrepareSettings, ShowSettings, RunSettings, PlanSettings, EvaluateSettings, GenerateSettings, CompareSettings, PruneSettings)
CLASSES += (QuantizeSettings, ExportSettings, CompressionSettings, GenerationSettings, PreparationSettings, TrainingStepSettings)
NEGATIVE_ALLOWED = {"seed", "group_size", "quantization.group_size"}
"""A group size of -1 means one group per row, as in other tools."""
CHECKED_LATER = {"data.target_length"}
"""Settings whose smallest value depends on other settings."""


def integers(settings: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields that are whole numbers."""
    names: list[str] = []
    for name, kind in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            names += integers(kind, f"{prefix}{name}.")
        elif int in (kind, *typing.get_args(kind)):
            names.append(prefix + name)
    return names


def refusals(settings: type, value: int, names: list[str]) -> dict[str, str]:
    """Return the line of each setting in the message that refuses a value for all of them."""
    required = [
        name for name, field in ((field.name, field) for field in dataclasses.fields(settings)) if is_required(field) and name not in names
    ]
    words = [word for name in required for word in (f"--{name}", "x")]
    with pytest.raises(UserError) as refused:
        read_settings(settings, [*words, *(f"--{name}={value}" for name in names)], "Any.")
    lines = str(refused.value).splitlines()
    return {name: line for name in names for line in lines if line.startswith(f"{name} is {value}; it must be ")}


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@pytest.mark.parametrize("settings", CLASSES)
@pytest.mark.parametrize("value", [10**30, 10**400])
def test_whole_numbers_beyond_64_bits_are_refused(settings, value):
    names = integers(settings)
    assert names and set(refusals(settings, value, names)) == set(names)


@pytest.mark.parametrize("settings", CLASSES)
def test_negative_whole_numbers_are_refused_where_they_mean_nothing(settings):
    names = [name for name in integers(settings) if name not in NEGATIVE_ALLOWED | CHECKED_LATER]
    assert set(refusals(settings, -1, names)) == set(names)


def test_seed_beyond_64_bits_is_refused_with_the_range():
    (line,) = refusals(RunSettings, 2**63, ["seed"]).values()
    assert line == (
        "seed is 9223372036854775808; it must be at least -9223372036854775807 and at most 9223372036854775807. Set on the command line."
    )
    assert read_settings(ShowSettings, ["--seed", "-1"], "Any.").seed == -1


def test_length_in_tokens_beyond_64_bits_is_refused():
    with pytest.raises(UserError, match=r"^train_tokens is 1e\+18; it must be above 0 and below 1e\+18\. Set on the command line\.$"):
        read_settings(RunSettings, ["--train_tokens", "1e18"], "Any.")


def test_longest_run_has_positions_of_64_bits():
    longest = read_settings(RunSettings, [f"--train_steps={2**31 - 1}", f"--batch.global_batch_size={2**31 - 1}"], "Any.").batch_plan
    assert longest.position(longest.steps) < 2**63
