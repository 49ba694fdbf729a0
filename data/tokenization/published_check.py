"""Comparison of a written tokenizer with the published one that it was made from, as transformers reads both."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers

from data.command_line import UserError
from data.tokenization.companions import ROLES, role_tokens
from data.tokenization.tokenizer import Tokenizer

_TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "  And\n3 + 3? "},
]
_CHATS = {"a chat": _TURNS, "a chat with a system message": [{"role": "system", "content": "Be brief."}, *_TURNS]}


def is_class_of_transformers(configuration: Mapping[str, Any]) -> bool:
    """Return True if the class that a tokenizer_config.json names is one of transformers, or if it names none."""
    return hasattr(transformers, configuration.get("tokenizer_class") or "AutoTokenizer")


def check_published_tokenizer(folder: Path, original: Tokenizer, roles: Mapping[str, str]) -> None:
    """Raise UserError if AutoTokenizer reads `folder` otherwise than the files that `original` was read from.

    Compared are the roles of special tokens, the ids of texts that name special tokens, and the ids of chats. `roles` names the tokens
    whose roles may differ. If the original is not a tokenizer.json, other software converts it in other ways, so only roles are compared.
    """
    try:
        written: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if original.path.suffix == ".json":
            theirs: Any = type(written).from_pretrained(original.path.parent, local_files_only=True)
            for role, token in roles.items():
                if getattr(theirs, role) != token:
                    setattr(theirs, role, token)
    except Exception as error:  # transformers raises errors of any type
        raise UserError(f"{original.path}: transformers cannot read this tokenizer: {error}") from error
    if original.path.suffix != ".json":
        expected = role_tokens(original.path.parent) | dict(roles)
        found = {role: token for role in ROLES if (token := getattr(written, role)) is not None}
        _compare(original.path, "roles of special tokens", expected, found)
        return
    for what, ours, other in _comparisons(written, theirs):
        _compare(original.path, what, other, ours)


def _comparisons(written: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (what is compared, value of the written tokenizer, value of the original)."""
    text = " a".join(dict.fromkeys([*theirs.all_special_tokens, *map(str, theirs.added_tokens_decoder.values())]))
    values: dict[str, Callable[[Any], Any]] = {
        "roles of special tokens": lambda one: {role: (getattr(one, role), getattr(one, f"{role}_id")) for role in ROLES},
        "special tokens": lambda one: sorted(zip(one.all_special_ids, one.all_special_tokens, strict=True)),
        "a text with all special tokens": lambda one: one(text, add_special_tokens=False)["input_ids"],
        "chat templates": lambda one: one.chat_template,
    }
    for what, value_of in values.items():
        yield what, value_of(written), value_of(theirs)
    templates = theirs.chat_template if isinstance(theirs.chat_template, dict) else {"default": theirs.chat_template}
    for name, template in templates.items():
        for chat, turns in _CHATS.items() if template is not None else ():
            yield f'{chat} by template "{name}"', _chat_ids(written, turns, template), _chat_ids(theirs, turns, template)


def _chat_ids(tokenizer: Any, turns: list[dict[str, str]], template: str) -> list[int] | str:
    """Return the ids of a chat, or the error of a template that does not allow it."""
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise errors of their own
        return f"{type(error).__name__}: {error}"


def _compare(path: Path, what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise UserError(f"{path} was written as a tokenizer that differs from it in {what}: {found}, and not {expected}.")
