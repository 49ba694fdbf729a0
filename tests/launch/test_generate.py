"""Tests of launch/generate.py for each architecture, with networks whose predictions are known; decoders are in test_doors.py."""

import io
import json
import sys

import pytest
import torch

from data.command_line import UserError
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from launch import generate
from launch.checkpoints import opening
from launch.evaluation import generating
from launch.evaluation.predictions import Names, names_of
from model.config import ModelConfig
from model.transformer import Transformer

SPECIAL = ("[CLS]", "[MASK]", *(f"<extra_id_{number}>" for number in range(11)))
SMALL = {"vocab_size": 400, "sequence_length": 64, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
KINDS = {
    "decoder": {},
    "encoder_decoder": {"architecture": "encoder_decoder"},
    "encoder": {"architecture": "encoder", "token_types": 2},
    "classifier": {"architecture": "encoder", "token_head": False, "num_classes": 3},
}


class Copying(torch.nn.Module):
    """An encoder-decoder whose target equals its source."""

    def forward(self, source, source_segments, tokens, segments, cache):
        likeliest = source[:, cache.length : cache.length + 1]
        cache.length += 1
        return 50.0 * torch.nn.functional.one_hot(likeliest, SMALL["vocab_size"])


class Expecting(torch.nn.Module):
    """An encoder that predicts these ids with these probabilities at every position; its class is the number of tokens modulo 3."""

    def __init__(self, probabilities: dict[int, float]):
        super().__init__()
        self.probabilities = probabilities

    def forward(self, tokens, segments, *token_types):
        assert not any(types.any() for types in token_types)
        row = torch.full((SMALL["vocab_size"],), -1e9)
        row[list(self.probabilities)] = torch.tensor(list(self.probabilities.values())).log()
        classes = torch.nn.functional.one_hot(segments.sum(dim=1) % 3, 3) * 2.0
        return row.expand(*tokens.shape, -1), classes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(["the cat sat on the mat and the dog sat on the cat\n" * 20], path, 400, special_tokens=SPECIAL)
    return load_tokenizer(path)


@pytest.fixture
def door(tokenizer, tmp_path, monkeypatch, capsys):
    """Return a function that runs the script with a given network in place of the one it would read, and returns what it prints."""

    def call(kind: str, network: torch.nn.Module, *words: str, data: dict | None = None) -> str:
        config = ModelConfig(**SMALL, **KINDS[kind])
        found = opening.LoadedModel(config, {}, tmp_path / "step", tokenizer.path, 1, {"data": data or {}}, network)
        monkeypatch.setattr(generating, "open_model", lambda path, average: found)
        monkeypatch.setattr(generating, "load_weights", lambda opened: opened)
        assert generate.main(["runs/x", *words]) == 0
        return capsys.readouterr().out

    return call


def test_file_of_sources_gives_a_line_for_each_in_order(door, tmp_path):
    lines = ["the cat sat", "", "a", "the dog sat on the mat and the cat", "x y z", "  ", "naïve  <extra_id_10> cat"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt"), "--batch_size", "2"]
    assert door("encoder_decoder", Copying(), *words) == ""
    expected = [*lines[:5], "", "naïve<extra_id_10> cat"]  # a sentinel includes the spaces before it
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "\n".join(expected) + "\n"
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(UserError, match=r"out\.txt already exists; nothing is overwritten"):
        door("encoder_decoder", Copying(), *words)


def test_lines_of_standard_input_give_lines_on_standard_output(door, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\r\nthe dog")))
    assert door("encoder_decoder", Copying(), "--input", "-") == "the cat\nthe dog\n"


@pytest.mark.parametrize("how", [[], ["--beam_size", "1"], ["--temperature", "0"], ["--top_k", "1"]])
def test_target_is_found_by_beam_search_or_sampling(door, how):
    assert door("encoder_decoder", Copying(), "--prompt", "the cat sat", *how) == "the cat sat\n"
    assert door("encoder_decoder", Copying(), "--prompt", "the cat sat", "--max_new_tokens", "1", *how) != "the cat sat\n"


def test_beam_size_1_equals_greedy_sampling(door):
    network = Transformer(ModelConfig(**SMALL, tie_embeddings=False, **KINDS["encoder_decoder"])).eval()
    searched, drawn = (
        door("encoder_decoder", network, "--prompt", "the cat", "--max_new_tokens", "9", *how)
        for how in (["--beam_size", "1"], ["--temperature", "0"])
    )
    assert searched == drawn != "\n"


def test_texts_longer_than_the_context_are_cut(door, tmp_path, capsys):
    with capsys.disabled():
        (tmp_path / "in.txt").write_text("x" * 70 + "\nthe cat\n")
    out = door("encoder_decoder", Copying(), "--input", str(tmp_path / "in.txt"))
    assert out == "x" * 63 + "\nthe cat\n"  # and end of text


def test_each_mask_shows_its_most_likely_tokens(door, tokenizer):
    (dog,), (cat,) = tokenizer.encode(" dog"), tokenizer.encode(" cat")
    network = Expecting({cat: 0.625, dog: 0.25, tokenizer.special_tokens["[CLS]"]: 0.125})
    block = " 62.5 %  cat\n 25.0 %  dog\n"
    assert door("encoder", network, "--prompt", "the [MASK] and the [MASK].", "--top_k", "2") == f"[MASK] 1\n{block}[MASK] 2\n{block}"


def test_masks_in_a_file_are_filled(door, tokenizer, monkeypatch):
    network = Expecting(dict.fromkeys(tokenizer.encode(" cat"), 1.0))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the [MASK] sat\nno mask\nmat [MASK][MASK]")))
    assert door("encoder", network, "--input", "-") == "the cat sat\nno mask\nmat cat cat\n"


def test_classifier_prints_labels_or_class_indices(door, monkeypatch):
    assert door("classifier", Expecting({0: 1.0}), "--prompt", "x") == " 78.7 %  0\n 10.7 %  1\n 10.7 %  2\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\nxy\nxyz")))  # with [CLS] and end of text 3, 4 and 5 tokens
    assert door("classifier", Expecting({0: 1.0}), "--input", "-", data={"labels": ["none", "one", "two"]}) == "none\none\ntwo\n"


