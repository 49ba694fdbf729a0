"""The tokenizer_config.json next to a tokenizer's file."""

import json
from pathlib import Path

from data.command_line import UserError

CONFIGURATION = "tokenizer_config.json"


def read_configuration(folder: Path) -> dict:
    """Return the settings in a folder's tokenizer_config.json; empty if there is no such file."""
    return read_json_object(folder / CONFIGURATION)


def read_json_object(path: Path) -> dict:
    """Return the JSON object of a file, with or without a byte-order mark; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object: {error}.") from error


def configured_end(folder: Path) -> str | None:
    """Return the `eos_token` of a folder's tokenizer_config.json: a string, or the content of an added token; None if it has none."""
    return token_content(read_configuration(folder).get("eos_token"))


def token_content(token: str | dict | None) -> str | None:
    """Return the text of a token, which a tokenizer_config.json holds as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token
