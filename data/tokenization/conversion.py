"""A SentencePiece model or a tiktoken vocabulary as a tokenizer of Hugging Face's library."""

import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from data.command_line import UserError
from data.tokenization.sentencepiece_tokenizer import SPACE
from data.tokenization.tiktoken_tokenizer import TiktokenTokenizer
from data.tokenization.tokenizer import Tokenizer

_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece
_NEVER_CHOSEN = -1000.0  # below the least likely piece, for a byte's or a special token's name standing in a text


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
            models.BPE(ids, _merges(model, names), unk_token=names[unknown_piece(model)], byte_fallback=True, fuse_unk=True)
        )
    else:
        least = min(piece.score for piece in model.pieces if piece.type == _PIECE.NORMAL)
        scores = [piece.score if piece.type == _PIECE.NORMAL else least + _NEVER_CHOSEN for piece in model.pieces]
        converted = tokenizers.Tokenizer(models.Unigram(list(zip(names, scores, strict=True)), unknown_piece(model), byte_fallback=True))
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


def unknown_piece(model: sentencepiece_model_pb2.ModelProto) -> int:
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
