"""The command line of every script: a frozen dataclass becomes its options, a user's mistake a message and exit status 2.

This module is in data/ because the scripts of both data/ and launch/ use it.
"""

import dataclasses
import difflib
import errno
import functools
import json
import operator
import os
import re
import signal
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

from data import ctrl_c_came
from data.ranges import violated_range

Settings = typing.TypeVar("Settings")

INTERRUPTED = "Interrupted."
"""Message after Ctrl-C."""

_USER_CAN_FIX = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE),
}
"""Errors of the operating system that a user can fix. A missing file is not one: each script checks the files that it is given."""
COMMAND_LINE = "command line"
DEFAULT = "default"
"""Two places where a value was set, as `origin_of` returns them. The others are paths of recipes."""


class UserError(ValueError):
    """A user's mistake: what was given, what is allowed, where it was set. Scripts print it and exit with status 2."""


class RankError(UserError):
    """A user's mistake that one rank sees and others may not. It names its rank or machine, and each rank prints its own."""


@dataclasses.dataclass(frozen=True)
class _Option:
    """One setting: a field of the settings class or of a section of it."""

    kind: object
    """Type without its range: jsonargparse would check a range with pydantic, and report it in pydantic's words."""
    range: object
    """Type with its range."""
    default: object
    help: str


@dataclasses.dataclass(frozen=True)
class _Given:
    """The values that a user gives: in recipes, the later over the earlier, and over them on the command line."""

    recipes: dict[str, dict]
    """Recipe's path -> values by dotted name."""
    words: list[str]
    """Words of the command line, each setting as --name=value."""

    @property
    def on_command_line(self) -> dict[str, str]:
        """Values of the command line by dotted name, as text."""
        return {name.removeprefix("--"): value for name, equals, value in (word.partition("=") for word in self.words) if equals}

    @property
    def values(self) -> dict:
        """Values by dotted name."""
        in_recipes = {name: value for recipe in self.recipes.values() for name, value in recipe.items()}
        return in_recipes | self.on_command_line

    @property
    def origins(self) -> dict[str, str]:
        """The place where each value was set: "command line", or the path of a recipe."""
        in_recipes = {name: path for path, recipe in self.recipes.items() for name in recipe}
        return in_recipes | dict.fromkeys(self.on_command_line, COMMAND_LINE)

    def without(self, name: str) -> "_Given":
        """Return the same values without those of one setting."""
        recipes = {path: {key: value for key, value in recipe.items() if key != name} for path, recipe in self.recipes.items()}
        return _Given(recipes, [word for word in self.words if not word.startswith(f"--{name}=")])


def read_settings(
    settings: type[Settings],
    arguments: Sequence[str],
    description: str,
    positional: str | None = None,
    aliases: dict[str, str] | None = None,
    defaults: Callable[[dict], dict] | None = None,
    defaults_from: Sequence[str] = (),
) -> Settings:
    """Return the settings that a command line gives, over the YAML recipes of --config FILE, over the defaults.

    `positional` names the field that is given without its name. `aliases` maps other names of options to their names.
    `defaults` takes the values given so far, flat by dotted name, and returns defaults that depend on them; `defaults_from` names the
    settings that it reads.
    Raises UserError with every complaint and where each value was set: unknown names, wrong types, values out of range, values that
    a section refuses with ValueError, and messages of the settings' own method `complaints()`, if it has one.
    """
    options, aliases = _options(settings), aliases or {}  # type: ignore[arg-type]  # mypy does not see that a class is hashable
    words = _normalize(arguments, options, aliases, takes_recipe=positional is None)
    paths = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    recipes = {path: _read_recipe(path, options, aliases) for path in paths}
    given = _Given(recipes, [word for word in words if not word.startswith("--config=")])
    derived = defaults(given.values) if defaults else {}
    derived_from = next((f"{name} {given.values[name]}" for name in defaults_from if name in given.values), DEFAULT)
    current = {name: dataclasses.replace(option, default=derived.get(name, option.default)) for name, option in options.items()}
    values = _parse(_parser(settings, current, description, positional, aliases), given, current)
    origins = dict.fromkeys(options, DEFAULT) | dict.fromkeys(derived, derived_from) | given.origins
    return _check(settings, values, options, origins)


def describe(settings: object, name: str) -> str:
    """Return a setting's name, its value and where it was set: "batch.global_batch_size 500 (launch/recipes/tiny.yaml)".

    The place is left out of settings that `read_settings` did not read.
    """
    origin = origin_of(settings, name)
    return f"{name} {as_text(operator.attrgetter(name)(settings))}{f' ({origin})' if origin else ''}"


def origin_of(settings: object, name: str) -> str | None:
    """Return where a setting was set: "command line", "default" or the path of a recipe. None if `read_settings` did not read it."""
    return getattr(settings, "_origins", {}).get(name)