def test_names_are_read_from_a_hugging_face_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"10": "c", "0": "a", "2": "b"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<mask>", "cls_token": {"content": "<s>", "lstrip": False}}))
    found = opening.LoadedModel(ModelConfig(), {}, tmp_path, None, None, {}, torch.nn.Module())
    assert names_of(found) == Names("<s>", "<mask>", labels=("a", "b", "c"))


def test_tokenizer_of_another_model_is_refused(door, tokenizer, tmp_path, capsys):
    """It has fewer ids than the model, so that each of its ids is one of the model's."""
    network, words = Expecting({tokenizer.encode(" cat")[0]: 1.0}), ("--prompt", "the [MASK]")
    smaller = tmp_path / "tokenizer.model"
    train_sentencepiece(["the cat sat on the mat and the dog sat on the cat\n" * 20], smaller, 399, special_tokens=SPECIAL)
    with pytest.raises(UserError, match=rf"--tokenizer {smaller} gives other ids than {tokenizer.path}, the tokenizer next to the model"):
        door("encoder", network, *words, "--tokenizer", str(smaller))
    copy = tmp_path / "copy.model"
    copy.write_bytes(tokenizer.path.read_bytes())
    assert "cat" in door("encoder", network, *words, "--tokenizer", str(copy))


@pytest.mark.parametrize(
    ("kind", "words", "sentence"),
    [
        (
            "decoder",
            "--beam_size 2",
            r"--beam_size is not supported for a decoder \(runs/x is one\). Supported options: --max_new_tokens, ",
        ),
        ("decoder", "--input x", "--input is not supported for a decoder"),
        ("encoder", "--prompt [MASK] --temperature 1", "--temperature is not supported for an encoder with masks to fill"),
        ("encoder", "--prompt x", r"The text has no \[MASK\] for the encoder to fill: 'x'"),
        ("encoder", "", "runs/x is an encoder with masks to fill. Give it a text with --prompt"),
        ("encoder", "--prompt [MASK] --top_k 0", "top_k is 0; it must be at least 1."),
        ("classifier", "--prompt x --top_k 2", "--top_k is not supported for a classifier"),
        ("encoder_decoder", "--prompt x --temperature 1 --beam_size 4", "--temperature is for sampling tokens, --beam_size for the search"),
        ("encoder_decoder", "--prompt x --seed 1 --length_penalty 1", "--seed is for sampling tokens, --length_penalty for the search"),
        ("encoder_decoder", "--prompt x --beam_size 0", "beam_size is 0; it must be at least 1"),
        (
            "encoder_decoder",
            "--prompt x --max_new_tokens 65",
            "--max_new_tokens is 65; it must be at most 64, the longest target of runs/x.",
        ),
        ("encoder_decoder", "--prompt x --input x", "--prompt and --input both give the text to read"),
        ("encoder_decoder", "--prompt x --output new", "--output applies only to --input, which is not given."),
        ("encoder_decoder", "--input nowhere.txt", "nowhere.txt cannot be opened: No such file or directory."),
    ],
)
def test_unsupported_options_are_refused_by_name(door, kind, words, sentence):
    with pytest.raises(UserError, match=sentence):
        door(kind, Copying() if kind == "encoder_decoder" else Expecting({0: 1.0}), *words.split())


def test_line_that_is_not_utf8_is_named(door, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n\xff\n")))
    with pytest.raises(UserError, match=r"--input -: line 2 is not valid UTF-8\."):
        door("encoder_decoder", Copying(), "--input", "-")
