"""The files next to a tokenizer's file that belong to it: the roles of its special tokens and its chat templates.

Hugging Face's transformers writes them and reads them. They hold data only: the code that a folder may bring along (`auto_map`) is never
copied.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.tokenization.configuration import CONFIGURATION, read_configuration, read_json_object, token_content

GENERATION = "generation_config.json"
"""Name of the file with the tokens that end a generated text, and with the sampling settings of the model's makers."""
_SPECIAL_TOKENS = "special_tokens_map.json"
_FILES = (_SPECIAL_TOKENS, "added_tokens.json", "chat_template.jinja", "chat_template.json")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_MORE_TEMPLATES = "additional_chat_templates"
_OURS = {"bos_token", "eos_token", "add_bos", "pat_str", "added_tokens_decoder"}  # what copy_tokenizer writes for any tokenizer
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Roles of special tokens, as tokenizer_config.json and special_tokens_map.json name them."""


def companion_files(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to its tokenizer, without the tokenizer's own file and tokenizer_config.json."""
    return [path for path in (*(folder / name for name in _FILES), *sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))) if path.is_file()]


def licence_files(folder: Path) -> list[Path]:
    """Return the licence, notice and use policy in a folder, which its makers may require to be passed on with each copy."""
    return sorted(path for path in folder.glob("*") if path.name.upper().startswith(_LICENCES) and path.is_file())


def copy_companions(source: Path, target: Path, configuration: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    """Copy the files that belong to the tokenizer of one folder into another folder, and write its tokenizer_config.json.

    `configuration` is the content of that file, and `roles` names tokens whose roles (such as eos_token) differ from those of the source.
    """
    for path in companion_files(source):
        copy = target / path.relative_to(source)
        if not copy.exists() or not copy.samefile(path):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    write_json(target / CONFIGURATION, _with_roles(configuration, roles))
    if (path := target / _SPECIAL_TOKENS).is_file() and (given := read_json_object(path)) != (changed := _with_roles(given, roles)):
        write_json(path, changed)


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a JSON object with a key on each line."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_roles(given: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    return {**given} | {role: token for role, token in roles.items() if token_content(given.get(role)) != token}


def published_configuration(folder: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json that the tokenizer of a folder was published with, without code.

    It is empty for a tokenizer that was trained by data/prepare.py, and for a tokenizer's file without other files.
    """
    configuration = {key: value for key, value in read_configuration(folder).items() if key != "auto_map"}
    return configuration if configuration.keys() - _OURS or companion_files(folder) else {}


def is_published_json(folder: Path) -> bool:
    """Return True if transformers wrote a folder's tokenizer.json, and False if it was converted here from a tokenizer.model.

    transformers 4 writes `added_tokens_decoder` into tokenizer_config.json, and transformers 5 `backend`; launch/export.py writes neither.
    """
    return (folder / "tokenizer.json").is_file() and not {"added_tokens_decoder", "backend"}.isdisjoint(read_configuration(folder))


def role_tokens(folder: Path) -> dict[str, str]:
    """Return the token of each role that the files next to a tokenizer name.  -> role: token"""
    given = read_json_object(folder / _SPECIAL_TOKENS) | read_configuration(folder)
    return {role: token for role in ROLES if (token := token_content(given.get(role))) is not None}


def end_ids(folder: Path) -> list[int]:
    """Return the ids that end a generated text by the generation_config.json of a folder; none if it has none."""
    given = read_json_object(folder / GENERATION).get("eos_token_id")
    return given if isinstance(given, list) else [] if given is None else [given]


def chat_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by name; the usual one is named "default". Files are preferred to tokenizer_config.json."""
    named = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if (path := folder / "chat_template.jinja").is_file():
        named["default"] = path.read_text(encoding="utf-8")
    if named:
        return named
    given = read_configuration(folder).get("chat_template") or read_json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return {"default": given} if given else {}
