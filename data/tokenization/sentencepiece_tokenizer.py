"""The tokenizer of a SentencePiece model."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from data.command_line import UserError
from data.tokenization.tokenizer import Tokenizer

SPACE = "\u2581"  # what SentencePiece writes for a space; a real one in the text has to be spelt in bytes
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    engine = f"sentencepiece {sentencepiece.__version__}"

    def __init__(self, path: Path, end_of_text: str | None, threads: int = 1) -> None:
        self.path, self.settings, self._threads = path, {}, threads
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path} is no SentencePiece model.") from error
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(token) for token in range(self.vocab_size)]
        if end_of_text is None and self._model.eos_id() < 0:
            raise UserError(f"{path} names no end-of-sentence piece. Say with --end_of_text which one ends a document.")
        self._set_end(end_of_text or pieces[self._model.eos_id()], {piece: token for token, piece in enumerate(pieces)})
        self.special_tokens = {piece: token for token, piece in enumerate(pieces) if self._model.is_control(token)}
        self._space = [pieces.index(byte) for byte in _SPACE_BYTES] if set(_SPACE_BYTES) <= set(pieces) else []
        # A model that puts a space before every text, such as Llama's, would put one after each spelt character too.
        self._spells_space = bool(self._space) and self.decode(self._spell_space(f"a{SPACE}b")) == f"a{SPACE}b"

    def encode(self, text: str) -> list[int]:
        return self._spell_space(text) if self._spells_space and SPACE in text else self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def _encode_each(self, texts: Sequence[str]) -> Iterable[list[int]]:
        if self._threads == 1:
            return map(self.encode, texts)
        encoded = self._model.encode(list(texts), num_threads=self._threads)
        return (self.encode(text) if SPACE in text else ids for text, ids in zip(texts, encoded, strict=True))

    def _spellings(self) -> list[str]:
        pieces = [self._model.id_to_piece(token).replace(SPACE, " ") for token in range(self.vocab_size)]
        return [
            bytes.fromhex(piece[3:5]).decode("ascii", "replace") if self._model.is_byte(token) else piece
            for token, piece in enumerate(pieces)
        ]

    def _spell_space(self, text: str) -> list[int]:
        first, *others = self._model.encode(text.split(SPACE), num_threads=1)
        return first + [token for part in others for token in self._space + part]
