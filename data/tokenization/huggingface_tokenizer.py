"""The tokenizer of a Hugging Face tokenizer.json, or of GPT-2's vocab.json and merges.txt."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from data.command_line import UserError
from data.tokenization.library_errors import library_errors_as
from data.tokenization.tokenizer import KNOWN_ENDS, Tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face `tokenizer.json` file."""

    engine = f"tokenizers {tokenizers.__version__}"

    def __init__(self, path: Path, end_of_text: str | None, threads: int = 1) -> None:
        self.path, self.settings, self._threads = path, {}, threads
        with library_errors_as(lambda reason: UserError(f"{path} is not a valid tokenizer.json: {reason}.")):
            self._text = path.read_text(encoding="utf-8") if path.name == "tokenizer.json" or not merges_of(path) else _join_pair(path)
            self._model = tokenizers.Tokenizer.from_str(self._text)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # encode the names of special tokens as text
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_tokens = {token.content: number for number, token in self._model.get_added_tokens_decoder().items() if token.special}
        self._set_end(end_of_text or self._known_end(vocabulary), vocabulary)

    @property
    def normalizers(self) -> set[str]:
        """Names of the normalizers that the tokenizer applies to a text."""
        normalizer = json.loads(self._text).get("normalizer") or {}
        return {step["type"] for step in normalizer.get("normalizers", [normalizer]) if step}

    def file_bytes(self) -> bytes:
        """Return the content of the tokenizer.json."""
        return self._text.encode()

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_batch([text])[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without end of text."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def _own_beginning(self) -> tuple[str | None, bool | None]:
        """Return the one token that the post-processor puts before a text, with nothing after it, as Llama 3's and Gemma's do."""
        if self.path.name != "tokenizer.json" and merges_of(self.path):
            return None, None
        bare, framed = (self._model.encode("a", add_special_tokens=add).ids for add in (False, True))
        adds = len(framed) == 1 + len(bare) and framed[1:] == bare
        return self._model.id_to_token(framed[0]) if adds else None, adds

    def _id_of(self, name: str) -> int | None:
        return self._model.token_to_id(name)

    def _encode_each(self, texts: Sequence[str]) -> Iterable[list[int]]:
        if self._threads == 1:  # the library encodes the texts of a batch on as many threads as there are cores
            return map(self._encode_text, texts)
        return (encoding.ids for encoding in self._encode_batch(list(texts)))

    def _texts_of_ids(self) -> list[str]:
        names = [self._model.id_to_token(token) or "" for token in range(self.vocab_size)]
        if isinstance(self._model.model, tokenizers.models.WordPiece):
            prefix = self._model.model.continuing_subword_prefix
            return [name.removeprefix(prefix) if name.startswith(prefix) else f" {name}" for name in names]
        decode = self._model.decoder.decode if self._model.decoder else "".join
        return [decode(["a", name, "a"])[1:-1] for name in names]  # a decoder may take a space from the ends of a text

    def _encode_batch(self, texts: list[str]) -> list[tokenizers.Encoding]:
        return self._model.encode_batch_fast(texts, add_special_tokens=False)


def merges_of(vocabulary: Path) -> Path | None:
    """Return the file of merges that belongs to a vocabulary; None if the vocabulary is not one of GPT-2's two files."""
    merges = vocabulary.with_name(vocabulary.name.removesuffix("vocab.json") + "merges.txt")
    return merges if vocabulary.name.endswith("vocab.json") and merges.is_file() else None


def _join_pair(vocabulary: Path) -> str:
    """Return GPT-2's vocab.json and merges.txt as one tokenizer.json: byte-level BPE whose end of text is special."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges_of(vocabulary))))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([token for token in KNOWN_ENDS if model.token_to_id(token) is not None])
    return model.to_str()
