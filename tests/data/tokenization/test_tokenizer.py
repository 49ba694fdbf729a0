"""Text to ids and back: any text is restored, and nothing written in it becomes a special token."""

import base64
import importlib.metadata
import itertools
import json
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.tokenization.conversion import convert
from data.tokenization.gigatoken_tokenizer import GigatokenTokenizer
from data.tokenization.learning import train_sentencepiece
from data.tokenization.library_errors import library_errors_as
from data.tokenization.loading import copy_tokenizer, fastest, load_tokenizer
from data.tokenization.tiktoken_tokenizer import published_pattern
from data.tokenization.tokenizer import EncodingError
from tests.data.tokenization.vocabularies import (
    HOPELESS,
    byte_characters,
    byte_level,
    bytes_alone,
    exhausting_byte_level,
    learnt_byte_level,
    rank_file,
)

GPT2 = Path(__file__).parents[4] / "shared/corpora/gpt2-bpe"
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|endoftext|>",
    "<|im_end|>",
    "[MASK]",
    "<0x41>",
    "<0xE2>",
    "▁",
    "▅",
    "⁇",
    " \u2047 ",
    "\0",
    "\t",
    "\r\n",
    "\ufeff",
    "\u2028",
]
ANY_TEXT = st.lists(st.text() | st.sampled_from(SPECIAL) | st.sampled_from(["    ", "\n", "def", "return self."])).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("bpe", "unigram"):
        train_sentencepiece(SOURCES, folder / f"{kind}.model", 600, kind, special_tokens=["<|im_end|>", "[MASK]"])
    bytes_alone(["<|endoftext|>", "<s>", "<|im_end|>", "[MASK]"]).save(str(folder / "tokenizer.json"))
    (folder / "ranks").mkdir()
    rank_file(folder / "ranks" / "tiktoken.tiktoken", SOURCES)
    return {path.stem: load_tokenizer(path) for path in sorted(folder.rglob("*.*")) if path.stem != "tokenizer_config"}


