"""gigatoken gives the ids of the tokenizer that it replaces, or is not used."""

import json
from pathlib import Path

import gigatoken
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data.tokenization.gigatoken_tokenizer
from data.tokenization.gigatoken_tokenizer import GigatokenTokenizer
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import fastest, load_tokenizer
from data.tokenization.tiktoken_tokenizer import published_pattern
from tests.data.tokenization.vocabularies import SPECIAL_TOKENS, learnt_byte_level, rank_file

SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
PARTS = [
    *SPECIAL_TOKENS,
    "<unk>",
    "<0x0A>",
    "▁",
    "  ",
    "\n",
    "def ",
    " self.x",
    "'ll",
    "1234",
    "é",
    "e\u0301",
    "\u0301\u0323",
    "\u07fd\u0899",
    "汉字",
    "😀",
]
ANY_TEXT = st.lists(st.text() | st.sampled_from(PARTS)).map("".join)
FAST = ["ours.model", "llama.model", "byte_level.json", "composed.json", "r50k.tiktoken", "cl100k.tiktoken", "o200k.tiktoken"]
SLOW = {
    "unigram.model": "only BPE sentencepiece models are supported",
    "nmt.model": r"normalises text \(nmt_nfkc\)",
    "symbols.model": "gigatoken gives other ids, for",  # a space behind each "<tool>"
    "word_piece.json": 'Unsupported model type "WordPiece"',
    "unigram.json": 'Unsupported model type "Unigram"',
    "odd_pattern.json": "Unknown pre_tokenizer",
    "compatible.json": r"normalises text \(Lowercase, NFKC\)",
    "own.tiktoken": "does not support the pattern",
}


def sentencepiece_file(path: Path, normalization: str, symbols: tuple[str, ...] = (), add_dummy_prefix: bool = True) -> None:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(SOURCES).splitlines()),
            model_writer=file,
            vocab_size=600,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=normalization != "identity",
            add_dummy_prefix=add_dummy_prefix,
            control_symbols=["<|im_end|>", "[MASK]"],
            user_defined_symbols=list(symbols),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One vocabulary of every kind, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("vocabularies")
    place = {name: folder / name / name for name in [*FAST, *SLOW]}
    for path in place.values():
        path.parent.mkdir()
    train_sentencepiece(SOURCES, place["ours.model"], 600, special_tokens=["<|im_end|>", "[MASK]"])
    train_sentencepiece(SOURCES, place["unigram.model"], 600, "unigram")
    sentencepiece_file(place["llama.model"], "identity")
    sentencepiece_file(place["nmt.model"], "nmt_nfkc")
    sentencepiece_file(place["symbols.model"], "identity", ("<tool>",))
    model = learnt_byte_level(SOURCES, SPECIAL_TOKENS)
    model.save(str(place["byte_level.json"]))
    model.add_tokens(["<tool>", "    "])  # recognised in a text, by both
    model.normalizer = tokenizers.normalizers.NFC()
    model.save(str(place["composed.json"]))
    model.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()])
    model.save(str(place["compatible.json"]))
    model = learnt_byte_level(SOURCES, SPECIAL_TOKENS)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[a-z]+|[^a-z]+"), "isolated")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)])
    model.save(str(place["odd_pattern.json"]))
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]")).save(str(place["word_piece.json"]))
    tokenizers.Tokenizer(tokenizers.models.Unigram([("[UNK]", 0.0), ("</s>", 0.0)], 0)).save(str(place["unigram.json"]))
    for name in ("r50k", "cl100k", "o200k"):
        rank_file(place[f"{name}.tiktoken"], SOURCES, published_pattern(f"{name}_base"))
    rank_file(place["own.tiktoken"], SOURCES, r"[a-z]+|[^a-z]+")
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """Return pairs of a tokenizer and the same with gigatoken, of each kind that it supports."""
    return {name: (load_tokenizer(folder / name / name), load_tokenizer(folder / name / name, fast=True)) for name in FAST}


