"""Tests of launch/compare.py: each number equals that of launch/evaluate.py for one model, or that of torch's own functions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.command_line import UserError
from data.sampling.sources import open_folders
from launch import compare
from launch.checkpoints.opening import load_model
from launch.compare import read_compare_settings
from launch.evaluation import comparing
from launch.evaluation.evaluating import evaluate
from launch.evaluation.settings import CompareSettings, EvaluateSettings
from launch.evaluation.tasks.table import task_of
from model import huggingface
from model.compression import gguf_file
from model.config import ModelConfig, count_parameters
from model.transformer import Transformer

SMALL = {"vocab_size": 800, "sequence_length": 32, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory, prepared):
    """Return a function that writes a Hugging Face folder of new weights, changed by a function."""
    root = tmp_path_factory.mktemp("models")

    def build(name: str, change=lambda weight: weight, dtype=torch.float32, tokenizer=prepared, **options) -> str:
        if not (root / name).exists():
            config = ModelConfig(**SMALL | options)
            state = {name: change(weight.detach()) for name, weight in Transformer(config).named_parameters()}
            huggingface.export(config, state, root / name, dtype=dtype)
            shutil.copy(tokenizer / "tokenizer.model", root / name)
        return str(root / name)

    return build


def half_zero(weight):
    return torch.where(torch.arange(weight.numel()).view_as(weight) % 2 == 0, 0.0, weight * 4)


def test_each_row_equals_evaluation_alone_and_comparison_with_the_first(model, prepared, tmp_path, capsys):
    names = [model("dense"), model("bf16", dtype=torch.bfloat16), model("zeros", half_zero)]
    output = tmp_path / "compared"
    assert compare.main([*names, "--data", str(prepared), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((output / "compare.json").read_text())
    assert [row["name"] for row in rows] == names and [row["kind"] for row in rows] == ["float32", "bfloat16", "float32"]
    for row in rows:
        alone = evaluate(EvaluateSettings(row["name"], str(prepared)), show_progress=False)
        quality = row["quality"]
        assert quality["tokens"] == alone.tokens
        assert quality["perplexity_after"]["value"] == pytest.approx(alone.perplexity, rel=1e-6)
        assert quality["bits_per_byte_after"] == pytest.approx(alone.bits_per_byte, rel=1e-6)
        assert quality["ratio"]["value"] == pytest.approx(alone.perplexity / rows[0]["quality"]["perplexity_after"]["value"], rel=1e-6)
    same, rounded, changed = (row["quality"] for row in rows)
    assert (same["divergence"]["value"], same["agreement"]["value"], same["ratio"]["standard_error"]) == (0, 1, 0)
    assert 0 < rounded["divergence"]["value"] < changed["divergence"]["value"]
    assert changed["divergence"]["value"] == pytest.approx(divergence(names[0], names[2], prepared), rel=1e-4)
    parameters = count_parameters(ModelConfig(**SMALL))
    assert [row["zeros"] for row in rows] == [0, 0, parameters // 2]
    assert 4 * parameters < rows[0]["bytes"] < 4 * parameters + 5000 and 2 * parameters < rows[1]["bytes"] < 2 * parameters + 5000
    assert printed.count("\n| ") == 3 and " 50.0% |" in printed.splitlines()[4]
    assert (output / "compare.md").read_text().startswith(printed.rstrip()) and (output / "compare.svg").stat().st_size > 1000


def test_gguf_file_is_read_in_the_shape_of_a_model_before_it(model, prepared, tmp_path):
    dense = model("dense")
    whole, rounded = (str(tmp_path / f"{kind}.gguf") for kind in ("f32", "q8_0"))
    opened = load_model(dense)
    for path in (whole, rounded):
        gguf_file.write(opened.config, opened.state, {}, Path(path), Path(path).stem)
    settings = CompareSettings((dense, whole, rounded), str(prepared))
    _, same, other = comparing.compare(settings, show_progress=False)
    assert (same.kind, other.kind) == ("gguf f32", "gguf q8_0") and other.bytes == Path(rounded).stat().st_size
    assert (same.quality.divergence.value, same.quality.agreement.value) == (0, 1)
    assert 0 < other.quality.divergence.value < 1e-3
    narrow = model("narrow", intermediate_size=64)
    *_, again = comparing.compare(CompareSettings((narrow, dense, whole), str(prepared)), show_progress=False)
    assert (again.kind, again.parameters) == ("gguf f32", same.parameters)  # read in its own shape
    with pytest.raises(UserError, match="is listed first"):
        comparing.compare(CompareSettings((whole, dense), str(prepared)))
    with pytest.raises(UserError, match=r"does not have the shape of any model listed before it: .* by the configuration it is"):
        comparing.compare(CompareSettings((model("larger", vocab_size=832), whole), str(prepared)))


def test_gguf_file_that_is_cut_off_is_refused(model, prepared, tmp_path):
    opened, path = load_model(model("dense")), tmp_path / "model.gguf"
    gguf_file.write(opened.config, opened.state, {}, path, "f32")
    whole = path.read_bytes()
    for length in (0, 4, 20, 40, 100, 300, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"^{path} is not a whole GGUF file: it is cut off or damaged"):
            comparing.compare(CompareSettings((model("dense"), str(path)), str(prepared)))
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path} cannot be read: No such file or directory\.$"):
        comparing.compare(CompareSettings((model("dense"), str(path)), str(prepared)))


def divergence(first: str, other: str, prepared) -> float:
    """Return the mean over all targets, by torch's function in float64."""
    models = [load_model(path) for path in (first, other)]
    task, config = task_of(models[0]), models[0].config
    sampling = task.sampling_settings(models[0], first)
    sets = task.evaluation_sets(config, open_folders([str(prepared)]), sampling, "validation", 8, config.sequence_length)
    total = count = 0
    for batch in next(iter(sets.values())).batches:
        counted = batch.targets >= 0
        with torch.no_grad():
            old, new = (F.log_softmax(one.model(*batch.inputs)[counted].double(), dim=-1) for one in models)
        total += F.kl_div(new, old, reduction="sum", log_target=True).item()
        count += int(counted.sum())
    return total / count


def test_models_are_given_first_or_after_their_option():
    wanted = CompareSettings(("a", "b"), split="train")
    assert read_compare_settings(["a", "b", "--split", "train"]) == wanted
    assert read_compare_settings(["--split", "train", "--models", "a", "b"]) == wanted


def test_models_that_cannot_be_compared_are_refused(model, prepared, tmp_path):
    dense, data = model("dense"), str(prepared)

    def refused(match: str, *names: str, **settings) -> None:
        options = [word for name, value in ({"data": data} | settings).items() if value is not None for word in (f"--{name}", str(value))]
        with pytest.raises(UserError, match=match):
            compare.main([dense, *names, *options])

    refused("give two or more")
    refused("nothing is overwritten", dense, output=str(tmp_path))
    refused("Give --data", dense, data=None)
    refused("vocab_size 832, .* 800", model("larger", vocab_size=832))
    refused(
        "sequence_length is 33; it must be from 1 to 16, the models' smallest context",
        model("short", sequence_length=16),
        sequence_length=33,
    )
    refused("micro_batch_size is 0", dense, micro_batch_size=0)
    (tmp_path / "tokenizer.model").write_bytes(b"of another text")
    refused("was tokenized with a different tokenizer.model than .*strange", model("strange", tokenizer=tmp_path))
