"""Comparison of prepared tokens with those that a tokenizer makes."""

from pathlib import Path

from data.shards import PreparedData
from data.tokenization.loading import load_tokenizer

_COMPARED_TOKENS = 100_000  # of the text that both tokenizers encode


def tokens_differ(folder: PreparedData, tokenizer: Path) -> bool:
    """Return True if a folder's tokens differ from those that a tokenizer makes.

    Equal files with equal settings make equal tokens; with other files, the beginning of the folder's text is encoded and compared.
    """
    own, other = load_tokenizer(folder.tokenizer_path), load_tokenizer(tokenizer)
    if own.settings == other.settings and own.file_bytes() == other.file_bytes():
        return False
    if (own.vocab_size, own.end_of_text) != (other.vocab_size, other.end_of_text):
        return True
    stream = next((stream for stream in folder.splits.values() if len(stream)), None)
    text = own.decode(stream.read(0, min(len(stream), _COMPARED_TOKENS)).tolist()) if stream is not None else ""
    return own.encode(text) != other.encode(text)
