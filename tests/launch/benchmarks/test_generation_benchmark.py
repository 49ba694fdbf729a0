"""The script that measures generation next to other engines."""

import re

import pytest

from data.command_line import UserError
from launch.benchmarks import generation
from launch.compressing import llama_engine
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer
from tests.model.both_sides import BERT

pytest.importorskip("transformers", reason="the independent reference is transformers")

SMALL = {"vocab_size": 64, "sequence_length": 32, "hidden_size": 32, "num_layers": 1}


def exported(folder, **options) -> str:
    config = ModelConfig(**SMALL | options)
    huggingface.export(config, dict(Transformer(config).named_parameters()), folder)
    return str(folder)


def test_every_installed_engine_has_a_row_and_ours_is_1(tmp_path, capsys):
    assert generation.main(["--model", exported(tmp_path / "hf"), "--types", "q8_0", "--new_tokens", "2", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?) {2,}[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+) +[\d.]+$", printed, re.M)
    engines = ["ours, bf16", "transformers, bf16"] + ["llama.cpp, q8_0"] * llama_engine.is_installed()
    assert [name for name, _ in rows] == engines and rows[0][1] == "1.00"
    assert re.search(r"\n\S.* with \w+, \d+ cores, \d+ threads for each contender, load [\d.]+ at the end", printed)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, ["--new_tokens", "16"], "new_tokens 16 and a prompt make 33 tokens; the model's context is 32"),
        (BERT, [], "GGUF supports decoders only"),
        ({}, ["--rounds", "0"], "rounds is 0; it must be at least 1"),
    ],
)
def test_unsupported_models_and_options_are_refused(tmp_path, options, arguments, message):
    with pytest.raises(UserError, match=message):
        generation.main(["--model", exported(tmp_path / "hf", **options), *arguments])
