"""Files of a run folder next to its checkpoints: the recipe's data folders, the tokenizer, versions."""

import json
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path

from launch import REPOSITORY

TOKENIZER_CONFIGURATION = "tokenizer_config.json"


def read_json(path: Path) -> dict:
    """Return the contents of a JSON file; an empty dict if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def data_paths(recipe: dict) -> list[str]:
    """Data folders of a recorded recipe. Versions before blends recorded one folder as text."""
    path = recipe["data"]["path"]
    return [path] if isinstance(path, str) else path


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of the tokenizer in a folder: its own file first, tokenizer_config.json last."""
    patterns = ("tokenizer.model", "tokenizer.json", "tiktoken.model", "*.tiktoken", TOKENIZER_CONFIGURATION)
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def find_tokenizer(folder: Path) -> Path | None:
    """File of the tokenizer in a folder; None if there is none."""
    return next((path for path in tokenizer_files(folder) if path.name != TOKENIZER_CONFIGURATION), None)


def versions() -> dict[str, str]:
    """Versions of Python, torch, DeepSpeed and Megabatch."""
    megabatch = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]  # in a container it may not be installed
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")} | {"megabatch": megabatch}
