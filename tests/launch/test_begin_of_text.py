"""A published model whose tokenizer puts a token before each text: evaluated, continued and written with it."""

import argparse
import json
from pathlib import Path

import gguf
import pytest
import torch

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.tokenization.huggingface_folder import write_tokenizer
from data.tokenization.loading import load_tokenizer
from launch import export, pretrain, quantize
from launch.checkpoints.opening import load_model, open_model
from launch.compressing import llama_engine
from launch.compressing.samples import calibration_text
from launch.evaluation.evaluating import evaluate
from launch.evaluation.predictions import Continuation
from launch.evaluation.settings import EvaluateSettings
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer
from tests.data.tokenization.vocabularies import begin_of_text_file

transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]
SENTENCE = TEXT[1000:1100]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Llama of random weights with its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    given = begin_of_text_file(folder / "given", [TEXT])
    config = ModelConfig(vocab_size=608, sequence_length=64, hidden_size=64, num_layers=1, num_attention_heads=2)
    huggingface.export(config, dict(Transformer(config, seed=3).named_parameters()), folder / "model")
    write_tokenizer(given, folder / "model", 64)
    return folder / "model"


@pytest.fixture(scope="module")
def prepared(published, tmp_path_factory):
    """Folders of the same text with and without the token: one document to train on, the others held out."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [SENTENCE, *(TEXT[start : start + 3000] for start in range(2000, 36_000, 3000))]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(name, **changes):
        settings = {"input": (str(folder / "a.jsonl"),), "tokenizer": str(published), "workers": 1, "held_out": 0.5, "gigatoken": False}
        return prepare(PrepareSettings(**settings | {"output": str(folder / name)} | changes), log=lambda line: None)

    return {"true": make("true"), "false": make("false", add_bos=False)}


def test_perplexity_of_a_document_is_that_of_transformers(published, tmp_path):
    (tmp_path / "one.txt").write_text(SENTENCE)
    prepare(
        PrepareSettings(input=(str(tmp_path / "one.txt"),), tokenizer=str(published), workers=1, held_out=0, output=str(tmp_path / "one"))
    )
    found = evaluate(EvaluateSettings(model=str(published), data=str(tmp_path / "one"), split="train", precision="float32"), False)
    theirs = transformers.AutoTokenizer.from_pretrained(published)
    ids = torch.tensor([[*theirs(SENTENCE)["input_ids"], theirs.eos_token_id]])
    loss = transformers.AutoModelForCausalLM.from_pretrained(published)(ids, labels=ids).loss.item()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.tokens == ids.shape[1] - 1 and found.bytes == len(SENTENCE.encode())


def test_data_without_the_token_of_the_model_is_refused_by_name(published, prepared):
    with pytest.raises(UserError, match=r"false was prepared with --add_bos false, but the tokenizer of .* puts <\|begin_of_text\|>"):
        evaluate(EvaluateSettings(model=str(published), data=str(prepared["false"].folder)), False)


def test_prompt_begins_with_the_token_once(published):
    trained, ours = load_model(str(published)), load_tokenizer(published)
    predictor = Continuation(trained, ours, "cpu", {})
    expected = [ours.begin_of_text, *ours.encode("a text")]
    assert predictor.encode("a text") == expected
    named = "<|begin_of_text|>a text"
    assert predictor.encode(named) == [ours.begin_of_text, *ours.encode(named)]  # a name in the prompt is text
    assert predictor.encode("") == [ours.begin_of_text]


@pytest.mark.parametrize("add_bos", ["true", "false"])
def test_gguf_file_says_whether_a_text_begins_with_the_token(published, tmp_path, capsys, add_bos):
    folder = published
    if add_bos == "false":  # as a run on data without the token is exported
        folder = tmp_path / "without"
        folder.mkdir()
        for path in published.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        configuration = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration | {"add_bos": False}))
    output = tmp_path / "small.gguf"
    assert export.main([str(folder), "--output", str(output), "--format", "gguf", "--type", "f32"]) == 0
    assert ("llama.cpp gives the same ids" in capsys.readouterr().out) is llama_engine.is_installed()
    ours, fields = load_tokenizer(folder), gguf.GGUFReader(output).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is (add_bos == "true") is ours.adds_bos
    assert fields["tokenizer.ggml.bos_token_id"].contents() == ours.begin_of_text
    if llama_engine.is_installed():
        assert llama_engine.tokenize(output, [SENTENCE]) == [ours.encode_beginning(SENTENCE)]


def test_training_warns_if_the_data_does_not_begin_like_the_model(published, prepared, tmp_path, capsys):
    model = ["--model.vocab_size", "608", "--model.sequence_length", "64", "--model.hidden_size", "64", "--model.num_layers", "1"]
    words = [
        *model,
        "--model.num_attention_heads",
        "2",
        "--init",
        str(published),
        "--output",
        str(tmp_path / "run"),
        "--train_steps",
        "200",
    ]
    warning = "was prepared with --add_bos false, but the tokenizer of"
    for choice, folder in prepared.items():
        assert pretrain.main([*words, "--data", str(folder.folder), "--dry_run"]) == 0
        assert (warning in capsys.readouterr().out) is (choice == "false")


def test_calibration_begins_with_the_token_and_the_written_tokenizer_too(published, prepared, tmp_path):
    output = tmp_path / "quantized"
    words = [str(published), "--output", str(output), "--data", str(prepared["true"].folder), "--calibration_samples", "8"]
    assert quantize.main([*words, "--bits", "8", "--group_size", "32", "--test_samples", "4", "--force"]) == 0
    theirs, ours = transformers.AutoTokenizer.from_pretrained(output), load_tokenizer(published)
    text = calibration_text(open_model(str(published)), "published", [str(prepared["true"].folder)], 8, None)
    assert all((batch.tokens[:, 0] == ours.begin_of_text).all() for batch in text.batches)
    assert theirs(SENTENCE)["input_ids"] == ours.encode_beginning(SENTENCE)
    with pytest.raises(UserError, match="was prepared with --add_bos false, but the tokenizer of"):
        quantize.main([*words[:1], "--output", str(tmp_path / "x"), "--data", str(prepared["false"].folder), "--bits", "8"])
