import argparse
import json
import random
import string
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data.command_line import UserError
from data.tokenization.conversion import convert
from data.tokenization.huggingface_folder import write_tokenizer
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from data.tokenization.sentencepiece_tokenizer import SPACE, read_model
from data.tokenization.tiktoken_tokenizer import published_pattern
from tests.data.tokenization.vocabularies import rank_file

CODE = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]  # real code and real English, on every machine
OTHER = "Ένα μικρό κείμενο. 汉字很多。 ein schöner Tag… déjà vu 😀 " * 20
TEXTS = [CODE, OTHER]
HARD = [
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "def f(x):\n    if x:\n        return x\n\treturn None\r\n",
    "▁ a real ▁▁ mark▁",
    "<|endoftext|><unk></s><s><0x0A>",
    "😀👩‍👩‍👧‍👦 never seen: ﷽ \U0010ffff \x00 \x7f \u200b",
    "In the year 1812 the old cat sat. 汉字",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    train_sentencepiece(TEXTS, path, vocab_size=800, kind=request.param)
    return path


def their_tokenizer(folder, model_type="llama"):
    transformers = pytest.importorskip("transformers", reason="AutoTokenizer is part of transformers")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_texts(tokenizer, number):
    draw = random.Random(1)
    for _ in range(number):
        yield tokenizer.decode([draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 50))])


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_auto_tokenizer_gives_our_ids_and_our_text(model_file, tmp_path, model_type):
    ours = load_tokenizer(model_file)
    write_tokenizer(model_file, tmp_path, model_max_length=77)
    theirs = their_tokenizer(tmp_path, model_type)
    assert (theirs.eos_token, theirs.eos_token_id) == (ours.end_of_text_token, ours.end_of_text)
    assert theirs.model_max_length == 77 and len(theirs) == ours.vocab_size
    for text in [*HARD, *TEXTS, *random_texts(ours, 300)]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    assert theirs.decode([*ours.encode("a b"), ours.end_of_text], skip_special_tokens=True) == "a b"


def test_written_files_load_as_the_same_tokenizer(model_file, tmp_path):
    write_tokenizer(model_file, tmp_path, model_max_length=77)
    ours, again = load_tokenizer(model_file), load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.vocab_size, again.end_of_text) == (ours.vocab_size, ours.end_of_text)
    assert all(again.encode(text) == ours.encode(text) and again.decode(ours.encode(text)) == text for text in HARD)
    assert (tmp_path / "tokenizer.model").read_bytes() == model_file.read_bytes()


def test_runs_of_one_character_are_merged_in_the_same_order(model_file):
    ours = load_tokenizer(model_file)
    theirs = convert(ours)
    theirs.encode_special_tokens = True
    draw, differing = random.Random(2), 0
    for _ in range(500):
        text = "".join(draw.choice(" \n\tae=-.#") * draw.randrange(1, 60) for _ in range(draw.randrange(1, 5)))
        our_ids, their_ids = ours.encode(text), theirs.encode(text, add_special_tokens=False).ids
        assert sorted(our_ids) == sorted(their_ids)
        differing += our_ids != their_ids
    # Unigram: one multiset of pieces has many orders, equally likely but for the rounding of a float32 sum.
    assert differing == 0 or "unigram" in str(model_file)


def sentencepiece_file(path, **options):
    settings = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
        "normalization_rule_name": "identity",
        "required_chars": string.printable.strip(),
    }
    settings |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False} | options
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CODE.splitlines()), model_writer=file, **settings)
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_model_that_puts_a_space_before_a_text_is_converted(tmp_path, kind):
    model_file = sentencepiece_file(tmp_path / "llama2.model", model_type=kind)  # Llama 2's settings
    write_tokenizer(model_file, tmp_path, model_max_length=77)
    ours, theirs = load_tokenizer(model_file), their_tokenizer(tmp_path)
    assert theirs.eos_token == "</s>"
    for text in HARD:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text


def add_runs_of_spaces(path):
    """Add pieces of 2 to 16 spaces with one score, which no pair of them beats, as Mistral's models have."""
    model = read_model(path)
    known = {piece.piece for piece in model.pieces}
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15):
        if (run := length * SPACE) not in known:
            model.pieces.add(piece=run)
    for piece in model.pieces:
        if set(piece.piece) == {SPACE}:
            piece.score = -1e9
    path.write_bytes(model.SerializeToString())


