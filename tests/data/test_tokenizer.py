"""Text to ids and back: any text returns as it was, and nothing written in it becomes a special token."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.tokenizer import copy_tokenizer, load_tokenizer, train_sentencepiece

GPT2 = Path(__file__).parents[3] / "shared/corpora/gpt2-bpe"
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|endoftext|>",
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


def byte_level(vocabulary: dict, merges: list, special: list[str]) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(special)
    return model


def bytes_alone(special: list[str]) -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return byte_level({character: number for number, character in enumerate(alphabet)}, [], special)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for kind in ("bpe", "unigram"):
        train_sentencepiece(SOURCES, folder / f"{kind}.model", 600, kind)
    bytes_alone(["<|endoftext|>", "<s>"]).save(str(folder / "tokenizer.json"))
    return {path.stem: load_tokenizer(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "tokenizer"])
@given(text=ANY_TEXT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_returns_as_it_was_and_stays_text(trained, kind, text):
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_learnt_vocabulary_has_the_size_asked_for_and_bytes_for_what_it_never_saw(trained, kind):
    tokenizer = trained[kind]
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode("語")) == 3
    assert len(tokenizer.encode(SOURCES[0])) < len(SOURCES[0]) / 2


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_learning_twice_gives_the_same_bytes(trained, kind, tmp_path):
    train_sentencepiece(SOURCES, tmp_path / "again.model", 600, kind)
    assert (tmp_path / "again.model").read_bytes() == trained[kind].path.read_bytes()


def test_a_newline_and_the_indentation_behind_it_can_be_one_piece(trained):
    assert len(trained["bpe"].encode(":\n        ")) <= 2


def test_a_text_of_more_characters_than_pieces_can_be_learnt_from(tmp_path):
    text = "".join(chr(0x4E00 + number) * 3 for number in range(3000))
    train_sentencepiece([text], tmp_path / "chinese.model", 700)
    tokenizer = load_tokenizer(tmp_path / "chinese.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_too_short_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="too short to learn 4096 pieces from it; vocab_size can be 261 at most"):
        train_sentencepiece(["hi\n"], tmp_path / "short.model", 4096)
    with pytest.raises(UserError, match="it is empty"):
        train_sentencepiece([], tmp_path / "empty.model", 4096)


@pytest.mark.parametrize("kind", ["bpe", "tokenizer"])
def test_a_copy_is_the_same_tokenizer(trained, kind, tmp_path):
    copy = copy_tokenizer(trained[kind], tmp_path)
    assert copy.read_bytes() == trained[kind].path.read_bytes()
    assert load_tokenizer(tmp_path).end_of_text == trained[kind].end_of_text


def test_the_end_of_text_that_was_chosen_stays_with_the_copy(tmp_path):
    bytes_alone(["[SEP]", "<|im_end|>"]).save(str(tmp_path / "own.json"))
    with pytest.raises(UserError, match="Say with --end_of_text"):
        load_tokenizer(tmp_path / "own.json")
    with pytest.raises(UserError, match=r'no token "\[SEP" .* Did you mean "\[SEP\]"'):
        load_tokenizer(tmp_path / "own.json", "[SEP")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(load_tokenizer(tmp_path / "own.json", "[SEP]"), tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").end_of_text == 256


def test_the_configuration_beside_a_tokenizer_says_what_ends_a_text(tmp_path):
    bytes_alone(["<|endoftext|>", "<|im_end|>"]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end_of_text == 256
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert load_tokenizer(tmp_path).end_of_text == 257


def test_padding_and_truncation_written_into_a_tokenizer_do_not_cut_documents(tmp_path):
    model = bytes_alone(["</s>"])
    model.enable_truncation(4)
    model.enable_padding(length=16)
    model.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("eight by")) == 8


def test_a_model_of_others_that_puts_a_space_before_each_text_is_used_as_it_is(tmp_path):
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
def test_what_is_no_tokenizer_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is no"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not GPT2.exists(), reason=f"{GPT2} is not here: the vocabulary of GPT-2")
def test_gpt2_gives_the_ids_it_is_known_for(tmp_path):
    vocabulary = json.loads((GPT2 / "gpt2-vocab.json").read_text())
    merges = [tuple(line.split()) for line in (GPT2 / "gpt2-merges.txt").read_text().splitlines()[1:] if line]
    byte_level(vocabulary, merges, ["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert 50256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|> ▁\n\té")) == "<|endoftext|> ▁\n\té"
