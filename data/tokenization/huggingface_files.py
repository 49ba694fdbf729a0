"""The tokenizer.json of a tokenizer: whether one can be written that gives the same ids as ours, and its padding token."""

import math
import os
import tempfile
from pathlib import Path

import tokenizers

from data.command_line import UserError
from data.tokenization.conversion import convert, unknown_piece
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.sentencepiece_tokenizer import SentencePieceTokenizer, read_model
from data.tokenization.tokenizer import Tokenizer

_PADDING = ("[PAD]", "<pad>")


def export_problem(tokenizer: Tokenizer) -> str | None:
    """Return why a tokenizer cannot be written as a tokenizer.json with its ids, or None if it can: half a second for 32,000 ids."""
    if tokenizer.path.suffix == ".json":
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "tokenizer.json")
            written.write_text(convert(tokenizer).to_str(), encoding="utf-8")
            compare_ids(written, tokenizer)
    except UserError as error:
        return str(error)
    return None


def compare_ids(written: Path, ours: Tokenizer) -> None:
    """Raise UserError if a tokenizer.json gives other ids than ours for a text, whose special tokens stay text."""
    theirs = tokenizers.Tokenizer.from_file(os.fspath(written))
    theirs.encode_special_tokens = True  # the effect of split_special_tokens
    theirs.no_truncation()
    scores = _unigram_scores(ours)
    for text in texts_of_many_kinds(ours):
        our_ids, their_ids = ours.encode(text), theirs.encode(text, add_special_tokens=False).ids
        if our_ids != their_ids and not (scores and _as_likely(our_ids, their_ids, scores) and ours.decode(their_ids) == text):
            raise UserError(f"{ours.path} cannot be written as a tokenizer.json: it would give other ids for {text[:80]!r}.")


def padding(tokenizer: Tokenizer) -> tuple[str, int]:
    """Return the padding token and its id: one named [PAD] or <pad>, else a token that no text has, else end of text."""
    if named := [name for name in _PADDING if name in tokenizer.special_tokens]:
        return named[0], tokenizer.special_tokens[named[0]]
    if isinstance(tokenizer, SentencePieceTokenizer):  # encodes unknown characters as bytes, else it would be unsupported
        model = read_model(tokenizer.path)
        return model.pieces[unknown_piece(model)].piece, unknown_piece(model)
    return tokenizer.end_of_text_token, tokenizer.end_of_text


def _unigram_scores(tokenizer: Tokenizer) -> list[float]:
    """Return the log-probability of each piece of a unigram model; empty for other kinds of tokenizers."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    model = read_model(tokenizer.path)
    return [piece.score for piece in model.pieces] if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM else []


def _as_likely(one: list[int], other: list[int], scores: list[float]) -> bool:
    """Return True if two lists of pieces have the same probability, up to rounding."""
    first, second = (math.fsum(scores[token] for token in ids) for ids in (one, other))
    return math.isclose(first, second, rel_tol=1e-5)  # float32 rounds by 6e-8 of a sum, and a few hundred sums are computed
