"""Reads the settings of a run: the command line over the recipe over the defaults."""

import contextlib
import dataclasses
import itertools
import typing
from collections.abc import Mapping, Sequence

from data.command_line import UserError, read_settings
from launch import REPOSITORY
from launch.ranks.launchers import without_local_rank
from launch.training.initial_model import model_of_init
from launch.training.settings import RunSettings
from model.config import ModelConfig, named_size

ALIASES = {"--deepspeed_config": "--deepspeed", "--data": "--data.path", "--preserve_sparsity": "--hold_zeros"}
"""Other names of options. The first two are the names that DeepSpeed's users and other tools of this project use."""
_IN_STEPS_AND_TOKENS = (("--train_steps", "--train_tokens"), ("--schedule.warmup_steps", "--schedule.warmup_tokens"))
_OTHER_UNITS = (*_IN_STEPS_AND_TOKENS, *((tokens, steps) for steps, tokens in _IN_STEPS_AND_TOKENS))
"""Pairs of an option and the option that gives the same length in the other unit."""
Settings = typing.TypeVar("Settings", bound=RunSettings)
_DEMO_RECIPE = REPOSITORY / "launch" / "recipes" / "demo.yaml"


def read_run_settings(arguments: Sequence[str]) -> RunSettings:
    """Return the settings that a command line gives. Without a recipe and without a model, the demo recipe is read.

    Raises UserError with every complaint.
    """
    return read_settings_with_run(arguments, RunSettings, "Train a transformer with DeepSpeed.", {})


def read_settings_with_run(arguments: Sequence[str], kind: type[Settings], description: str, aliases: Mapping[str, str]) -> Settings:
    """Return the settings of a script that has those of a run and some of its own, in the class `kind`, with more `aliases`."""
    read = lambda words: _read(words, kind, description, aliases)  # noqa: E731
    words = without_local_rank(arguments)
    if any(has_option(words, name) for name in ("--config", "--size", "--init")):
        return read(words)
    words = ["--config", str(_DEMO_RECIPE), *words]
    with contextlib.suppress(UserError):
        settings = read(words)
        if settings.warmup_steps < settings.batch_plan.steps:
            return settings
    # A user who gives no recipe and a length that is shorter than the demo recipe's warm-up has not asked for that warm-up.
    return read(["--schedule.warmup_steps=null", *words])


def _read(words: list[str], kind: type[Settings], description: str, aliases: Mapping[str, str]) -> Settings:
    """Return the settings that a command line gives, which has a recipe, a size or an init."""
    words = [_without_alias(word, aliases) for word in words]
    try:
        return read_settings(
            kind,
            [*expand_size_option(words), *expand_length_options(words), *words],
            description,
            aliases={**ALIASES, **aliases},
            defaults=_model_defaults,
            defaults_from=("init", "size"),
        )
    except UserError as error:
        if "(init " not in str(error):  # no value that follows from init
            raise
        advice = "Remove the settings that contradict those of init, which its weights fix, or start from other weights."
        raise UserError(f"{error}\n{advice}") from error


def _without_alias(word: str, aliases: Mapping[str, str]) -> str:
    """Return a word of the command line with the name of a setting in place of another name of it."""
    name, equals, value = word.partition("=")
    return f"{aliases.get(name, name)}{equals}{value}"


def expand_size_option(words: list[str]) -> list[str]:
    """Return the options --model.* that --size stands for. They replace the recipe's, and options of the user replace them."""
    sizes = [word.removeprefix("--size=") for word in words if word.startswith("--size=")]
    sizes += [value for name, value in itertools.pairwise(words) if name == "--size"]
    shape = _defaults_as_written() | _named_size(sizes[-1]) if sizes else {}
    return [f"--model.{name}={'null' if value is None else str(value).lower()}" for name, value in shape.items()]


def expand_length_options(words: list[str]) -> list[str]:
    """Return options that remove the recipe's length of training or warm-up if the command line gives it in the other unit."""
    pairs = [pair for pair in _OTHER_UNITS if has_option(words, pair[0]) and not has_option(words, pair[1])]
    return [f"{other}=null" for _, other in pairs]


def has_option(words: list[str], name: str) -> bool:
    """Return True if a command line has an option, as --name VALUE or --name=VALUE."""
    return any(word == name or word.startswith(f"{name}=") for word in words)


def _model_defaults(given: dict) -> dict:
    """Return the model settings of init, of the named size, or of every model, by dotted name."""
    if given.get("init") and not given.get("size"):  # both are refused by RunSettings.complaints
        shape = dataclasses.asdict(model_of_init(given["init"], given.get("output", RunSettings.output)))
    else:
        shape = _defaults_as_written() | (_named_size(given["size"]) if given.get("size") else {})
    return {f"model.{name}": value for name, value in shape.items()}


def _named_size(name: str) -> dict:
    try:
        return named_size(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def _defaults_as_written() -> dict:
    """Return the model's defaults. Those that follow from other settings stay open, so that they follow a given width."""
    return {field.name: field.default for field in dataclasses.fields(ModelConfig)}
