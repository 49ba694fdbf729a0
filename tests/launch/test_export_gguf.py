"""The door to llama.cpp: one file with the tokenizer inside, checked by transformers."""

import argparse
from pathlib import Path

import gguf
import pytest

from data.command_line import UserError
from data.tokenization.huggingface import write_tokenizer
from data.tokenization.tokenizer import train_sentencepiece
from launch import export
from launch.compressing import llama_engine
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer

pytest.importorskip("transformers", reason="the independent reference is transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As launch/export.py leaves it: tokenizer.json, with the tokenizer.model that it was made from beside it."""
    place = tmp_path_factory.mktemp("exported")
    train_sentencepiece([Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]], place / "tokenizer.model", vocab_size=600)
    config = ModelConfig(vocab_size=608, sequence_length=48, hidden_size=64, num_layers=1)
    huggingface.export(config, dict(Transformer(config).named_parameters()), place / "model")
    write_tokenizer(place / "tokenizer.model", place / "model", 48)
    return place / "model"


def test_a_file_holds_network_and_tokenizer_and_says_how_it_was_checked(folder, tmp_path, capsys):
    output = tmp_path / "new" / "small.gguf"
    words = [str(folder), "--output", str(output), "--format", "gguf"]
    assert export.main([*words, "--type", "q4_0"]) == 0
    said = capsys.readouterr().out
    assert "7 q4_0, 3 f32, 1 q8_0" in said and "transformers reads it" in said
    assert ("llama.cpp gives our ids" in said) is llama_engine.is_installed()
    fields = gguf.GGUFReader(output).fields
    assert fields["general.name"].contents() == "small" and fields["tokenizer.ggml.model"].contents() == "llama"
    assert len(fields["tokenizer.ggml.tokens"].data) == 608
    with pytest.raises(UserError, match="is there already; nothing is overwritten"):
        export.main(words)
    assert [path.name for path in output.parent.iterdir()] == ["small.gguf"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--output", "x.gguf", "--type", "f16"], "--type f16 is for --format gguf"),
        (["--output", "x.gguf", "--format", "gguf", "--precision", "bf16"], "--precision bf16 is for Hugging Face folders"),
        (["--output", "x", "--format", "gguf"], "--output x is to be a file whose name ends with .gguf"),
        (["--output", "x.gguf", "--format", "gguf", "--type", "q6_k"], r"--type q6_k is written by llama.cpp, .* pip install llama"),
    ],
)
def test_what_says_nothing_together_is_refused(folder, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_engine, "is_installed", lambda: False)
    with pytest.raises(UserError, match=complaint):
        export.main([str(folder), *words])
    assert not list(tmp_path.iterdir())
