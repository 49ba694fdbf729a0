"""The tokenizer of a SentencePiece model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data.command_line import UserError
from data.tokenization.tokenizer import WHERE_END_IS_SET, Tokenizer

SPACE = "\u2581"
"""The character that SentencePiece writes for a space. If a text contains it, it must be encoded as bytes."""
MODEL_FIELDS: Any = vars(sentencepiece_model_pb2)["ModelProto"]
"""The class of a SentencePiece model's fields; protobuf builds it at import, so that type checkers do not see it."""
PIECE: Any = MODEL_FIELDS.SentencePiece
"""The class of a piece, with its types: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED and BYTE."""
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a SentencePiece `.model` file."""

    engine = f"sentencepiece {sentencepiece.__version__}"

    def __init__(self, path: Path, end_of_text: str | None, threads: int = 1) -> None:
        self.path, self.settings, self._threads = path, {}, threads
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model.") from error
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(token) for token in range(self.vocab_size)]
        if end_of_text is None and self._model.eos_id() < 0:
            raise UserError(f"{path} has no end-of-sentence piece. Give the piece that ends a document with {WHERE_END_IS_SET}.")
        self._set_end(end_of_text or pieces[self._model.eos_id()], {piece: token for token, piece in enumerate(pieces)})
        self.special_tokens = {piece: token for token, piece in enumerate(pieces) if self._model.is_control(token)}
        self._space_ids = [pieces.index(byte) for byte in _SPACE_BYTES] if set(_SPACE_BYTES) <= set(pieces) else []
        # A model that puts a space before every text, such as Llama's, would also put one after each character that is encoded as bytes.
        self._encodes_space = bool(self._space_ids) and self.decode(self._encode_space(f"a{SPACE}b")) == f"a{SPACE}b"

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_space(text) if self._encodes_space and SPACE in text else self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without end of text."""
        return self._model.decode([int(token) for token in ids])

    def _own_beginning(self) -> tuple[str | None, bool | None]:
        number = self._model.bos_id()
        return None if number < 0 else self._model.id_to_piece(number), None

    def _encode_each(self, texts: Sequence[str]) -> Iterable[list[int]]:
        if self._threads == 1:
            return map(self._encode_text, texts)
        encoded = self._model.encode(list(texts), num_threads=self._threads)
        return (self._encode_text(text) if SPACE in text else ids for text, ids in zip(texts, encoded, strict=True))

    def _texts_of_ids(self) -> list[str]:
        pieces = [self._model.id_to_piece(token).replace(SPACE, " ") for token in range(self.vocab_size)]
        return [
            bytes.fromhex(piece[3:5]).decode("ascii", "replace") if self._model.is_byte(token) else piece
            for token, piece in enumerate(pieces)
        ]

    def _encode_space(self, text: str) -> list[int]:
        """Return the ids of a text whose characters SPACE are encoded as bytes."""
        first, *others = self._model.encode(text.split(SPACE), num_threads=1)
        return first + [token for part in others for token in self._space_ids + part]


def read_model(path: Path) -> Any:
    """Return the fields of a SentencePiece model: its pieces, trainer_spec and normalizer_spec."""
    return MODEL_FIELDS.FromString(path.read_bytes())
