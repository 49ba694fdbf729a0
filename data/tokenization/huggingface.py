"""A tokenizer as the files that Hugging Face's AutoTokenizer reads, giving the ids that ours gives."""

import json
import math
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from data.command_line import UserError
from data.tokenization.tokenizer import SPACE, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer, load_tokenizer

_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece
_PADDING = ("[PAD]", "<pad>")
_NEVER_CHOSEN = -1000.0  # below the least likely piece, for a byte's or a special token's name standing in a text
_TEXTS = (
    "",
    " ",
    "Hello, world!  Two  spaces,   three; and a trailing one ",
    "def f(x):\n    if x:\n        return [1, 2.5e-3]\n\treturn None\r\n\n\n",
    "\t\ttabs\t and \v\f others \x00\x07\x7f\u00a0\u2003\u3000\u200b\ufeff",
    "naïve café Ångström ﬁ ½ ２ e\u0301 \u0130 ß",
    "汉字かなカナ한글 עברית العربية ไทย हिन्दी Ελληνικά Русский",
    "😀👩‍👩‍👧‍👦🇪🇺 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff\ue000",
    "▁ literal ▁▁ marks▁",
    "<unk> <s> </s> <pad> <|endoftext|> <|end_of_text|> <0x0A> <0xE2> [CLS] [MASK] <extra_id_0>",
    "http://example.org/a_b?c=d&e=%20#f  {'k': \"v\\n\"} /* x */ // y ## z --- === ... !!!!",
    "aaaaaaaaaaaaaaaaaaaaaaaaa" + 37 * " " + 21 * "\n" + 13 * "\t" + 50 * "=" + 33 * "-" + 17 * "ab" + 11 * "\r\n",
)


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
        return model.pieces[_unknown(model)].piece, _unknown(model)
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


def convert(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A SentencePiece model, bpe or unigram, or a tiktoken vocabulary as a Hugging Face tokenizer; UserError for what has no counterpart.

    A SentencePiece model's pieces hold real spaces then. A character that is no piece is spelt in bytes, the one that SentencePiece
    writes for a space among them.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        return _convert_ranks(tokenizer)
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    _refuse(tokenizer.path, model)
    names = [piece.piece.replace(SPACE, " ") if piece.type == _PIECE.NORMAL else piece.piece for piece in model.pieces]
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        ids = {name: token for token, name in enumerate(names)}
        converted = tokenizers.Tokenizer(
            models.BPE(ids, _merges(model, names), unk_token=names[_unknown(model)], byte_fallback=True, fuse_unk=True)
        )
    else:
        least = min(piece.score for piece in model.pieces if piece.type == _PIECE.NORMAL)
        scores = [piece.score if piece.type == _PIECE.NORMAL else least + _NEVER_CHOSEN for piece in model.pieces]
        converted = tokenizers.Tokenizer(models.Unigram(list(zip(names, scores, strict=True)), _unknown(model), byte_fallback=True))
    steps: list = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        # Such a model takes the mark for a space (see SentencePieceTokenizer), and its decoder drops the space in front.
        converted.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(SPACE, " ")])
        steps.append(decoders.Strip(" ", 1, 0))
    converted.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in model.pieces if piece.type == _PIECE.CONTROL]
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return converted


def _refuse(path: Path, model: sentencepiece_model_pb2.ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    complaints = {
        "is neither bpe nor unigram": trainer.model_type not in (trainer.BPE, trainer.UNIGRAM),
        "has no bytes to spell unknown characters in (byte_fallback)": _PIECE.BYTE not in kinds,
        f'normalises text ("{normalizer.name}")': bool(normalizer.precompiled_charsmap),
        "removes spaces": normalizer.remove_extra_whitespaces,
        "does not write spaces as \\u2581": not normalizer.escape_whitespaces,
        "puts the space behind a word": trainer.treat_whitespace_as_suffix,
        "holds user-defined pieces": _PIECE.USER_DEFINED in kinds,
        "holds unused pieces": _PIECE.UNUSED in kinds,
    }
    found = [what for what, is_so in complaints.items() if is_so]
    if found:
        raise UserError(f"{path} cannot be written as a tokenizer.json: it {', '.join(found)}.")


def _unknown(model: sentencepiece_model_pb2.ModelProto) -> int:
    return next(token for token, piece in enumerate(model.pieces) if piece.type == _PIECE.UNKNOWN)


def _merges(model: sentencepiece_model_pb2.ModelProto, names: list[str]) -> list[tuple[str, str]]:
    best = sorted((-piece.score, name) for piece, name in zip(model.pieces, names, strict=True) if piece.type == _PIECE.NORMAL)
    return _every_merge([name for _, name in best])


def _every_merge(names: Iterable[str]) -> list[tuple[str, str]]:
    """Every way to put a name together from two, the best name first: SentencePiece and tiktoken join any two that make one."""
    best = list(names)
    known = set(best)
    return [(name[:cut], name[cut:]) for name in best for cut in range(len(name) - 1, 0, -1) if name[:cut] in known and name[cut:] in known]


def _convert_ranks(tokenizer: TiktokenTokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE, its merges recovered from the ranks."""
    character = _byte_characters()
    names = {"".join(character[byte] for byte in token): rank for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1])}
    # In the vocabulary already, special tokens keep their ids, which may leave some free.
    converted = tokenizers.Tokenizer(models.BPE(names | tokenizer.special_tokens, _every_merge(names), ignore_merges=True))
    # Hugging Face's patterns know possessive *+ and ++, but X{1,3}+ is a repetition of X{1,3} to them.
    pattern = re.sub(r"(\\[pP]\{\w+\}|\[[^\]]*\]|\\?.)(\{\d*,?\d*\})\+", r"(?>\1\2)", tokenizer.settings["pat_str"])
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    converted.decoder = decoders.ByteLevel()
    converted.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokenizer.special_tokens])
    return converted


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte.  [256]"""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def _unigram_scores(tokenizer: Tokenizer) -> list[float]:
    """Log-probability of each piece; empty for other kinds of tokenizers, which add nothing up."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    return [piece.score for piece in model.pieces] if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM else []


def _as_likely(one: list[int], other: list[int], scores: list[float]) -> bool:
    first, second = (math.fsum(scores[token] for token in ids) for ids in (one, other))
    return math.isclose(first, second, rel_tol=1e-5)  # float32 holds 6e-8 of a sum, and some hundred sums are made


def texts_of_many_kinds(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts that tokenizers have got wrong, its special tokens as text, and pieces of the vocabulary in random order."""
    yield from _TEXTS
    yield from tokenizer.special_tokens
    yield " ".join(["", *tokenizer.special_tokens, "".join(tokenizer.special_tokens)])
    draw = random.Random(0)
    for _ in range(500):
        yield tokenizer.decode([draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 60))])
