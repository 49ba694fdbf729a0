"""Tests with llama.cpp itself: our logits, our ids, its K-quants, its speed next to ours."""

import argparse
import os
import re
from pathlib import Path

import pytest
import torch

from data.tokenization.gguf import gguf_tokenizer
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from data.tokenization.tiktoken_tokenizer import published_pattern
from launch import export
from launch.benchmarks import generation
from launch.compressing import llama_engine
from model import huggingface
from model.compression import gguf_file
from model.config import ModelConfig
from model.transformer import Transformer
from tests.data.tokenization.test_huggingface_files import sentencepiece_file
from tests.data.tokenization.vocabularies import SPECIAL_TOKENS, as_qwen3, learnt_byte_level, rank_file
from tests.model.both_sides import GPT2

pytestmark = pytest.mark.slow

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")[:40_000]
LLAMA3 = (  # from Meta's tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SCALED = {"rope_factor": 4.0, "rope_original_length": 16}
NETWORKS = {
    "llama, grouped heads": {"num_key_value_heads": 2, "tie_embeddings": False},
    "llama, biases, narrow heads": {"biases": True, "head_size": 8},
    "llama, linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "llama, ntk": {"rope_scaling": "ntk", "rope_factor": 4.0},
    "llama, Llama 3.1's": {"rope_scaling": "llama3"} | SCALED,
    "llama, yarn": {"rope_scaling": "yarn"} | SCALED,
    "qwen3, yarn": {"qk_norm": True, "head_size": 32, "rope_scaling": "yarn"} | SCALED,
    "gpt2": GPT2,
    "gpt2, no biases, a head of its own": GPT2 | {"biases": False, "tie_embeddings": False, "intermediate_size": 96},
}


@pytest.fixture(autouse=True)
def _require_llama_cpp():
    if not llama_engine.is_installed():
        (pytest.fail if "CI" in os.environ else pytest.skip)("llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([TEXT], path, vocab_size=600)
    return path


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return random weights; no norm stays 1 and no bias 0."""
    generator = torch.Generator().manual_seed(0)
    state = {name: weight.detach() for name, weight in Transformer(config).named_parameters()}
    return {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in state.items()}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_llama_cpp_and_our_network_give_the_same_logits(options, tokenizer_path, tmp_path):
    config = ModelConfig(**{"vocab_size": 601, "sequence_length": 64, "hidden_size": 64, "num_layers": 2} | options)
    tokens = torch.randint(600, (2, 64), generator=torch.Generator().manual_seed(0))
    state, entries = weights_of(config), gguf_tokenizer(load_tokenizer(tokenizer_path), config.vocab_size)
    # Measured: 1e-6, with GPT-2's GELU out of a table of float16 4e-4; float16 activations 8e-4; activations of 8 bits 0.023.
    exact = 1e-5 if config.positions == "rotary" else 1e-3
    for kind, tolerance in {"f32": exact, "f16": 3e-3, "q8_0": 0.05, "q4_0": 0.05}.items():
        path = tmp_path / f"{kind}.gguf"
        gguf_file.write(config, state, entries, path, kind)
        ours = gguf_file.logits(config, gguf_file.GGUFState(path, config), tokens)
        theirs = torch.stack(list(llama_engine.logits(path, tokens)))
        assert (theirs - ours).norm() < tolerance * ours.norm(), kind


TOKENIZERS = {
    "sentencepiece": ("tokenizer.model", lambda path: train_sentencepiece([TEXT], path, vocab_size=600)),
    "user-defined pieces": ("tokenizer.model", lambda path: sentencepiece_file(path, user_defined_symbols=["[REF]", "[/REF]"])),
    "byte-level": ("tokenizer.json", lambda path: learnt_byte_level([TEXT], SPECIAL_TOKENS).save(str(path))),
    "qwen3": ("tokenizer.json", lambda path: as_qwen3(learnt_byte_level([TEXT], [])).save(str(path))),
    "llama3": ("llama3.tiktoken", lambda path: rank_file(path, [TEXT], LLAMA3)),
    "o200k": ("o200k.tiktoken", lambda path: rank_file(path, [TEXT], published_pattern("o200k_base"))),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_export_checks_ids_and_perplexity_with_llama_cpp(name, tmp_path, capsys):
    folder = tmp_path / "model"
    config = ModelConfig(vocab_size=640, sequence_length=64, hidden_size=256, num_layers=2)
    huggingface.export(config, weights_of(config), folder)
    file, write = TOKENIZERS[name]
    write(folder / file)
    for kind in ("f16", "q4_k_m"):
        assert export.main([str(folder), "--output", str(tmp_path / f"{kind}.gguf"), "--format", "gguf", "--type", kind]) == 0
        assert "llama.cpp gives the same ids" in capsys.readouterr().out
    assert gguf_file.types(tmp_path / "q4_k_m.gguf")["q4_k"] > 0
    assert (tmp_path / "q4_k_m.gguf").stat().st_size < 0.5 * (tmp_path / "f16.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f16.gguf", "model", "q4_k_m.gguf"]


def test_different_ids_or_perplexity_are_errors(tokenizer_path, tmp_path):
    config = ModelConfig(vocab_size=600, sequence_length=64, hidden_size=64, num_layers=1)
    entries = gguf_tokenizer(load_tokenizer(tokenizer_path), 600)
    path = tmp_path / "model.gguf"
    gguf_file.write(config, weights_of(config), entries | {"tokenizer.ggml.add_space_prefix": True}, path, "f32")
    with pytest.raises(RuntimeError, match="gives other ids"):
        llama_engine.verify(path, config, load_tokenizer(tokenizer_path), 1e-4)
    gguf_file.write(config, weights_of(config), entries, path, "f32")
    assert llama_engine.verify(path, config, load_tokenizer(tokenizer_path), 1e-4) < 1e-5
    other = ModelConfig(vocab_size=600, sequence_length=64, hidden_size=64, num_layers=1, rope_theta=100.0)
    with pytest.raises(RuntimeError, match="perplexity differs from ours"):
        llama_engine.verify(path, other, load_tokenizer(tokenizer_path), 1e-4)


@pytest.mark.alone
def test_four_bits_generate_at_least_twice_as_fast_as_ours(capsys):
    assert generation.main(["--size", "llama-160m", "--types", "q4_0", "q4_k_m", "--new_tokens", "32"]) == 0
    times_ours = dict(re.findall(r"^(.*?) +[\d.]+ +[\d.]+ +[\d.]+ +([\d.]+) +[\d.]+$", capsys.readouterr().out, re.M))
    assert float(times_ours["llama.cpp, q4_0"]) >= 2 and float(times_ours["llama.cpp, q4_k_m"]) >= 2