KINDS = ["bpe", "unigram", "tokenizer", "tiktoken"]


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANY_TEXT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_decoding_restores_any_text(trained, kind, text):
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.end_of_text, *tokenizer.special_tokens.values()} & set(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(ANY_TEXT, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_encoded_documents_end_with_end_of_text(trained, kind, threads, texts):
    tokenizer = load_tokenizer(trained[kind].path, threads=threads)
    expected = [[*trained[kind].encode(text), tokenizer.end_of_text] for text in texts]
    for dtype in (np.dtype("<u2"), np.dtype("<i4")):
        tokens, lengths = tokenizer.encode_documents(texts, dtype)
        assert (tokens.dtype, lengths.dtype) == (dtype, np.int32)
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [token for ids in expected for token in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_ids_and_no_text(trained, kind):
    tokenizer = trained[kind]
    ids = [tokenizer.special_token_id(token) for token in ("<|endoftext|>", "<|im_end|>", "[MASK]")]
    assert ids[0] == tokenizer.end_of_text and len(set(ids)) == 3
    assert tokenizer.decode([*tokenizer.encode("a"), *ids, *tokenizer.encode("b")]) == "ab"
    with pytest.raises(UserError, match=r'no special token "\[MUSK\]"\. Did you mean "\[MASK\]"\?'):
        tokenizer.special_token_id("[MUSK]")


@pytest.mark.parametrize(
    ("kind", "library"), [("bpe", "sentencepiece"), ("unigram", "sentencepiece"), ("tokenizer", "tokenizers"), ("tiktoken", "tiktoken")]
)
def test_engine_names_the_library_and_its_version(trained, kind, library):
    assert trained[kind].engine == f"{library} {importlib.metadata.version(library)}"


def test_learnt_special_tokens_follow_end_of_text(trained):
    assert trained["bpe"].special_tokens == {"<|endoftext|>": 1, "<|im_end|>": 2, "[MASK]": 3}


@pytest.mark.parametrize("names", [["<a>", "<a>"], ["<|endoftext|>"], [""]])
def test_special_tokens_to_learn_must_be_unique(tmp_path, names):
    with pytest.raises(UserError, match="each name must be non-empty, unique and not"):
        train_sentencepiece(SOURCES, tmp_path / "tokenizer.model", 600, special_tokens=names)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_learnt_vocabulary_has_its_size_and_bytes_for_unseen_text(trained, kind):
    tokenizer = trained[kind]
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode("語")) == 3
    assert len(tokenizer.encode(SOURCES[0])) < len(SOURCES[0]) / 2


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_learning_twice_gives_the_same_file(trained, kind, tmp_path):
    train_sentencepiece(SOURCES, tmp_path / "again.model", 600, kind, special_tokens=["<|im_end|>", "[MASK]"])
    assert (tmp_path / "again.model").read_bytes() == trained[kind].path.read_bytes()


def test_newline_and_indentation_after_it_can_be_one_piece(trained):
    assert len(trained["bpe"].encode(":\n        ")) <= 2


def test_text_with_more_characters_than_pieces_can_be_learnt(tmp_path):
    text = "".join(chr(0x4E00 + number) * 3 for number in range(3000))
    train_sentencepiece([text], tmp_path / "chinese.model", 700)
    tokenizer = load_tokenizer(tmp_path / "chinese.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_too_short_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"too short to learn 4096 pieces from it\. Use a vocab_size of at most 261"):
        train_sentencepiece(["hi\n"], tmp_path / "short.model", 4096)
    with pytest.raises(UserError, match="it is empty"):
        train_sentencepiece([], tmp_path / "empty.model", 4096)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_many_special_tokens_for_the_vocabulary_are_refused(tmp_path, kind):
    names = [f"<{number}>" for number in range(300)]
    with pytest.raises(UserError, match=r"^vocab_size 512 is too small for the 256 bytes, .* Use 65\d or more\.$") as refused:
        train_sentencepiece(["one two three four. " * 50], tmp_path / "a.model", 512, kind, names)
    enough = int(str(refused.value).split()[-3])
    train_sentencepiece(["one two three four. " * 50], tmp_path / "a.model", enough, kind, names)


@pytest.mark.parametrize("kind", ["bpe", "tokenizer", "tiktoken"])
def test_copied_tokenizer_is_the_same(trained, kind, tmp_path):
    copy = copy_tokenizer(trained[kind], tmp_path)
    assert copy.read_bytes() == trained[kind].path.read_bytes()
    for again in (load_tokenizer(tmp_path), load_tokenizer(copy)):
        assert (again.end_of_text, again.special_tokens) == (trained[kind].end_of_text, trained[kind].special_tokens)
        assert again.encode(SOURCES[0]) == trained[kind].encode(SOURCES[0])
        assert copy_tokenizer(again, tmp_path) == copy


def test_copied_tokenizer_keeps_the_chosen_end_of_text(tmp_path):
    bytes_alone(["[END]", "<|im_end|>"]).save(str(tmp_path / "own.json"))
    with pytest.raises(
        UserError, match=r"Give the .* with --end_of_text of data/prepare\.py, or as eos_token in the tokenizer_config\.json next"
    ):
        load_tokenizer(tmp_path / "own.json")
    with pytest.raises(UserError, match=r'no token "\[END" .* Did you mean "\[END\]"\? Set it with .*, or as eos_token in the'):
        load_tokenizer(tmp_path / "own.json", "[END")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(load_tokenizer(tmp_path / "own.json", "[END]"), tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").end_of_text == 256


def test_configuration_file_sets_the_end_of_text(tmp_path):
    bytes_alone(["<|endoftext|>", "<|im_end|>"]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end_of_text == 256
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert load_tokenizer(tmp_path).end_of_text == 257


def test_configuration_file_sets_the_end_of_a_sentencepiece_model(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES),
        model_prefix=f"{tmp_path}/tokenizer",
        vocab_size=300,
        eos_id=-1,
        control_symbols=["<end>"],
        minloglevel=2,
    )
    with pytest.raises(
        UserError, match=r"no end-of-sentence piece\. Give .*, or as eos_token in the tokenizer_config\.json next to that file\.$"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert load_tokenizer(tmp_path).end_of_text_token == "<end>"


def test_padding_and_truncation_of_a_tokenizer_json_are_ignored(tmp_path):
    model = bytes_alone(["</s>"])
    model.enable_truncation(4)
    model.enable_padding(length=16)
    model.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("eight by")) == 8


def test_model_that_puts_a_space_before_a_text_is_used_as_it_is(tmp_path):
    prefix = str(tmp_path / "llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES), model_prefix=prefix, vocab_size=600, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    native = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    tokenizer = load_tokenizer(f"{prefix}.model")
    assert tokenizer.end_of_text == native.eos_id()
    for text in ("import json", "a ▁b"):
        assert tokenizer.encode(text) == native.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_file_that_is_not_a_tokenizer_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"contains no tokenizer: none of tokenizer\.json, tokenizer\.model,"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is not a"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not GPT2.exists(), reason=f"{GPT2} is not here: the vocabulary of GPT-2")
def test_gpt2_gives_its_published_ids(tmp_path):
    vocabulary = json.loads((GPT2 / "gpt2-vocab.json").read_text())
    merges = [tuple(line.split()) for line in (GPT2 / "gpt2-merges.txt").read_text().splitlines()[1:] if line]
    byte_level(vocabulary, merges, ["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|> ▁\n\té")) == "<|endoftext|> ▁\n\té"


def test_text_that_cannot_be_encoded_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0), ("</s>", 0.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"The text 'ab' \(2 characters\) cannot be tokenized with .*tokenizer\.json \(.*\): .*unk"):
        load_tokenizer(tmp_path).encode_documents(["ab"], np.dtype("<u2"))


def test_panic_of_a_library_is_an_error_that_names_the_text(tmp_path):
    exhausting_byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents([text], np.dtype("<u2"))):
        with pytest.raises(EncodingError, match=r"The text 'a{40}' \(42 characters\) cannot be .*: Onig: Regex search error") as refused:
            encode(HOPELESS)
        assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value), "a worker process can report it"
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"


@pytest.mark.parametrize(
    "stopped", [KeyboardInterrupt(), SystemExit(), UserError("ours"), MemoryError(), OSError(28, "full"), AssertionError()]
)
def test_only_errors_of_a_library_are_changed(stopped):
    with pytest.raises(type(stopped)) as raised, library_errors_as(EncodingError):
        raise stopped
    assert raised.value is stopped


def test_panic_of_gigatoken_leaves_the_text_to_the_original(trained, monkeypatch):
    fast = GigatokenTokenizer(trained["bpe"])
    panicking = exhausting_byte_level()
    monkeypatch.setattr(fast, "_fast", types.SimpleNamespace(encode=panicking.encode))
    assert fast.encode(HOPELESS) == trained["bpe"].encode(HOPELESS)


@pytest.mark.parametrize("name", ["r50k_base", "o200k_base"])
def test_tiktoken_encodes_a_million_spaces(tmp_path, name):
    rank_file(tmp_path / "own.tiktoken", SOURCES[:1], published_pattern(name))
    tokenizer = load_tokenizer(tmp_path)
    text = "x" + 999_990 * " " + 20 * " \n" + "y"
    expected = convert(tokenizer).encode(text).ids  # Hugging Face's library, whose engine needs no stack
    assert tokenizer.encode_documents([text], np.dtype("<u2"))[0].tolist() == [*expected, tokenizer.end_of_text]


@pytest.mark.skipif(not GPT2.exists(), reason=f"{GPT2} is not here: the vocabulary of GPT-2")
def test_openais_vocabulary_needs_no_configuration(tmp_path):
    vocabulary = json.loads((GPT2 / "gpt2-vocab.json").read_text())
    byte = {character: byte for byte, character in enumerate(byte_characters())}
    lines = [base64.b64encode(bytes(byte[character] for character in token)) + b" %d\n" % rank for token, rank in vocabulary.items()]
    (tmp_path / "r50k_base.tiktoken").write_bytes(b"".join(lines[:-1]))  # all but <|endoftext|>
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    (tmp_path / "r50k_base.tiktoken").write_bytes(b"".join(lines[:-2]))
    with pytest.raises(UserError, match="not the file of this name that OpenAI publishes"):
        load_tokenizer(tmp_path)


def test_openais_patterns_are_known_without_a_network():
    assert all(r"\p{N}{1,3}" in published_pattern(name) for name in ("cl100k_base", "o200k_base"))
    assert published_pattern("r50k_base") == published_pattern("p50k_base")
    assert published_pattern("gpt2") is None and published_pattern("own") is None


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model", "own.tiktoken"])
def test_tiktoken_vocabulary_is_recognised_by_its_content(trained, tmp_path, name):
    """Kimi and Llama 3 call theirs .model."""
    rank_file(tmp_path / name, SOURCES)
    assert load_tokenizer(tmp_path).encode(SOURCES[0]) == trained["tiktoken"].encode(SOURCES[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pat_str": None}, 'Put "pat_str" and "added_tokens_decoder" into'),
        ({"pat_str": "("}, "cannot be loaded"),
        ({"added_tokens_decoder": {"7": {"content": "</s>"}}}, r"the id of </s> is also the id of a token in own\.tiktoken"),
        ({"added_tokens_decoder": {}}, "has none of the tokens "),
        ({"eos_token": "[MUSK]"}, r'Did you mean "\[MASK\]"'),
    ],
)
def test_incomplete_tiktoken_configuration_is_refused(tmp_path, change, sentence):
    rank_file(tmp_path / "own.tiktoken", SOURCES[:1])
    path = tmp_path / "tokenizer_config.json"
    configuration = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in configuration.items() if value is not None}))
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path)