def recipes_of(settings: object) -> list[str]:
    """Return the paths of the recipes that gave a value. Empty if `read_settings` did not read the settings."""
    return [origin for origin in dict.fromkeys(getattr(settings, "_origins", {}).values()) if Path(origin).is_file()]


def replace(settings: Settings, **changes: object) -> Settings:
    """Return the settings with other values for some fields. Unlike dataclasses.replace, it keeps the places where values were set."""
    changed = dataclasses.replace(settings, **changes)  # type: ignore[type-var]  # every settings class is a dataclass
    object.__setattr__(changed, "_origins", getattr(settings, "_origins", {}))
    return changed


def add_origins(message: str, settings: object) -> str:
    """Return a message with the place where it was set after each "name value" in it, for names with a dot."""
    origins = {name: origin for name, origin in getattr(settings, "_origins", {}).items() if "." in name}
    return _with_origins(message, {name: operator.attrgetter(name)(settings) for name in origins}, origins)


def as_text(value: object) -> str:
    """Return a value as it is written in a recipe."""
    if isinstance(value, tuple):
        return " ".join(map(as_text, value)) or "[]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def not_utf8(name: str, text: str) -> list[str]:
    """Return a message if a text of the command line is not valid UTF-8. (Paths may have any bytes.)"""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return [f"{name} is not valid UTF-8: it has the byte 0x{ord(text[error.start]) & 0xFF:02x} after {text[: error.start][-20:]!r}."]
    return []


