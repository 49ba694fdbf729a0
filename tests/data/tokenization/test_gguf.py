"""A tokenizer as metadata of a GGUF file. tests/launch/compressing/test_llama_engine.py compares llama.cpp's ids."""

import argparse
from pathlib import Path

import gguf
import pytest
import tokenizers

from data.command_line import UserError
from data.tokenization.gguf import gguf_tokenizer, texts_with_other_ids
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.tiktoken_tokenizer import published_pattern
from tests.data.tokenization.test_huggingface_files import sentencepiece_file
from tests.data.tokenization.vocabularies import QWEN3_ADDED, QWEN3_SPECIAL, SPECIAL_TOKENS, as_qwen3, learnt_byte_level, rank_file

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]


def entries_of(path: Path, vocab_size: int = 0) -> dict:
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): value for key, value in gguf_tokenizer(load_tokenizer(path), vocab_size).items()}


def test_pieces_keep_scores_and_types_and_extra_ids_are_unused(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_sentencepiece([TEXT], path, vocab_size=600, special_tokens=["[MASK]"])
    entries = entries_of(path, vocab_size=610)
    kinds = [gguf.TokenType(kind) for kind in entries["token_type"]]
    special = {entries["tokens"][number] for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL}
    assert special == {"<|endoftext|>", "[MASK]"} and kinds.count(gguf.TokenType.BYTE) == 256
    assert entries["tokens"][600:] == [f"[PAD{number}]" for number in range(600, 610)]
    assert set(kinds[600:]) == {gguf.TokenType.UNUSED} and len(entries["scores"]) == 610
    assert entries["eos_token_id"] == load_tokenizer(path).end_of_text and entries["add_space_prefix"] is False
    unigram = tmp_path / "unigram.model"
    train_sentencepiece([TEXT], unigram, vocab_size=600, kind="unigram")
    with pytest.raises(UserError, match=r"unigram\.model cannot be written as GGUF: it is not bpe"):
        entries_of(unigram)


def test_byte_level_bpe_is_read_by_transformers_with_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")
    path = tmp_path / "tokenizer.json"
    learnt_byte_level([TEXT], SPECIAL_TOKENS).save(str(path))
    ours = load_tokenizer(path)
    writer = gguf.GGUFWriter(tmp_path / "words.gguf", "llama")
    for key, value in gguf_tokenizer(ours, ours.vocab_size).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="words.gguf", split_special_tokens=True)
    texts = [text for text in texts_of_many_kinds(ours) if not any(token in text for token in SPECIAL_TOKENS)]
    assert len(texts) > 300
    for text in texts:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
    assert entries_of(path)["pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(published_pattern("o200k_base"), "gpt-4o"), (r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+", None)],
    ids=["known", "unknown"],
)
def test_pattern_of_words_is_named_or_refused(tmp_path, pattern, name):
    path = tmp_path / "words.tiktoken"
    rank_file(path, [TEXT], pattern)
    if name is None:
        with pytest.raises(UserError, match=r"words\.tiktoken cannot be written as GGUF: it does not split text into words like any of"):
            entries_of(path)
    else:
        entries = entries_of(path)
        assert entries["pre"] == name and entries["tokens"][load_tokenizer(path).end_of_text] == "<|endoftext|>"


def test_qwen3s_added_tokens_keep_their_ids_and_its_pattern_is_qwen2(tmp_path):
    path = tmp_path / "tokenizer.json"
    as_qwen3(learnt_byte_level([TEXT], [])).save(str(path))
    ours, entries = load_tokenizer(path), entries_of(path)
    assert entries["pre"] == "qwen2"
    kinds = {name: gguf.TokenType(kind) for name, kind in zip(entries["tokens"], entries["token_type"], strict=True)}
    assert {kinds[name] for name in QWEN3_SPECIAL} == {gguf.TokenType.CONTROL}
    assert {kinds[name] for name in QWEN3_ADDED} == {gguf.TokenType.USER_DEFINED}
    assert ours.encode("a<think>") == [*ours.encode("a"), entries["tokens"].index("<think>")]
    (form, is_other_form), (names, has_name) = texts_with_other_ids(ours).items()
    assert "not in Unicode's form NFC" in form and is_other_form("e\u0301") and not is_other_form("\u00e9")
    assert "<|fim_prefix|>" in names and has_name("a<|fim_pad|>") and not has_name("<think></tool_call>")


@pytest.mark.parametrize("normalizer", [tokenizers.normalizers.Lowercase(), tokenizers.normalizers.NFKC()])
def test_normalizer_that_llama_cpp_lacks_is_named(tmp_path, normalizer):
    path = tmp_path / "tokenizer.json"
    model = learnt_byte_level([TEXT], SPECIAL_TOKENS)
    model.normalizer = normalizer
    model.save(str(path))
    with pytest.raises(UserError, match=rf"it normalises text \({type(normalizer).__name__}\), which llama.cpp does not"):
        entries_of(path)


def test_user_defined_pieces_are_a_known_difference_after_a_prefix(tmp_path):
    for prefix in (True, False):
        path = sentencepiece_file(tmp_path / "own.model", user_defined_symbols=["[REF]"], add_dummy_prefix=prefix)
        kinds = texts_with_other_ids(load_tokenizer(path))
        assert [kind for kind, differs in kinds.items() if differs("a[REF]b")] == prefix * [
            "text that contains a user-defined piece ([REF])"
        ]
        assert gguf.TokenType.USER_DEFINED in entries_of(path)["token_type"]


def test_unsupported_kind_of_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.add_special_tokens(["[SEP]"])
    model.save(str(path))
    with pytest.raises(UserError, match="it is WordPiece, not byte-level BPE"):
        entries_of(path)
