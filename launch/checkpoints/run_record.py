"""Files of a run folder next to its checkpoints: the recipe's data folders, the tokenizer, versions."""

import os
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path

from data.command_line import flatten
from data.recorded_paths import record_path
from data.tokenization.companions import GENERATION, companion_files, is_published_json
from data.tokenization.configuration import CONFIGURATION, read_json_object
from launch import REPOSITORY
from model.huggingface.folder import GENERATION_KEYS

_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tiktoken.model", "*.tiktoken")


def data_paths(recipe: dict) -> list[str]:
    """Data folders of a recorded recipe, as they were given. Versions before blends recorded one folder as text."""
    path = recipe["data"]["path"]
    return [path] if isinstance(path, str) else path


def record_paths(recipe: dict, run: Path) -> dict[str, list[dict[str, str]]]:
    """Return where the data, the initial weights and the teacher of a recipe are, by the setting's name, for the record of a run."""
    given = {"data.path": data_paths(recipe), "init": [recipe["init"]], "distillation.teacher": [recipe["distillation"]["teacher"]]}
    return {name: [record_path(path, run) for path in paths if path] for name, paths in given.items()}


def recorded_paths(record: dict, name: str) -> list[dict[str, str]]:
    """Return the recorded paths of a setting, from run.json or a checkpoint's manifest. Earlier versions recorded them as given."""
    if "paths" in record:
        return record["paths"][name]
    recipe = record["recipe"]
    given = data_paths(recipe) if name == "data.path" else [flatten(recipe).get(name)]
    return [{"given": path} for path in given if path]


def moved_paths(record: dict, run: Path, other: Path) -> dict:
    """Return run.json or a manifest of the run in `run` for a copy of it in `other`: the relative paths lead to the same places."""
    if "paths" not in record:
        return record
    paths = {
        name: [one | {"relative": os.path.relpath(run.resolve() / one["relative"], os.path.realpath(other))} for one in places]
        for name, places in record["paths"].items()
    }
    return record | {"paths": paths}


def data_stamps(folder: Path) -> list[dict[str, list[int]]]:
    """Size and time of the files of each data folder when the run in `folder` started last; nothing if it is not known."""
    try:
        return read_json_object(folder / "run.json").get("data_stamps", [])
    except ValueError:  # reported when the folder is inspected
        return []


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of the tokenizer in a folder: its own file first, then tokenizer_config.json and the other files that belong to it."""
    own = [path for pattern in _TOKENIZERS for path in sorted(folder.glob(pattern)) if path.is_file()]
    if is_published_json(folder):  # it has tokens that the tokenizer.model next to it lacks
        own.sort(key=lambda path: path.name != "tokenizer.json")
    configuration = folder / CONFIGURATION
    return [*own, *([configuration] if configuration.is_file() else []), *companion_files(folder)]


def find_tokenizer(folder: Path) -> Path | None:
    """File of the tokenizer in a folder; None if there is none."""
    own = [path for path in tokenizer_files(folder) if any(path.match(pattern) for pattern in _TOKENIZERS)]
    return own[0] if own else None


def generation_settings(folder: Path) -> dict:
    """Contents of the generation_config.json next to the weights; without one, the tokens that config.json names, as in transformers."""
    if (folder / GENERATION).is_file():
        return read_json_object(folder / GENERATION)
    config_json = read_json_object(folder / "config.json")
    return {key: config_json[key] for key in GENERATION_KEYS if config_json.get(key) is not None}


def versions() -> dict[str, str]:
    """Versions of Python, torch, DeepSpeed and Megabatch."""
    megabatch = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]  # in a container it may not be installed
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")} | {"megabatch": megabatch}
