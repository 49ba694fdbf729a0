"""Tests of launch/export.py --format gguf: one file with the tokenizer inside, checked by transformers."""

import argparse
import shutil
from pathlib import Path

import gguf
import pytest

from data.command_line import UserError
from data.tokenization.huggingface_folder import write_tokenizer
from data.tokenization.learning import train_sentencepiece
from launch import export
from launch.compressing import llama_engine
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer

pytest.importorskip("transformers", reason="the independent reference is transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder as launch/export.py writes it: tokenizer.json next to the tokenizer.model that it was made from."""
    place = tmp_path_factory.mktemp("exported")
    train_sentencepiece([Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]], place / "tokenizer.model", vocab_size=600)
    config = ModelConfig(vocab_size=608, sequence_length=48, hidden_size=64, num_layers=1)
    huggingface.export(config, dict(Transformer(config).named_parameters()), place / "model")
    write_tokenizer(place / "tokenizer.model", place / "model", 48)
    return place / "model"


def test_file_holds_network_and_tokenizer_and_was_checked(folder, tmp_path, capsys):
    output = tmp_path / "new" / "small.gguf"
    words = [str(folder), "--output", str(output), "--format", "gguf"]
    assert export.main([*words, "--type", "q4_0"]) == 0
    printed = capsys.readouterr().out
    assert "7 q4_0, 3 f32, 1 q8_0" in printed and "transformers reads it" in printed
    assert ("llama.cpp gives the same ids" in printed) is llama_engine.is_installed()
    fields = gguf.GGUFReader(output).fields
    assert fields["general.name"].contents() == "small" and fields["tokenizer.ggml.model"].contents() == "llama"
    assert len(fields["tokenizer.ggml.tokens"].data) == 608
    with pytest.raises(UserError, match="already exists; nothing is overwritten"):
        export.main(words)
    assert [path.name for path in output.parent.iterdir()] == ["small.gguf"]


def test_full_disk_is_refused_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("launch.compressing.exporting.first_not_finite", lambda state: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match=r"has 1000 bytes free; --output .*small\.gguf needs [\d.]+ [KM]iB"):
        export.main([str(folder), "--output", str(tmp_path / "small.gguf"), "--format", "gguf", "--type", "f32"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--output", "x.gguf", "--type", "f16"], "--type f16 applies only to --format gguf"),
        (["--output", "x.gguf", "--format", "gguf", "--precision", "bf16"], "--precision bf16 applies only to --format huggingface"),
        (["--output", "x", "--format", "gguf"], "--output x must be a file name that ends with .gguf"),
        (["--output", "x.gguf", "--format", "gguf", "--type", "q6_k"], r"--type q6_k is written by llama.cpp, .* pip install llama"),
    ],
)
def test_contradicting_options_are_refused(folder, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_engine, "is_installed", lambda: False)
    with pytest.raises(UserError, match=complaint):
        export.main([str(folder), *words])
    assert not list(tmp_path.iterdir())
