"""Writing a tokenizer as a folder that Hugging Face's AutoTokenizer reads, with the same ids as ours.

This module imports transformers, which takes half a second. huggingface_files.py has what other scripts need.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import processors

from data.tokenization.companions import copy_companions, published_configuration, write_json
from data.tokenization.configuration import CONFIGURATION
from data.tokenization.conversion import convert
from data.tokenization.huggingface_files import compare_ids, padding
from data.tokenization.loading import load_tokenizer
from data.tokenization.post_processor import begin_like
from data.tokenization.published_check import check_published_tokenizer, is_class_of_transformers
from data.tokenization.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenization.tokenizer import Tokenizer


def write_tokenizer(
    tokenizer_file: str | Path,
    folder: str | Path,
    model_max_length: int,
    end_of_text: str | None = None,
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder",
    class_token: str = "[CLS]",
    mask_token: str = "[MASK]",
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`, which can be read without sentencepiece and without our code.

    A tokenizer.json is copied, a tiktoken vocabulary is converted, and a SentencePiece `.model` (bpe or unigram) is converted and also
    copied. The ids of the written file are compared with ours on texts of many kinds. UserError is raised if one differs, or if the
    `.model` has a feature that a tokenizer.json cannot express. `end_of_text` is that of load_tokenizer.

    For a decoder, the written tokenizer begins a text as a document begins in training: with the begin-of-text token or not.

    The files that a published tokenizer has next to it (roles of special tokens, chat templates) are copied. Only the roles that the model
    was trained with are changed: end of text and, for an encoder, `class_token` and `mask_token`. AutoTokenizer then has to give the same
    ids for the written folder and the original, also for chats.

    For a tokenizer that has no such files the following holds. For an encoder, the written tokenizer puts `class_token` before a text and
    end of text after it, or after each of two texts, which get types 0 and 1. For an encoder-decoder it puts end of text after a text. The
    name of a special token in a text stays text, as with ours, unless the model fills in blanks, which a person names in a text: for an
    encoder with `mask_token`, and for an encoder-decoder with <extra_id_0> and so on, special tokens in a text are read as tokens. A blank
    includes the spaces before it, because they belong to the text that it replaces.

    With unigram, divisions of a text that are equally likely up to the last bits of a float32 sum, such as 18 spaces as 16 + 2 or
    2 + 16, may be chosen differently: SentencePiece adds in float32, Hugging Face in float64.
    """
    ours = load_tokenizer(tokenizer_file, end_of_text)
    folder = Path(folder)
    written = folder / "tokenizer.json"
    if ours.path.suffix == ".json":
        written.write_bytes(ours.file_bytes())
    else:
        written.write_text(convert(ours).to_str(pretty=True), encoding="utf-8")
    if isinstance(ours, SentencePieceTokenizer):
        shutil.copyfile(ours.path, folder / "tokenizer.model")
    blanks = _blanks(ours, architecture, mask_token)
    published = published_configuration(ours.path.parent)
    first = class_token if architecture == "encoder" else None
    if architecture != "decoder" and not (published and _is_framed(written, ours, first)):
        _frame(written, ours, first, blanks)
    compare_ids(written, ours)
    roles = {"eos_token": ours.end_of_text_token}
    if architecture == "decoder":
        begin_like(ours, written)
        roles |= {"bos_token": ours.begin_of_text_token} if ours.adds_bos and ours.begin_of_text_token else {}
    if architecture == "encoder":
        roles = {"cls_token": class_token, "sep_token": ours.end_of_text_token} | ({"mask_token": mask_token} if blanks else {})
    if not published:
        write_json(folder / CONFIGURATION, _own_configuration(ours, model_max_length, architecture, blanks) | roles)
        return
    _write_published(ours, folder, published, roles)


def _write_published(ours: Tokenizer, folder: Path, published: dict[str, Any], roles: dict[str, str]) -> None:
    """Write the configuration that a tokenizer was published with, with `roles`, and the files next to it; compare both folders."""
    if ours.path.suffix != ".json" or not is_class_of_transformers(published):  # other classes read their own formats, or are code
        published["tokenizer_class"] = "PreTrainedTokenizerFast"
    published.pop("add_bos", None)  # tokenizer.json has it
    if "add_bos_token" in published:
        published["add_bos_token"] = ours.adds_bos
    copy_companions(ours.path.parent, folder, published, roles)
    check_published_tokenizer(folder, ours, roles)


def _own_configuration(tokenizer: Tokenizer, model_max_length: int, architecture: str, blanks: list[str]) -> dict[str, Any]:
    """Return the tokenizer_config.json of a tokenizer that has none, without the roles that depend on the architecture."""
    configuration: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.begin_of_text_token or tokenizer.end_of_text_token,
        "eos_token": tokenizer.end_of_text_token,
        "pad_token": padding(tokenizer)[0],
        "add_bos_token": tokenizer.adds_bos,  # for software that does not read tokenizer.json
        "model_max_length": model_max_length,
        "split_special_tokens": not blanks,
        "clean_up_tokenization_spaces": False,
    }
    if architecture == "encoder":
        configuration["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    elif blanks:
        configuration["additional_special_tokens"] = blanks
    return configuration


def _blanks(tokenizer: Tokenizer, architecture: str, mask_token: str) -> list[str]:
    """Return the special tokens that stand in a text for a part to be filled in."""
    if architecture == "encoder":
        return [mask_token] if mask_token in tokenizer.special_tokens else []
    return list(tokenizer.sentinels) if architecture == "encoder_decoder" else []


def _frame(path: Path, tokenizer: Tokenizer, class_token: str | None, blanks: list[str]) -> None:
    """Change a tokenizer.json so that it adds its special tokens to every text, and so that blanks include the spaces before them."""
    contents = json.loads(path.read_text(encoding="utf-8"))
    for token in contents["added_tokens"]:
        token["lstrip"] = token["lstrip"] or token["content"] in blanks
    written = tokenizers.Tokenizer.from_str(json.dumps(contents))
    end = tokenizer.end_of_text_token
    marks = [(end, tokenizer.end_of_text)]
    if class_token is None:
        written.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", marks)
    else:
        marks.append((class_token, tokenizer.special_token_id(class_token)))
        pair = f"{class_token}:0 $A:0 {end}:0 $B:1 {end}:1"
        written.post_processor = processors.TemplateProcessing(f"{class_token} $A {end}", pair, marks)
    path.write_text(written.to_str(pretty=True), encoding="utf-8")


def _is_framed(path: Path, tokenizer: Tokenizer, class_token: str | None) -> bool:
    """Return True if a tokenizer.json adds the special tokens to a text that _frame would make it add."""
    written = tokenizers.Tokenizer.from_file(os.fspath(path))
    bare = written.encode("a", add_special_tokens=False).ids
    before = [] if class_token is None else [tokenizer.special_token_id(class_token)]
    return written.encode("a").ids == [*before, *bare, tokenizer.end_of_text]
