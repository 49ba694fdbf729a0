"""Whether prepared tokens are those that a tokenizer makes."""

from pathlib import Path

from data.shards import PreparedData
from data.tokenization.loading import load_tokenizer

_COMPARED_TOKENS = 100_000  # of text that two tokenizers are to encode alike


def tokens_differ(folder: PreparedData, tokenizer: Path) -> bool:
    """Whether a folder's tokens are others than this tokenizer makes: of the same file never, of another one as its first texts tell."""
    there, here = load_tokenizer(folder.tokenizer_path), load_tokenizer(tokenizer)
    if there.settings == here.settings and there.file_bytes() == here.file_bytes():
        return False
    if (there.vocab_size, there.end_of_text) != (here.vocab_size, here.end_of_text):
        return True
    stream = next((stream for stream in folder.splits.values() if len(stream)), None)
    text = there.decode(stream.read(0, min(len(stream), _COMPARED_TOKENS)).tolist()) if stream is not None else ""
    return there.encode(text) != here.encode(text)
