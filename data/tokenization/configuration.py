"""The tokenizer_config.json next to a tokenizer's file."""

import json
from pathlib import Path

from data.command_line import UserError

CONFIGURATION = "tokenizer_config.json"


def read_configuration(folder: Path) -> dict:
    path = folder / CONFIGURATION
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not JSON with a name and value for each setting: {error}.") from error


def configured_end(folder: Path) -> str | None:
    """`eos_token` as Hugging Face writes it: a string, or an added token with its content."""
    token = read_configuration(folder).get("eos_token")
    return token["content"] if isinstance(token, dict) else token
