"""Comparison of prepared tokens with those that a tokenizer makes."""

from pathlib import Path

from data.shards import PreparedData
from data.tokenization.loading import load_tokenizer

_COMPARED_TOKENS = 100_000  # of the text that both tokenizers encode


def beginnings_differ(folder: PreparedData, tokenizer: Path, name: str) -> str:
    """Return a sentence if only one of a folder and a model's tokenizer begins texts with a token, else "". `name` names the model."""
    model = load_tokenizer(tokenizer)
    if [token for token in [folder.begin_of_text] if token is not None] == model.beginning:
        return ""
    choice = "false" if folder.begin_of_text is None else "true"
    before = model.begin_of_text_token if model.beginning else "nothing"
    sentence = f"{folder.folder} was prepared with --add_bos {choice}, but the tokenizer of {name} puts {before} before each text."
    return sentence + f" Prepare the text again with --add_bos {'true' if model.beginning else 'false'}."


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
