"""Tests of the report: its JSON has all measurements, and its page begins with the most important ones."""

import dataclasses
import json
import typing
from xml.etree import ElementTree

import pytest
import torch

from launch.checkpoints.opening import OpenedModel, weights_bytes
from launch.compressing import report
from launch.compressing.report import Artefact, Basis, BlockReport, Calibration, LinearReport, Proof, Report, Speed, TensorReport, Weights
from launch.evaluation.quality import compared
from model.compression.statistics import groups_of
from model.config import ModelConfig, count_parameters
from model.transformer import Block, Transformer
from tests.model.both_sides import BERT, MARIAN

LINEAR = "1.attention.query"


def weights(bytes_of_linear: int, zeros: int = 0) -> Weights:
    tensors = (
        TensorReport("0.weight", "embedding", 500, 0, 2000),
        TensorReport(f"{LINEAR}.weight", "attention", 1000, zeros, bytes_of_linear),
    )
    return Weights(2000 + bytes_of_linear, tensors)


@pytest.fixture
def bare():
    """Return the report of a run without data."""
    return Report(
        name="demo-w4",
        model="runs/demo",
        artefact="pack-quantized",
        bits=(4,),
        method="Round to nearest, int4, groups of 128",
        settings={"method": "rtn", "bits": 4},
        command="python launch/quantize.py runs/demo --bits 4",
        before=weights(4000),
        after=weights(500, zeros=250),
        seconds=12.5,
        peak_memory_bytes=1_300_000_000,
        device="cpu",
        versions={"torch": "2.13.0"},
        linears=(LinearReport(LINEAR, 0, "attention.query"),),
    )


def test_report_without_data_has_sizes_and_supported_software(bare, tmp_path):
    report.write(bare, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# demo-w4\n\n**Size ×0.417**: 6.00 kB → 2.50 kB, 13.33 bits a weight; 16.7% of 1,500 parameters are 0.\n")
    assert report.describe_serving("pack-quantized", [4]) in page
    assert "| attention |             1,000 | 1,000 |                32.00 |  4.00 |      25.00% |" in page
    assert "None" not in page and "nan" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "sizes.svg"]


def test_everything_measured_is_reported(bare, tmp_path):
    logits, targets = torch.randn(50, 8), torch.arange(50) % 8
    quality = compared(logits, logits + 0.1 * torch.randn(50, 8), targets).quality(4.0)
    whole = dataclasses.replace(
        bare,
        linears=(LinearReport(LINEAR, 0, "attention.query", 0.0625, 0.01, ("No Cholesky factor: rounded to nearest.",)),),
        blocks=(BlockReport(0, 3.5, 0.002), BlockReport(1, 4.0, 0.001)),
        basis=Basis("validation of prepared", "f" * 64, "causal", 256, 256, "e" * 64, 4.0),
        quality=quality,
        calibration=Calibration("train of prepared", 128, 32768, "c" * 64),
        speeds=(Speed("llama.cpp, 2 threads", 30.0, 80.5),),
        proof=Proof("transformers", "5.23.0", "perplexity", 1e-4, 1e-3, 100.01, 100.0),
    )
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        folder.mkdir()
        report.write(whole, folder)
    files = sorted(path.name for path in first.iterdir())
    assert files == ["errors.svg", "report.json", "report.md", "sensitivity.svg", "sizes.svg"]
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert all(ElementTree.parse(first / name).getroot().tag.endswith("svg") for name in files if name.endswith("svg"))
    contents = json.loads((first / "report.json").read_text())
    assert contents.pop("served") == report.describe_serving("pack-quantized", [4])
    assert contents == json.loads(json.dumps(dataclasses.asdict(whole)))
    page = (first / "report.md").read_text()
    assert page.splitlines()[2].startswith(f"**Perplexity ×{quality.ratio.value:.4f}** (± {quality.ratio.standard_error:.4f})")
    for text in (
        "- attention.query of block 0: No Cholesky factor: rounded to nearest.",
        "Measured on 50 tokens of 4.00 bytes, validation of prepared: causal, windows of 256 tokens, 256 apart; hash ffffffffffff",
        "128 samples, 32,768 tokens, train of prepared; hash cccccccccccc",
        "12.5 s, 7.5 s of it in the blocks; peak memory of a process: 1.30 GB",
        "perplexity 100.01, ours 100: largest difference 1.0e-04, bound 1e-03",
        *[f"]({name})" for name in files if name.endswith("svg")],
    ):
        assert text in page


@pytest.mark.parametrize("artefact", typing.get_args(Artefact))
def test_supported_software_of_every_artefact_is_one_sentence(artefact):
    sentence = report.describe_serving(artefact, [4])
    assert sentence.endswith(".") and ". " not in sentence.replace("vllm#36799", "") and "vLLM" in sentence
    assert ("not proven here" in sentence) == (artefact.endswith("quantized"))


def test_vllm_is_not_named_for_formats_without_kernels():
    assert "not proven" not in report.describe_serving("pack-quantized", [3, 4]) and "4 and 8 bits" in report.describe_serving(
        "pack-quantized", [3, 4]
    )
    codes, three = report.describe_serving("int-quantized", [8]), report.describe_serving("pack-quantized", [3])
    assert report.describe_serving("int-quantized", [8], "fp8").startswith(codes) and "vLLM keeps them as fp8" in report.describe_serving(
        "int-quantized", [8], "fp8"
    )
    assert report.describe_serving("pack-quantized", [3], "fp8").startswith(three) and "vLLM keeps" not in report.describe_serving(
        "pack-quantized", [3], "fp8"
    )
    assert report.describe_serving("int-quantized", [8], "int8").startswith("Not for vLLM")
    assert "removed its 2:4 kernels (vllm#36799)" in report.describe_serving("2:4")


@pytest.mark.parametrize("options", [{}, BERT, MARIAN], ids=["llama", "bert", "marian"])
def test_attention_and_feed_forward_weights_are_the_compressible_ones(options):
    config = ModelConfig(vocab_size=64, sequence_length=16, hidden_size=16, num_layers=1, num_attention_heads=2, **options)
    network, kinds = Transformer(config), report.kinds_of_tensors(config)
    assert list(kinds) == [name for name, _ in network.named_parameters()]
    blocks = {name: module for name, module in network.named_children() if isinstance(module, Block)}
    linears = {f"{place}.{linear}" for place, block in blocks.items() for group in groups_of(block) for linear in group.linears}
    assert {name.rpartition(".")[0] for name, kind in kinds.items() if kind in ("attention", "feed-forward")} == linears
    assert ("head" in kinds.values()) == (options is BERT)  # the others' head is the embedding


def test_optimizer_states_do_not_count_as_weights(tmp_path):
    config = ModelConfig(vocab_size=64, sequence_length=16, hidden_size=16, num_layers=1, num_attention_heads=2)
    (tmp_path / "rank_00000.safetensors").write_bytes(b" " * 100_000)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b" " * 70)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b" " * 7)
    opened = OpenedModel(config, {}, tmp_path, None, 10, {})
    assert weights_bytes(opened) == 4 * count_parameters(config)
    assert weights_bytes(dataclasses.replace(opened, step=None)) == 77