def test_runs_of_spaces_with_equal_scores_are_joined_from_the_left(tmp_path):
    path = sentencepiece_file(tmp_path / "own.model")
    add_runs_of_spaces(path)
    write_tokenizer(path, tmp_path, model_max_length=77)
    ours, theirs = load_tokenizer(path), load_tokenizer(tmp_path / "tokenizer.json")
    for length in range(1, 100):
        for text in (length * " ", f"a{length * ' '}b", f"{length * ' '}\n{length * ' '}=="):
            assert theirs.encode(text) == ours.encode(text), (length, text)


@pytest.mark.parametrize("prefix", [True, False])
def test_user_defined_pieces_are_tokens_wherever_they_stand(tmp_path, prefix):
    kept = ["[REF]", "[REF]2", "[/REF]", "a.b"]
    path = sentencepiece_file(tmp_path / "own.model", user_defined_symbols=kept, add_dummy_prefix=prefix)
    write_tokenizer(path, tmp_path, model_max_length=77)
    ours, theirs = load_tokenizer(path), their_tokenizer(tmp_path)
    draw, names = random.Random(4), [*kept, "[REF", "]", "<s>", "</s>", "<0x0A>", "<unk>", " ", "\n", "acb", "é", "def ", "return"]
    texts = [*HARD, *names, *("".join(draw.choices(names, k=draw.randrange(1, 9))) for _ in range(2000))]
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"byte_fallback": False}, "no bytes for unknown characters"),
        ({"normalization_rule_name": "nmt_nfkc"}, 'normalises text ("nmt_nfkc")'),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"model_type": "unigram", "user_defined_symbols": ["<tool>"]}, "is unigram with user-defined pieces"),
        ({"treat_whitespace_as_suffix": True}, "puts the space after a word"),
        ({"model_type": "char"}, "is neither bpe nor unigram"),
    ],
)
def test_features_without_a_counterpart_are_refused_by_name(tmp_path, options, sentence):
    model_file = sentencepiece_file(tmp_path / "other.model", **options)
    with pytest.raises(UserError) as refusal:
        write_tokenizer(model_file, tmp_path, model_max_length=77)
    assert sentence in str(refusal.value)
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_tokenizer_json_is_copied(tmp_path):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(TEXTS, trainer)
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    theirs.save(str(tmp_path / "from" / "tokenizer.json"))
    write_tokenizer(tmp_path / "from" / "tokenizer.json", tmp_path / "to", model_max_length=77)
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == (tmp_path / "from" / "tokenizer.json").read_bytes()
    ours, read = load_tokenizer(tmp_path / "from"), their_tokenizer(tmp_path / "to", "gpt2")
    assert read.eos_token_id == ours.end_of_text == 1
    assert all(read(text)["input_ids"] == ours.encode(text) for text in [*HARD, "a <eos> in the text"])


def test_gpt2s_two_files_become_one_tokenizer_json(tmp_path):
    for folder in ("from", "to"):
        (tmp_path / folder).mkdir()
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs.save_model(str(tmp_path / "from"))
    write_tokenizer(tmp_path / "from", tmp_path / "to", model_max_length=77)
    ours, read = load_tokenizer(tmp_path / "from"), their_tokenizer(tmp_path / "to", "gpt2")
    assert all(read(text)["input_ids"] == ours.encode(text) for text in HARD)


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_tiktoken_vocabulary_is_converted_with_its_ids(tmp_path, name):
    rank_file(tmp_path / "own.tiktoken", TEXTS, published_pattern(name))
    (tmp_path / "to").mkdir()
    write_tokenizer(tmp_path / "own.tiktoken", tmp_path / "to", model_max_length=77)
    ours, theirs = load_tokenizer(tmp_path / "own.tiktoken"), their_tokenizer(tmp_path / "to", "qwen3")
    assert (theirs.eos_token, theirs.eos_token_id) == (ours.end_of_text_token, ours.end_of_text)
    assert theirs.convert_tokens_to_ids("[MASK]") == ours.special_token_id("[MASK]")
    for text in [*HARD, *TEXTS, *random_texts(ours, 300), "12345 I'LL don't\n\n  x \u2028 y", " <|im_end|>[MASK]"]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text


def test_tiktoken_special_token_that_is_a_word_is_refused(tmp_path):
    rank_file(tmp_path / "own.tiktoken", TEXTS)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("[MASK]", "mask"))
    with pytest.raises(UserError, match="would give other ids for 'mask'"):
        write_tokenizer(tmp_path / "own.tiktoken", tmp_path, model_max_length=77)
