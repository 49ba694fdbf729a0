"""A SentencePiece model or a tiktoken vocabulary as a tokenizer of Hugging Face's library."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from data.command_line import UserError
from data.tokenization.sentencepiece_tokenizer import PIECE, SPACE, read_model
from data.tokenization.tiktoken_tokenizer import TiktokenTokenizer
from data.tokenization.tokenizer import Tokenizer

_NEVER_CHOSEN = -1000.0  # added to the lowest score, so that the name of a byte or special token in a text is never chosen


def convert(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Convert a SentencePiece model (bpe or unigram) or a tiktoken vocabulary to a Hugging Face tokenizer.

    The pieces of a SentencePiece model then contain real spaces. A character that is in no piece is encoded as bytes, also the one that
    SentencePiece writes for a space. Raises UserError for features that have no counterpart.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        return _convert_ranks(tokenizer)
    model = read_model(tokenizer.path)
    _refuse_unsupported(tokenizer.path, model)
    written = (PIECE.NORMAL, PIECE.USER_DEFINED)
    names = [piece.piece.replace(SPACE, " ") if piece.type in written else piece.piece for piece in model.pieces]
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        converted = tokenizers.Tokenizer(_merging(model, names))
        if kept := [name for name, piece in zip(names, model.pieces, strict=True) if piece.type == PIECE.USER_DEFINED]:
            converted.pre_tokenizer = _isolated(kept, converted, names)
            converted.model = _merging(model, names, ignore_merges=True)
    else:
        least = min(piece.score for piece in model.pieces if piece.type == PIECE.NORMAL)
        scores = [piece.score if piece.type == PIECE.NORMAL else least + _NEVER_CHOSEN for piece in model.pieces]
        converted = tokenizers.Tokenizer(models.Unigram(list(zip(names, scores, strict=True)), unknown_piece(model), byte_fallback=True))
    steps: list = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        # Such a model reads the character SPACE as a space (see SentencePieceTokenizer), and its decoder drops the first space.
        converted.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(SPACE, " ")])
        steps.append(decoders.Strip(" ", 1, 0))
    converted.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in model.pieces if piece.type == PIECE.CONTROL]
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return converted


def _refuse_unsupported(path: Path, model: Any) -> None:
    """Raise UserError with every feature of a SentencePiece model that has no counterpart."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    complaints = {
        "is neither bpe nor unigram": trainer.model_type not in (trainer.BPE, trainer.UNIGRAM),
        "has no bytes for unknown characters (byte_fallback)": PIECE.BYTE not in kinds,
        f'normalises text ("{normalizer.name}")': bool(normalizer.precompiled_charsmap),
        "removes spaces": normalizer.remove_extra_whitespaces,
        "does not write spaces as \\u2581": not normalizer.escape_whitespaces,
        "puts the space after a word": trainer.treat_whitespace_as_suffix,
        "is unigram with user-defined pieces": trainer.model_type == trainer.UNIGRAM and PIECE.USER_DEFINED in kinds,
        "holds unused pieces": PIECE.UNUSED in kinds,
    }
    if found := [complaint for complaint, applies in complaints.items() if applies]:
        raise UserError(f"{path} cannot be written as a tokenizer.json: it {', '.join(found)}.")


def unknown_piece(model: Any) -> int:
    """Return the id of the piece for unknown text."""
    return next(token for token, piece in enumerate(model.pieces) if piece.type == PIECE.UNKNOWN)


def _merging(model: Any, names: list[str], ignore_merges: bool = False) -> models.BPE:
    """Return the bpe model of SentencePiece's pieces. With `ignore_merges` a part of a text that is a piece is never divided.

    SentencePiece joins the pair with the best score, and of equal scores the leftmost pair. Equal scores are common for runs of spaces:
    from the left, each run grows by one space until no longer run is a piece. Hugging Face joins in the order of a list, so the pairs that
    make the longest piece come first there.
    """
    best = sorted((-piece.score, -len(name), name) for piece, name in zip(model.pieces, names, strict=True) if piece.type == PIECE.NORMAL)
    ids = {name: token for token, name in enumerate(names)}
    merges = _every_merge([name for *_, name in best])
    unknown = names[unknown_piece(model)]
    return models.BPE(ids, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True, ignore_merges=ignore_merges)


def _isolated(kept: list[str], merging: tokenizers.Tokenizer, names: list[str]) -> pre_tokenizers.PreTokenizer:
    """Return what divides a text so that each piece in `kept` is a part, as user-defined pieces of SentencePiece are.

    The parts are tokenized with `ignore_merges`, by which each of these parts stays whole. A part that is the name of a byte or of a
    special token, or a piece that no merges lead to, is divided here, at a place where `merging` divides it.
    """

    def _encode(text: str) -> list[int]:
        return merging.encode(text, add_special_tokens=False).ids

    longest_first = sorted(kept, key=len, reverse=True)
    isolated = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    divided = {name for token, name in enumerate(names) if name not in kept and _encode(name) != [token]}

    def _cut(name: str) -> str:
        """Return the pattern of a name's first part, up to a place where its tokens end, before its second part and the end."""
        for first, second in ((name[:cut], name[cut:]) for cut in range(1, len(name))):
            if not divided & {first, second} and _encode(first) + _encode(second) == _encode(name):
                return rf"{re.escape(first)}(?={re.escape(second)}\z)"
        raise AssertionError(f"the tokens of {name!r} end nowhere inside it")

    pattern = "|".join(map(_cut, sorted(divided)))  # never empty, because it has the names of bytes
    return pre_tokenizers.Sequence([isolated, pre_tokenizers.Split(Regex(rf"\A(?:{pattern})"), "isolated")])


def _every_merge(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return every pair of names that joins to a name, the best name first: SentencePiece and tiktoken join any such pair."""
    best = list(names)
    known = set(best)
    return [(name[:cut], name[cut:]) for name in best for cut in range(len(name) - 1, 0, -1) if name[:cut] in known and name[cut:] in known]


def _convert_ranks(tokenizer: TiktokenTokenizer) -> tokenizers.Tokenizer:
    """Convert a tiktoken vocabulary to byte-level BPE, with merges that follow from its ranks."""
    character = _byte_characters()
    names = {"".join(character[byte] for byte in token): rank for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1])}
    # Special tokens are in the vocabulary from the start, so that they keep their ids, even if some ids are unused.
    converted = tokenizers.Tokenizer(models.BPE(names | tokenizer.special_tokens, _every_merge(names), ignore_merges=True))
    # Hugging Face's patterns support possessive *+ and ++, but read X{1,3}+ as a repetition of X{1,3}.
    pattern = re.sub(r"(\\[pP]\{\w+\}|\[[^\]]*\]|\\?.)(\{\d*,?\d*\})\+", r"(?>\1\2)", tokenizer.settings["pat_str"])
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    converted.decoder = decoders.ByteLevel()
    converted.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokenizer.special_tokens])
    return converted


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte.  -> [256]"""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
