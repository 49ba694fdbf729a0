"""What a run folder holds besides its checkpoints, as every reader of a run needs it."""

import json
import platform
import tomllib
from importlib.metadata import version
from pathlib import Path

from launch import REPOSITORY

TOKENIZER_CONFIGURATION = "tokenizer_config.json"


def read_json(path: Path) -> dict:
    """What a file holds; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def data_paths(recipe: dict) -> list[str]:
    """The folders of data in a recipe that was written down; versions before blends wrote one, as text."""
    path = recipe["data"]["path"]
    return [path] if isinstance(path, str) else path


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer in a folder, and behind it what its file does not hold."""
    patterns = ("tokenizer.model", "tokenizer.json", "tiktoken.model", "*.tiktoken", TOKENIZER_CONFIGURATION)
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer in a folder."""
    return next((path for path in tokenizer_files(folder) if path.name != TOKENIZER_CONFIGURATION), None)


def versions() -> dict[str, str]:
    ours = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]  # it need not be installed, in a container
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "deepspeed")} | {"megabatch": ours}