@pytest.mark.parametrize("name", FAST)
def test_gigatoken_is_used_and_named_if_it_gives_the_same_ids(folder, name):
    given_tokenizer = load_tokenizer(folder / name / name)
    fast, sentence = fastest(given_tokenizer, SOURCES)
    assert isinstance(fast, GigatokenTokenizer)
    assert fast.engine.startswith("gigatoken ") and fast.engine in sentence and given_tokenizer.engine in sentence
    for attribute in ("path", "vocab_size", "end_of_text", "end_of_text_token", "special_tokens", "settings"):
        assert getattr(fast, attribute) == getattr(given_tokenizer, attribute)


@pytest.mark.parametrize("name", SLOW)
def test_given_tokenizer_is_kept_if_gigatoken_cannot_replace_it(folder, name):
    given_tokenizer = load_tokenizer(folder / name / name)
    kept, sentence = fastest(given_tokenizer, SOURCES)
    assert kept is given_tokenizer and given_tokenizer.engine in sentence
    with pytest.raises(AssertionError, match=SLOW[name]):
        raise AssertionError(sentence)


@pytest.mark.parametrize("name", FAST)
@given(text=ANY_TEXT)
@example(text="".join(PARTS) * 3)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_gigatoken_gives_the_same_ids_for_any_text(pairs, name, text):
    reference, fast = pairs[name]
    ids = fast.encode(text)
    assert ids == reference.encode(text)
    assert not {fast.end_of_text, *fast.special_tokens.values()} & set(ids)
    assert fast.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("name", FAST)
@given(texts=st.lists(ANY_TEXT, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_gigatoken_encodes_documents_the_same(pairs, name, texts):
    reference, fast = pairs[name]
    for dtype in (np.dtype("<u2"), np.dtype("<i4")):
        for ours, theirs in zip(fast.encode_documents(texts, dtype), reference.encode_documents(texts, dtype), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", FAST)
def test_characters_newer_than_this_python_have_the_same_ids(pairs, name):
    """The version of Unicode in a library decides which characters are letters, and which are composed."""
    reference, fast = pairs[name]
    for text in ("\u088f's", "\u0c5c's N", "\ua7ce's", "\U00032c9f's N", "\U000105d2\u0307", "\U00011382\U000113c9", "a\U000113c9's"):
        assert fast.encode(text) == reference.encode(text), text


def test_space_character_of_sentencepiece_in_a_text_is_kept(tmp_path):
    sentencepiece_file(tmp_path / "tokenizer.model", "identity", add_dummy_prefix=False)
    reference = load_tokenizer(tmp_path / "tokenizer.model")
    fast = GigatokenTokenizer(reference)
    for text in ("▁", "a ▁b", "▁▁ x"):
        assert fast.encode(text) == reference.encode(text), text


def test_different_ids_are_detected(folder, monkeypatch):
    other = (folder / "byte_level.json/byte_level.json").read_bytes().replace(b'"in"', b'"iN"')
    monkeypatch.setattr(
        gigatoken.Tokenizer, "from_json", classmethod(lambda cls, contents: cls(gigatoken.gigatoken_rs.load_hf_json(other)))
    )
    given_tokenizer = load_tokenizer(folder / "composed.json/composed.json")
    kept, sentence = fastest(given_tokenizer, SOURCES)
    assert kept is given_tokenizer and "gigatoken gives other ids, for " in sentence


def test_gigatokens_cache_is_emptied_when_full(folder, monkeypatch):
    loaded = []
    from_json = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda contents: loaded.append(1) or from_json(contents))
    monkeypatch.setattr(data.tokenization.gigatoken_tokenizer, "CACHED_CHARACTERS", 100)
    reference = load_tokenizer(folder / "byte_level.json/byte_level.json")
    fast = load_tokenizer(reference.path, fast=True)
    texts = [SOURCES[0][start : start + 51] for start in range(0, 1020, 51)]
    assert [fast.encode(text) for text in texts] == [reference.encode(text) for text in texts]
    assert len(loaded) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_gigatoken_encodes_every_character_the_same(pairs, name):
    reference, fast = pairs[name]
    for code in [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 16)]:  # behind 0x20000 in blocks of one kind
        text = "a{0}b1{0}{0} {0}.{0}{0}S'{0}\n".format(chr(code))
        assert fast.encode(text) == reference.encode(text), hex(code)
