"""The post-processor of a tokenizer.json, which puts special tokens around a text, set so that it begins texts as the tokenizer does."""

import json
import os
from pathlib import Path

import tokenizers

from data.command_line import UserError
from data.tokenization.configuration import read_configuration
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.tokenizer import Tokenizer

_FRAMES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Kinds of post-processors that add special tokens; the others change offsets alone."""


def begin_like(tokenizer: Tokenizer, path: Path) -> None:
    """Change a tokenizer.json, if necessary, so that it puts `tokenizer.beginning` before a text and nothing after it.

    A tokenizer that was published with other special tokens around a text stays as it is, unless add_bos was set.
    Raises UserError if the file then gives other ids for a text than a document begins with.
    """
    if not tokenizer.adds_bos and "add_bos" not in read_configuration(tokenizer.path.parent):
        return
    written = tokenizers.Tokenizer.from_file(os.fspath(path))
    if written.encode("a").ids != tokenizer.beginning + written.encode("a", add_special_tokens=False).ids:
        contents = json.loads(path.read_text(encoding="utf-8"))
        contents["post_processor"] = _with_beginning(contents.get("post_processor"), tokenizer)
        path.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
        written = tokenizers.Tokenizer.from_file(os.fspath(path))
    written.encode_special_tokens = True
    written.no_truncation()
    for text in texts_of_many_kinds(tokenizer):
        if written.encode(text).ids != tokenizer.beginning + written.encode(text, add_special_tokens=False).ids:
            raise UserError(f"{tokenizer.path} cannot be written as a tokenizer.json: it would begin {text[:80]!r} with other tokens.")


def _with_beginning(processor: dict | None, tokenizer: Tokenizer) -> dict | None:
    """Return a post-processor without the parts that add special tokens, and with one that adds `tokenizer.beginning`."""
    steps = processor.get("processors", [processor]) if processor else []
    steps = [step for step in steps if step["type"] not in _FRAMES]
    if tokenizer.beginning:
        token = tokenizer.begin_of_text_token
        marks = [{"SpecialToken": {"id": token, "type_id": side}} for side in (0, 1)]
        texts = [{"Sequence": {"id": name, "type_id": side}} for side, name in enumerate("AB")]
        steps.append(
            {
                "type": "TemplateProcessing",
                "single": [marks[0], texts[0]],
                "pair": [marks[0], texts[0], marks[1], texts[1]],
                "special_tokens": {token: {"id": token, "ids": tokenizer.beginning, "tokens": [token]}},
            }
        )
    return {"type": "Sequence", "processors": steps} if len(steps) > 1 else steps[0] if steps else None
