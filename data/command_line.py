"""What every door shares: a frozen dataclass becomes its command line, and a person's mistake one sentence and status 2.

It lies in data/ because both prepare.py and the doors of launch/ stand on it.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import docstring_parser
import jsonargparse
import yaml

Settings = typing.TypeVar("Settings")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UserError(ValueError):
    """A person's mistake: what was given, what is allowed, where it was set. Doors print it and exit with status 2."""


class RankError(UserError):
    """A person's mistake that one rank sees and others may not: it names its rank or machine, and each rank prints its own."""


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
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False, default_env=False, allow_abbrev=False)
    if positional is None:
        parser.add_argument("--config", action="config", help="recipe: a YAML file with any of the settings below, by name")
    else:
        parser.add_argument(positional, help=_field_help(settings, positional))
    parser.add_class_arguments(settings, as_group=False, skip={positional} if positional else set())
    kinds = _field_types(settings)
    for action in parser._actions:
        if _members(action.dest, kinds):  # jsonargparse would let a whole group come from a file of its own
            action.help = jsonargparse.SUPPRESS
    words = _spell_out(arguments, kinds | ({"config": str} if positional is None else {}), aliases or {})
    paths = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    recipes = {path: _read_recipe(path, kinds) for path in paths}
    given = [word for word in words if not word.startswith("--config=")]
    in_recipes = {name: value for recipe in recipes.values() for name, value in recipe.items()}
    try:
        if defaults is not None:
            in_words = {name.removeprefix("--"): value for name, equals, value in (word.partition("=") for word in given) if equals}
            parser.set_defaults(defaults(in_recipes | in_words))
        # A recipe lies under the command line wherever it is named.
        namespace = parser.parse_args([f"--config={yaml.safe_dump(recipe)}" for recipe in recipes.values() if recipe] + given)
        values = vars(parser.instantiate(namespace))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise UserError(_one_sentence(str(error), kinds, given, recipes)) from error
    values.pop("config", None)
    return settings(**(values | _taken_for_nothing(given, kinds)))


def run_door(main: Callable[[Sequence[str]], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> None:
    """Call a door with the command line; its status is the process's. A UserError is status 2, said once a machine."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        if isinstance(error, RankError) or _is_first_on_its_machine():
            print(error, file=sys.stderr)
        status = 2
    except BrokenPipeError:
        status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    leave(status or 0)


def _is_first_on_its_machine() -> bool:
    """As the launcher says: also before launch/ranks/processes.py has read it."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def nearest(word: str, allowed: Sequence[str]) -> str:
    """' Did you mean "..."?' with the closest of the allowed words, or nothing where there is none."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested settings by dotted name."""
    flat: dict = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _spell_out(arguments: Sequence[str], kinds: dict[str, object], aliases: dict[str, str]) -> list[str]:
    """Every setting as one word --name=value: aliases replaced, a bare claim made true, the words behind a list's name one list."""
    spelt: list[str] = []
    lists_given: set[str] = set()
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = aliases.get(name, name)
        if members := _members(name.removeprefix("--"), kinds) if name.startswith("--") else []:
            raise UserError(f"{name} is a group of settings; give one of them: {', '.join('--' + member for member in members)}.")
        kind = kinds.get(name.removeprefix("--")) if name.startswith("--") else None
        is_list = typing.get_origin(kind) is tuple
        if is_list and name in lists_given:
            raise UserError(f"{name} is given twice; name all its values behind one {name}.")
        lists_given |= {name} if is_list else set()
        if kind is None:
            spelt.append(word)
        elif is_list and not (equals and value.startswith("[")):
            items = [value] if equals else []
            while not equals and words and not words[0].startswith("--"):
                items.append(words.pop(0))
            spelt.append(f"{name}={json.dumps(items)}")
        elif equals:
            spelt.append(f"{name}={value}")
        elif kind is bool and (not words or words[0].lower() not in ("true", "false")):
            spelt.append(f"{name}=true")
        elif not words or words[0].startswith("--"):
            raise UserError(f"{name} needs a value.")
        else:
            spelt.append(f"{name}={words.pop(0)}")
    return spelt


def _taken_for_nothing(words: list[str], kinds: dict[str, object]) -> dict[str, str]:
    """Texts such as ### and --- that YAML, as which jsonargparse reads what may be null, takes for a comment or an empty document."""
    given = {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in words)}
    may_be_text_or_null = {name for name, kind in kinds.items() if set(typing.get_args(kind)) == {str, type(None)} and "." not in name}
    return {name: value for name, value in given.items() if name in may_be_text_or_null and value.startswith(("#", "---"))}


def _members(group: str, kinds: dict[str, object]) -> list[str]:
    return [name for name in kinds if name.startswith(f"{group}.")]


def _field_types(settings: type, prefix: str = "") -> dict[str, object]:
    types: dict[str, object] = {}
    for name, kind in typing.get_type_hints(settings).items():
        types |= (
            _field_types(kind, f"{prefix}{name}.") if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {prefix + name: kind}
        )
    return types


def _field_help(settings: type, field: str) -> str:
    documented = docstring_parser.parse_from_object(settings).params
    return next((entry.description or "" for entry in documented if entry.arg_name == field), "")


def _read_recipe(path: str, kinds: dict[str, object]) -> dict:
    """What a recipe gives, flat by dotted name; one value for a list is a list of it, as on the command line."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} holds a {type(recipe).__name__}; a recipe is names with values.")
    flat = flatten(recipe)
    for name in flat:
        if members := _members(name, kinds):
            raise UserError(f'{path}: "{name}" is a group of settings: {", ".join(members)}.')
        if name not in kinds:
            raise UserError(f'{path}: unknown setting "{name}".{nearest(name, list(kinds))} --help lists them all.')
        if flat[name] is None and "null" not in _allowed(kinds[name]):  # jsonargparse would take it
            raise UserError(f"{name} is null; it must be {_choices(kinds[name])}. Set in {path}.")
        if typing.get_origin(kinds[name]) is tuple and not isinstance(flat[name], list):
            flat[name] = [flat[name]]
    return flat


def _one_sentence(message: str, kinds: dict[str, object], given: list[str], recipes: dict[str, dict]) -> str:
    """jsonargparse's complaint in the words of this project, and where the setting was given."""
    message = " ".join(message.split())
    if unknown := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message, re.I):
        return f'Unknown setting "{unknown.group(1)}".{nearest(unknown.group(1), list(kinds))} --help lists them all.'
    wrong = re.match(r'Parser key "([^"]+)": .*(?:Got value|Given value): (.*)$', message)
    if not wrong or wrong.group(1) not in kinds:
        return message
    name, value = wrong.groups()
    allowed = _allowed(kinds[name])
    hint = nearest(value, allowed) if len(allowed) > 1 else ""
    where = [path for path, recipe in recipes.items() if name in recipe][-1:]
    place = f" Set in {where[0]}." if where and not any(word.startswith(f"--{name}=") for word in given) else ""
    return f"{name} is {value}; it must be {_choices(kinds[name])}.{hint}{place}"


def _choices(kind: object) -> str:
    *others, last = _allowed(kind)
    return f"{', '.join(others)} or {last}" if others else last


def _allowed(kind: object) -> list[str]:
    """What a setting of this type may be, in words."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [words for part in typing.get_args(kind) for words in _allowed(part)]
    if typing.get_origin(kind) is tuple:
        return ["a list"]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return [names.get(kind, str(kind))]  # type: ignore[call-overload]
