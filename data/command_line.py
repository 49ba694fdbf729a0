"""What every door shares: a frozen dataclass becomes its command line, and a person's mistake one sentence and status 2.

It lies in data/ because both prepare.py and the doors of launch/ stand on it.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import docstring_parser
import jsonargparse
import yaml

Settings = typing.TypeVar("Settings")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UserError(ValueError):
    """A person's mistake: what was given, what is allowed, where it was set. Doors print it and exit with status 2."""


def read_settings(
    settings: type[Settings],
    arguments: Sequence[str],
    description: str,
    positional: str | None = None,
    aliases: dict[str, str] | None = None,
    defaults: Callable[[dict], dict] | None = None,
) -> Settings:
    """The settings that a command line gives, with a YAML recipe under it where it says --config FILE.

    `positional` names the field that is given without its name; `aliases` maps other spellings of options to fields;
    `defaults` sees what was given so far, flat by dotted name, and returns defaults that depend on it. Unknown names, wrong
    types and values outside the allowed ones raise UserError.
    """
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False, default_env=False)
    if positional is None:
        parser.add_argument("--config", action="config", help="recipe: a YAML file with any of the settings below, by name")
    else:
        parser.add_argument(positional, help=_field_help(settings, positional))
    parser.add_class_arguments(settings, as_group=False, skip={positional} if positional else set())
    spelt = _spell_out(arguments, settings, aliases or {})
    recipes = [place for place, word in enumerate(spelt) if word == "--config" or word.startswith("--config=")]
    for place in reversed(recipes):  # a recipe lies under the command line wherever it is named
        words = spelt[place : place + (2 if spelt[place] == "--config" else 1)]
        del spelt[place : place + len(words)]
        spelt = words + spelt
        _check_recipe(words[-1].removeprefix("--config="), parser)
    try:
        if defaults is not None:
            parser.set_defaults(defaults(_given(spelt)))
        namespace = parser.parse_args(spelt)
        values = vars(parser.instantiate(namespace))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise UserError(_one_sentence(str(error), parser)) from error
    values.pop("config", None)
    return settings(**values)


def run_door(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call a door with the command line; its status is the process's. A UserError is printed by rank 0 alone, status 2."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(error, file=sys.stderr)
        status = 2
    except BrokenPipeError:
        status = 1
    sys.exit(status or 0)


def nearest(word: str, allowed: Sequence[str]) -> str:
    """' Did you mean "..."?' with the closest of the allowed words, or nothing where there is none."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def _spell_out(arguments: Sequence[str], settings: type, aliases: dict[str, str]) -> list[str]:
    """Aliases replaced; a bare --claim becomes --claim=true; the words behind a list's name become one list."""
    kinds = _field_types(settings)
    spelt: list[str] = []
    words = list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        name = aliases.get(name, name)
        kind = kinds.get(name.removeprefix("--")) if not equals else None
        if kind is bool and (not words or words[0].lower() not in ("true", "false")):
            spelt.append(f"{name}=true")
        elif typing.get_origin(kind) is tuple:
            items = []
            while words and not words[0].startswith("--"):
                items.append(words.pop(0))
            spelt.append(f"{name}={json.dumps(items)}")
        else:
            spelt.append(name + equals + value)
    return spelt


def _field_types(settings: type, prefix: str = "") -> dict[str, object]:
    types: dict[str, object] = {}
    for name, kind in typing.get_type_hints(settings).items():
        types |= _field_types(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return types


def _option_names(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _field_help(settings: type, field: str) -> str:
    documented = docstring_parser.parse_from_object(settings).params
    return next((entry.description or "" for entry in documented if entry.arg_name == field), "")


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _read_recipe(path: str) -> dict:
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe or {}, dict):
        raise UserError(f"--config {path} holds a {type(recipe).__name__}; a recipe is names with values.")
    return recipe or {}


def _check_recipe(path: str, parser: jsonargparse.ArgumentParser) -> None:
    allowed = _option_names(parser)
    for name in _flatten(_read_recipe(path)):
        if name not in allowed:
            raise UserError(f'{path}: unknown setting "{name}".{nearest(name, allowed)} --help lists them all.')


def _given(arguments: Sequence[str]) -> dict:
    """What the recipe and the command line give, flat by dotted name, before any default."""
    given: dict = {}
    words = list(arguments)
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name] = value if equals else (words[place + 1] if place + 1 < len(words) else "")
            if name == "config":
                given |= _flatten(_read_recipe(given.pop(name)))
    return given


def _one_sentence(message: str, parser: jsonargparse.ArgumentParser) -> str:
    if unknown := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message, re.I):
        return f'Unknown setting "{unknown.group(1)}".{nearest(unknown.group(1), _option_names(parser))} --help lists them all.'
    message = re.sub(r"^Parser key", "Setting", " ".join(message.split()))
    return re.sub(r"typing\.|<class '(\w+)'>", r"\1", message)
