"""A tokenizer as the files that Hugging Face's AutoTokenizer reads, giving the ids that ours gives."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import processors

from data.command_line import UserError
from data.tokenization.conversion import convert, unknown_piece
from data.tokenization.loading import load_tokenizer
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenization.tokenizer import Tokenizer

_PADDING = ("[PAD]", "<pad>")


def write_tokenizer(
    tokenizer_file: str | Path,
    folder: str | Path,
    model_max_length: int,
    end_of_text: str | None = None,
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder",
    class_token: str = "[CLS]",
    mask_token: str = "[MASK]",
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; neither sentencepiece nor code of ours is needed to read them.

    A tokenizer.json is copied, a tiktoken vocabulary rewritten as one, a SentencePiece `.model` (bpe or unigram) rewritten and
    copied beside it. The ids of what is written are compared with ours on texts of many kinds, and UserError is raised where one
    differs, or where the `.model` does what a tokenizer.json cannot. `end_of_text` as in load_tokenizer.

    For an encoder what is written puts `class_token` before a text and end of text behind it, or behind each of two, which are of
    types 0 and 1; for an encoder-decoder it puts end of text behind a text. A special token written in a text stays text, as with
    ours, but where a model fills in blanks, which a person names in a text: with an encoder that has `mask_token`, and with an
    encoder-decoder that has <extra_id_0> and so on, special tokens in a text are read as such. A blank takes the spaces before it
    along, which belong to what it stands for.

    With unigram, spellings that are equally likely but for the last bits of a float32 sum, such as a run of 18 spaces as
    16 + 2 or 2 + 16, may be chosen otherwise: SentencePiece adds in float32, Hugging Face in float64.
    """
    ours = load_tokenizer(tokenizer_file, end_of_text)
    folder = Path(folder)
    written = folder / "tokenizer.json"
    if ours.path.suffix == ".json":
        written.write_bytes(ours.file_bytes())
    else:
        convert(ours).save(os.fspath(written))
    if isinstance(ours, SentencePieceTokenizer):
        shutil.copyfile(ours.path, folder / "tokenizer.model")
    blanks = _blanks(ours, architecture, mask_token)
    if architecture != "decoder":
        _frame(written, ours, class_token if architecture == "encoder" else None, blanks)
    theirs = tokenizers.Tokenizer.from_file(os.fspath(written))
    theirs.encode_special_tokens = True  # what split_special_tokens below becomes
    theirs.no_truncation()
    scores = _unigram_scores(ours)
    for text in texts_of_many_kinds(ours):
        our_ids, their_ids = ours.encode(text), theirs.encode(text, add_special_tokens=False).ids
        if our_ids != their_ids and not (scores and _as_likely(our_ids, their_ids, scores) and ours.decode(their_ids) == text):
            raise UserError(f"{ours.path} cannot be written as a tokenizer.json: it would give other ids for {text[:80]!r}.")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": ours.end_of_text_token,
        "eos_token": ours.end_of_text_token,
        "pad_token": padding(ours)[0],
        "model_max_length": model_max_length,
        "split_special_tokens": not blanks,
        "clean_up_tokenization_spaces": False,
    }
    if architecture == "encoder":
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        settings |= {"cls_token": class_token, "sep_token": ours.end_of_text_token}
        settings |= {"mask_token": mask_token} if blanks else {}
    elif blanks:
        settings["additional_special_tokens"] = blanks
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def padding(tokenizer: Tokenizer) -> tuple[str, int]:
    """The token for places where no token is, and its id: one of that name, else one that no text has, else end of text."""
    if named := [name for name in _PADDING if name in tokenizer.special_tokens]:
        return named[0], tokenizer.special_tokens[named[0]]
    if isinstance(tokenizer, SentencePieceTokenizer):  # which spells the unknown in bytes, or it could not have been written
        model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
        return model.pieces[unknown_piece(model)].piece, unknown_piece(model)
    return tokenizer.end_of_text_token, tokenizer.end_of_text


def _blanks(tokenizer: Tokenizer, architecture: str, mask_token: str) -> list[str]:
    """Special tokens that stand in a text for something to be filled in."""
    if architecture == "encoder":
        return [mask_token] if mask_token in tokenizer.special_tokens else []
    return list(tokenizer.sentinels) if architecture == "encoder_decoder" else []


def _frame(path: Path, tokenizer: Tokenizer, class_token: str | None, blanks: list[str]) -> None:
    """Have a tokenizer.json put its marks round every text, and let blanks take the spaces before them along."""
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
    written.save(os.fspath(path))


def _unigram_scores(tokenizer: Tokenizer) -> list[float]:
    """Log-probability of each piece; empty for other kinds of tokenizers, which add nothing up."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    return [piece.score for piece in model.pieces] if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM else []


def _as_likely(one: list[int], other: list[int], scores: list[float]) -> bool:
    first, second = (math.fsum(scores[token] for token in ids) for ids in (one, other))
    return math.isclose(first, second, rel_tol=1e-5)  # float32 holds 6e-8 of a sum, and some hundred sums are made
