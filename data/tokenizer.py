"""Text -> token ids and back, the same text that went in."""

import io
import itertools
import json
import re
import shutil
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from data.command_line import UserError, nearest

_SPACE = "\u2581"  # what SentencePiece writes for a space; a real one in the text has to be spelt in bytes
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in _SPACE.encode()]
_PAGE_CHARACTERS = 4000  # of one training sentence, so that a newline and what follows it can be one piece
_END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_UNIGRAM_PAGES = 500


class Tokenizer:
    """Ids from 0 to vocab_size - 1, of which `end_of_text` ends each document. A special token written in a text stays text."""

    path: Path
    vocab_size: int
    end_of_text: int
    end_of_text_token: str

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; end of text has none, and bytes that are no UTF-8 become U+FFFD."""
        raise NotImplementedError

    def _find_end(self, token: str, pieces: Sequence[str]) -> int:
        if token not in pieces:
            raise UserError(f'{self.path} has no token "{token}" to end a document with.{nearest(token, pieces)} Set with --end_of_text.')
        self.end_of_text_token = token
        return pieces.index(token)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    def __init__(self, path: Path, end_of_text: str | None) -> None:
        self.path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path} is no SentencePiece model.") from error
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(token) for token in range(self.vocab_size)]
        if end_of_text is None and self._model.eos_id() < 0:
            raise UserError(f"{path} names no end-of-sentence piece. Say with --end_of_text which one ends a document.")
        self.end_of_text = self._find_end(end_of_text or pieces[self._model.eos_id()], pieces)
        self._space = [pieces.index(byte) for byte in _SPACE_BYTES] if set(_SPACE_BYTES) <= set(pieces) else []
        # A model that puts a space before every text, such as Llama's, would put one after each spelt character too.
        self._spells_space = bool(self._space) and self.decode(self._spell_space(f"a{_SPACE}b")) == f"a{_SPACE}b"

    def encode(self, text: str) -> list[int]:
        return self._spell_space(text) if self._spells_space and _SPACE in text else self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def _spell_space(self, text: str) -> list[int]:
        first, *others = self._model.encode(text.split(_SPACE))
        return first + [token for part in others for token in self._space + part]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: Path, end_of_text: str | None) -> None:
        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"{path} is no tokenizer.json: {error}.") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # as text, that is
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        token = end_of_text or next((token for token in _KNOWN_ENDS if token in vocabulary), None)
        if token is None:
            raise UserError(f"{path}: none of {', '.join(_KNOWN_ENDS)} is in it. Say with --end_of_text which token ends a document.")
        self._find_end(token, list(vocabulary))
        self.end_of_text = vocabulary[token]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)


def load_tokenizer(path: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds tokenizer.json or tokenizer.model.

    Which token ends a document: `end_of_text`, else `eos_token` of a tokenizer_config.json beside the file, else the file's own.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model.")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file. A tokenizer is a SentencePiece .model or a Hugging Face tokenizer.json.")
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    return kind(path, end_of_text or _configured_end(path.parent))


def copy_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Put a tokenizer's file into a folder under the name that load_tokenizer looks for, with what ends a document beside it."""
    copy = Path(folder) / ("tokenizer.json" if isinstance(tokenizer, HuggingFaceTokenizer) else "tokenizer.model")
    if not copy.exists() or not copy.samefile(tokenizer.path):
        shutil.copyfile(tokenizer.path, copy)
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.end_of_text_token}) + "\n")
    return copy


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int, kind: str = "bpe") -> None:
    """Learn a vocabulary from texts and write it to `path`; kind is "bpe" or "unigram".

    Whatever is no piece is spelt in bytes, and nothing is normalised, so every text comes back as it was. Pieces may hold
    spaces and newlines ("return self.", a line's end with the next one's indentation): a token of source code is then 4.2
    bytes long instead of 3.5 at 4,096 pieces (cf. SuperBPE, Liu et al. 2025, arXiv 2503.13423).
    """
    pages = _pages(texts, num_characters=(vocab_size - 258) // 2)
    if kind == "unigram":  # what it takes grows faster than the text: ten seconds for these, five minutes for ten times as many
        pages = pages[:: len(pages) // _UNIGRAM_PAGES + 1]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pages),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            max_sentencepiece_length=32,
            max_sentence_length=4 * _PAGE_CHARACTERS,
            required_chars=string.ascii_letters + string.digits + string.punctuation,  # else a rare capital is in no piece
            unk_id=0,
            eos_id=1,
            eos_piece=_END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            num_threads=8,  # fixed, because the sums of "unigram" depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_why_not(error, vocab_size)) from error
    Path(path).write_bytes(model.getvalue())


def _pages(texts: Iterable[str], num_characters: int) -> list[str]:
    """Texts by the page, in which only the commonest characters stand for themselves.

    The others, of which Chinese has more than a small vocabulary can hold, become tabs, which SentencePiece puts into no piece.
    """
    pages = [text[start : start + _PAGE_CHARACTERS] for text in texts for start in range(0, len(text), _PAGE_CHARACTERS)]
    counts = Counter(itertools.chain.from_iterable(pages))
    rare = {ord(character): "\t" for character, _ in counts.most_common()[num_characters:]}
    return [page.translate(rare) for page in pages] if rare else pages


def _why_not(error: RuntimeError, vocab_size: int) -> str:
    """SentencePiece's sentence, without the place in its source, in the words of our settings."""
    if most := re.search(r"Please set it to a value <= (\d+)", str(error)):
        return f"This text is too short to learn {vocab_size} pieces from it; vocab_size can be {most[1]} at most. Or give a tokenizer."
    return f"No vocabulary of {vocab_size} pieces can be learnt from this text: {str(error).rpartition('] ')[2] or 'it is empty.'}"


def _configured_end(folder: Path) -> str | None:
    """`eos_token` as Hugging Face writes it: a string, or an added token with its content."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not JSON with a name and value for each setting: {error}.") from error
    return token["content"] if isinstance(token, dict) else token