def run_script(main: Callable[[Sequence[str]], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> None:
    """Call a script's main with the command line, and exit with the status that it returns.

    A UserError is printed once a machine, and the status is 2; so is an error of the operating system that a user can mend, such as a
    full disk. After Ctrl-C (KeyboardInterrupt, whose message names what is kept) the status is 130. `leave` ends the process.
    """
    try:
        status = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        status, message = status_and_message(error)
        if message is None:
            traceback.print_exc()
        elif isinstance(error, RankError) or _is_first_on_its_machine():
            print(message, end="\n" if message else "", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python prints a traceback for Ctrl-C while it ends
    leave(status or 0)


def status_and_message(error: Exception | KeyboardInterrupt) -> tuple[int, str | None]:
    """Return the exit status after an error, and the message for the user; None if it is a mistake of ours, which needs a traceback."""
    interruption = _interruption_behind(error)
    if interruption is not None or ctrl_c_came():
        return 128 + signal.SIGINT, str(interruption or "") or INTERRUPTED
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, BrokenPipeError):
        return 1, ""
    if isinstance(error, OSError) and error.errno in _USER_CAN_FIX:
        return 2, f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return 1, None


def _interruption_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the Ctrl-C that an error is or came from: a library may report an interrupted import as a missing module."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def nearest(word: str, allowed: Sequence[str]) -> str:
    """Return ' Did you mean "..."?' with the closest of the allowed words, or nothing if there is none."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def flatten(tree: dict, prefix: str = "") -> dict:
    """Return nested settings by dotted name."""
    flat: dict = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _is_first_on_its_machine() -> bool:
    """Read the launcher's variables, because a mistake may come before launch/ranks/processes.py has read them."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


@functools.cache  # finding the descriptions parses the source of each class, which is most of the time of reading a command line
def _options(settings: type, prefix: str = "") -> dict[str, _Option]:
    """Return the settings of a class and of its sections by dotted name."""
    options: dict[str, _Option] = {}
    kinds, ranges = typing.get_type_hints(settings), typing.get_type_hints(settings, include_extras=True)
    bases = [base for base in reversed(settings.__mro__) if dataclasses.is_dataclass(base)]
    entries = [entry for base in bases for entry in docstring_parser.parse_from_object(base).params]
    help_texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]  # a dataclass, which type[] cannot state
        name, kind = field.name, kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            options |= _options(kind, f"{prefix}{name}.")
        else:
            options[prefix + name] = _Option(kind, ranges[name], field.default, help_texts.get(name, ""))
    return options


def _parser(
    settings: type, options: dict[str, _Option], description: str, positional: str | None, aliases: dict[str, str]
) -> jsonargparse.ArgumentParser:
    """Return the parser of these options, one group a section."""
    usage = f"%(prog)s {positional.upper()} [options]" if positional else "%(prog)s [options]"
    parser = jsonargparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=_Formatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
    if positional is None:
        parser.add_argument("--config", metavar="FILE", action="config", help="Recipe: a YAML file with any of these settings, by name.")
    groups = {}
    for name, kind in typing.get_type_hints(settings).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            summary = (kind.__doc__ or "").partition("\n")[0]
            groups[name] = parser.add_argument_group(name, None if summary.startswith(f"{kind.__name__}(") else summary)
    for name, option in options.items():
        text = " ".join([option.help, *_default_as_sentence(option), *_aliases_as_sentence(name, aliases)])
        if name == positional:
            parser.add_argument(name, metavar=name.upper(), help=text)
            continue
        group = groups.get(name.rpartition(".")[0], parser)
        how: dict = {"required": True} if option.default is dataclasses.MISSING else {"default": option.default}
        group.add_argument(f"--{name}", type=option.kind, metavar=_metavar(option.kind), help=text, **how)
    return parser


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """jsonargparse's help without the types and defaults that it adds to each description."""

    def _get_help_string(self, action: object) -> str:
        return getattr(action, "help", None) or ""


def _default_as_sentence(option: _Option) -> list[str]:
    if option.default is dataclasses.MISSING:
        return ["Required."]
    is_stated = option.default in (None, (), "") or "(default: " in option.help
    return [] if is_stated else [f"Default: {as_text(option.default)}."]


def _aliases_as_sentence(name: str, aliases: dict[str, str]) -> list[str]:
    others = [alias for alias, option in aliases.items() if option == f"--{name}"]
    return [f"Also {' or '.join(others)}."] if others else []


def _metavar(kind: object) -> str:
    kind = next((part for part in typing.get_args(kind) if part is not type(None)), kind) if _is_union(kind) else kind
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    if typing.get_origin(kind) is tuple:
        return f"{_metavar(typing.get_args(kind)[0])} ..."
    return {bool: "{true,false}", int: "N", float: "NUMBER"}.get(kind, "TEXT")  # type: ignore[call-overload]


def _normalize(arguments: Sequence[str], options: dict[str, _Option], aliases: dict[str, str], takes_recipe: bool) -> list[str]:
    """Return each setting as one word --name=value: aliases replaced, --flag made true, the words after a list's name made one list."""
    kinds: dict[str, object] = {name: option.kind for name, option in options.items()} | ({"config": str} if takes_recipe else {})
    result: list[str] = []
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
            raise UserError(f"{name} is given twice; give all its values after one {name}.")
        lists_given |= {name} if is_list else set()
        if kind is None:
            result.append(word)
        elif is_list and not (equals and value.startswith("[")):
            items = [value] if equals else []
            while not equals and words and not words[0].startswith("--"):
                items.append(words.pop(0))
            result.append(f"{name}={json.dumps(items)}")
        elif equals:
            result.append(f"{name}={value}")
        elif kind in (bool, bool | None) and (not words or words[0].lower() not in ("true", "false", "null")):
            result.append(f"{name}=true")
        elif not words or words[0].startswith("--"):
            raise UserError(f"{name} needs a value.")
        else:
            result.append(f"{name}={words.pop(0)}")
    return result


def _members(group: str, names: typing.Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{group}.")]


def _read_recipe(path: str, options: dict[str, _Option], aliases: dict[str, str]) -> dict:
    """Return the values of a recipe, flat by dotted name. One value for a list becomes a list of it, as on the command line."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} holds a {type(recipe).__name__}; a recipe is names with values.")
    flat = {aliases.get(f"--{name}", f"--{name}").removeprefix("--"): value for name, value in flatten(recipe).items()}
    complaints = []
    for name, value in flat.items():
        if members := _members(name, options):
            complaints.append(f'{path}: "{name}" is a group of settings: {", ".join(members)}.')
        elif name not in options:
            complaints.append(f'{path}: unknown setting "{name}".{nearest(name, list(options))} --help lists them all.')
        elif value is None and "null" not in _allowed(options[name].kind):  # jsonargparse would accept it
            complaints.append(f"{name} is null; it must be {_choices(options[name].kind)}. Set in {path}.")
        elif typing.get_origin(options[name].kind) is tuple and not isinstance(value, list):
            flat[name] = [value]
    if complaints:
        raise UserError("\n".join(complaints))
    return flat


def _parse(parser: jsonargparse.ArgumentParser, given: _Given, options: dict[str, _Option]) -> dict:
    """Return the value of every setting. Raises UserError with every value of a wrong type."""
    complaints: list[str] = []
    while True:
        # A recipe lies under the command line, wherever it is named there.
        recipes = [f"--config={yaml.safe_dump(recipe)}" for recipe in given.recipes.values() if recipe]
        try:
            namespace = parser.parse_args([*recipes, *given.words])
            break
        except (jsonargparse.ArgumentError, TypeError) as error:
            name, complaint = _explain(str(error), given, options)
            complaints.append(complaint)
            if name not in given.values:
                break
            given = given.without(name)
    if complaints:
        raise UserError("\n".join(complaints))
    # jsonargparse leaves a default as it is, and one that was read from JSON is a list.
    values = {name: tuple(value) if isinstance(value := namespace[name], list) else value for name in options}
    return values | _not_read_by_yaml(given, options)


def _not_read_by_yaml(given: _Given, options: dict[str, _Option]) -> dict[str, str]:
    """Return texts such as ### and ---, which jsonargparse reads as YAML: a comment or an empty document, hence null."""
    text_or_null = {name for name, option in options.items() if set(typing.get_args(option.kind)) == {str, type(None)}}
    return {name: value for name, value in given.on_command_line.items() if name in text_or_null and value.startswith(("#", "---"))}


def _explain(message: str, given: _Given, options: dict[str, _Option]) -> tuple[str, str]:
    """Return the setting that jsonargparse complains about, or "", and the complaint in the words of this project."""
    message = " ".join(message.split())
    if unknown := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message, re.I):
        return "", f'Unknown setting "{unknown.group(1)}".{nearest(unknown.group(1), list(options))} --help lists them all.'
    if missing := re.search(r"arguments are required: ([\w.]+)", message):
        return "", f"{missing.group(1)} is missing. --help shows how to give it."
    wrong = re.match(r'Parser key "([^"]+)": .*(?:Got value|Given value): (.*)$', message)
    if not wrong or wrong.group(1) not in options:
        return "", message
    name, value = wrong.groups()
    allowed = _allowed(options[name].kind)
    hint = nearest(value, allowed) if len(allowed) > 1 else ""
    return name, f"{name} is {value}; it must be {_choices(options[name].kind)}.{hint}{_set_in(given.origins.get(name, DEFAULT))}"


def _choices(kind: object) -> str:
    return joined_by_or(_allowed(kind))


def joined_by_or(words: Sequence[str]) -> str:
    """Return "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _allowed(kind: object) -> list[str]:
    """Return the values that a setting of this type may have, in words."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    if _is_union(kind):
        return [words for part in typing.get_args(kind) for words in _allowed(part)]
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return [f"a list of {({int: 'whole numbers', float: 'numbers', str: 'texts'}).get(item) or _choices(item)}"]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return [names.get(kind, str(kind))]  # type: ignore[call-overload]


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _set_in(origin: str) -> str:
    return {COMMAND_LINE: " Set on the command line.", DEFAULT: ""}.get(origin, f" Set in {origin}.")


def _check(settings: type[Settings], values: dict, options: dict[str, _Option], origins: dict[str, str]) -> Settings:
    """Return the settings object. Raises UserError with everything that is wrong with its values.

    A value that is out of range, and a section that refuses its values, is replaced by its default, so that the rest can be checked.
    """
    wrong = {name: allowed for name, option in options.items() if (allowed := violated_range(option.range, values[name]))}
    complaints = [f"{name} is {as_text(values[name])}; it must be {allowed}.{_set_in(origins[name])}" for name, allowed in wrong.items()]
    if any(options[name].default is dataclasses.MISSING for name in wrong):
        raise UserError("\n".join(complaints))
    values = values | {name: options[name].default for name in wrong}
    result, refused = _build(settings, values)
    for section, message in refused.items():
        complaints.append(_with_origins(message, values, {name: origins[name] for name in _members(section, origins)}))
    object.__setattr__(result, "_origins", origins)
    unknown = [*wrong, *(f"{section}." for section in refused)]
    for complaint in getattr(result, "complaints", list)():
        if not any(re.search(rf"(?<![\w.]){re.escape(name)}", complaint) for name in unknown):
            complaints.append(complaint)
    if complaints:
        raise UserError("\n".join(complaints))
    return result


def _build(settings: type[Settings], values: dict, prefix: str = "") -> tuple[Settings, dict[str, str]]:
    """Return the settings object, and for each section that refused its values and has its defaults the message."""
    fields: dict = {}
    refused: dict[str, str] = {}
    for name, kind in typing.get_type_hints(settings).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            fields[name], inside = _build(kind, values, f"{prefix}{name}.")
            refused |= inside
        else:
            fields[name] = values[prefix + name]
    try:
        return settings(**fields), refused
    except ValueError as error:
        if not prefix:
            raise UserError("\n".join([*refused.values(), str(error)])) from error
        return settings(), refused | {prefix.removesuffix("."): str(error)}


def _with_origins(message: str, values: dict, origins: dict[str, str]) -> str:
    """Return a message with the origin after each "name value" or "name is value" in it."""
    for name, origin in origins.items():
        pair = rf'(?<![\w.])({re.escape(name)}(?: is)? "?{re.escape(as_text(values[name]))}"?)(?![\w.]*\w)'
        message = "".join(part + (f" ({origin})" if number % 2 else "") for number, part in enumerate(re.split(pair, message)))
    return message