def test_damaged_tiktoken_vocabulary_is_refused_with_its_line(tmp_path):
    rank_file(tmp_path / "own.tiktoken", SOURCES[:1])
    lines = (tmp_path / "own.tiktoken").read_bytes().splitlines()
    (tmp_path / "own.tiktoken").write_bytes(b"\n".join([*lines[:4], b"%%% 4", *lines[5:]]))
    with pytest.raises(UserError, match=r"own\.tiktoken, line 5"):
        load_tokenizer(tmp_path)
    (tmp_path / "own.tiktoken").write_bytes(b"\n".join(lines[:200]))
    with pytest.raises(UserError, match="56 of the 256 bytes are missing"):
        load_tokenizer(tmp_path)


def test_gpt2s_two_files_equal_one_tokenizer_json(tmp_path):
    whole = learnt_byte_level(SOURCES, ["<|endoftext|>"])
    (tmp_path / "two").mkdir()
    whole.model.save(str(tmp_path / "two"), "mine")
    vocabulary = json.loads((tmp_path / "two" / "mine-vocab.json").read_text())
    (tmp_path / "two" / "mine-vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    whole.save(str(tmp_path / "tokenizer.json"))
    one, two = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(tmp_path / "two")
    assert (two.vocab_size, two.end_of_text) == (one.vocab_size, one.end_of_text)
    for text in [*SOURCES[:2], "<|endoftext|> é 汉"]:
        assert two.encode(text) == one.encode(text)
    (tmp_path / "copy").mkdir()
    assert copy_tokenizer(two, tmp_path / "copy").name == "tokenizer.json"
    assert load_tokenizer(tmp_path / "copy").encode(SOURCES[0]) == one.encode(SOURCES[0])
    assert fastest(load_tokenizer(tmp_path / "two" / "mine-vocab.json"), SOURCES)[0].engine.startswith("gigatoken")


def test_pieces_within_words_only_begin_with_a_space(tmp_path):
    train_sentencepiece(SOURCES, tmp_path / "words.model", 600, within_words=True)
    tokenizer = load_tokenizer(tmp_path / "words.model")
    words = words_of(tokenizer, "return the first of them, 25 times")
    assert [word.strip() for word in words] == ["return", "the", "first", "of", "them,", "25", "times"]


def words_of(tokenizer, text):
    """The text of each word, by the tokenizer's edges."""
    ids = np.array(tokenizer.encode(text))
    begins, ends = tokenizer.word_edges()
    assert len(begins) == len(ends) == tokenizer.vocab_size
    edges = [place for place in range(1, len(ids)) if begins[ids[place]] or ends[ids[place - 1]]]
    return [tokenizer.decode(part.tolist()) for part in np.split(ids, edges)]


@pytest.mark.parametrize("kind", KINDS)
def test_words_begin_only_at_spaces_and_line_ends(trained, kind):
    text = "return the whole naïve\nHaus, for x in 汉字 y"
    words = words_of(trained[kind], text)
    assert "".join(words) == text and len(words) > 3
    assert all(before[-1].isspace() or word[0].isspace() for before, word in itertools.pairwise(words))
    if kind == "tokenizer":  # of single bytes, each space and line end one of them
        assert [word.strip() for word in words if word.strip()] == text.split()


def test_wordpiece_continuations_do_not_begin_a_word(tmp_path):
    pieces = ["[UNK]", "[SEP]", "play", "##ing", "##s", "the", ",", "dog"]
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece()
    model.add_special_tokens(["[SEP]"])
    model.save(str(tmp_path / "tokenizer.json"))
    assert words_of(load_tokenizer(tmp_path, "[SEP]"), "the dogs,playing") == ["the", "dogs", ",", "playing"]


def test_space_characters_of_other_tokenizers_are_letters(tmp_path):
    """Byte-level BPE writes a carriage return as U+010D, which is a letter of Czech."""
    pieces = ["<unk>", "</s>", "<0x0A>", "\u2581pla", "\u010di", "ce\u010d", "ek", "\u2581"]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], 0, True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    begins, ends = load_tokenizer(tmp_path, "</s>").word_edges()
    assert np.flatnonzero(begins).tolist() == [2, 3, 7] and np.flatnonzero(ends).tolist() == [2]
