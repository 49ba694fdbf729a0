"""Small vocabularies of every kind, built when they are needed."""

import base64
import json
from pathlib import Path

import tokenizers

from data.tokenization.tiktoken_tokenizer import published_pattern

QWEN3_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"]
QWEN3_SPECIAL += ["<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN3_SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN3_ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"]
QWEN3_ADDED += ["<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
SPECIAL_TOKENS = ["<|endoftext|>", "<s>", "</s>", "<|im_end|>", "[MASK]"]


def byte_level(vocabulary: dict, merges: list, special: list[str]) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(special)
    return model


def bytes_alone(special: list[str]) -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return byte_level({character: number for number, character in enumerate(alphabet)}, [], special)


def learnt_byte_level(texts: list[str], special: list[str], vocab_size: int = 600) -> tokenizers.Tokenizer:
    model = byte_level({}, [], [])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens(special)
    return model


QWEN = (  # the pattern of Qwen2 and Qwen3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def as_qwen3(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Give a byte-level tokenizer what Qwen3's has: form NFC, its pattern, and special tokens before and after added ones that are not."""
    model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    for names, special in ((QWEN3_SPECIAL, True), (QWEN3_ADDED, False)):
        model.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False) for name in names])
    return model


HOPELESS = 40 * "a" + " 1"


def exhausting_byte_level() -> tokenizers.Tokenizer:
    """Return a tokenizer whose library gives up with a Rust panic on HOPELESS: its pattern needs 2^40 attempts."""
    model = bytes_alone(["<|endoftext|>"])
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"(?:a|a)+\d|[\s\S]"), "isolated")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return model


def byte_characters() -> list[str]:
    """Return GPT-2's character for each byte: printable Latin-1 characters stand for themselves, others start at U+0100.  -> [256]"""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def rank_file(path: Path, texts: list[str], pattern: str | None = None) -> None:
    """Write a tiktoken vocabulary with its configuration, which has more special tokens after a gap."""
    byte = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary = sorted(learnt_byte_level(texts, []).get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(byte[character] for character in token)) + b" %d\n" % rank for token, rank in vocabulary]
    path.write_bytes(b"".join(lines))
    added = {str(len(vocabulary) + 10 + number): {"content": token} for number, token in enumerate(SPECIAL_TOKENS)}
    configuration = {"pat_str": pattern or published_pattern("cl100k_base"), "added_tokens_decoder": added}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(configuration))


def begin_of_text_file(folder: Path, texts: list[str]) -> Path:
    """Write a tokenizer.json that puts <|begin_of_text|> before each text, as Llama 3's does, with its configuration."""
    begin, special = "<|begin_of_text|>", ["<|begin_of_text|>", "<|end_of_text|>", "<|pre|>", "<|suf|>", "<|mid|>", "[MASK]", "[CLS]"]
    model = learnt_byte_level(texts, special)
    template = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B:1", special_tokens=[(begin, model.token_to_id(begin))]
    )
    model.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(trim_offsets=True), template])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    configuration = {"bos_token": begin, "eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder / "tokenizer.json"
