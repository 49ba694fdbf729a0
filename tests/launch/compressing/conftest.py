"""Tiny models with random weights, prepared text for them, and functions that prune or quantize one."""

import json
import random
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.tokenization.huggingface_files import padding
from data.tokenization.loading import load_tokenizer
from launch import prune, quantize
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer

SMALL = {"vocab_size": 600, "sequence_length": 32, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
QUICK = ("--calibration_samples", "8", "--test_samples", "8", "--sensitivity_samples", "0")
SPECIAL = ("[CLS]", "[MASK]", *(f"<extra_id_{number}>" for number in range(8)))


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Return a prepared folder of 200 short texts of random words."""
    folder, dice = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 7))) for _ in range(300)]
    lines = [json.dumps({"text": " ".join(dice.choices(words, k=60))}) for _ in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    output = folder / "prepared"
    prepare(
        PrepareSettings(
            input=(str(folder / "texts.jsonl"),), output=str(output), held_out=0.2, workers=1, special_tokens=SPECIAL, vocab_size=600
        )
    )
    return output


@pytest.fixture(scope="session")
def model(tmp_path_factory, texts):
    """Return a function that writes a Hugging Face folder of random weights, each passed through `change`."""
    root = tmp_path_factory.mktemp("models")

    def build(name: str, change=lambda name, weight: weight, **options) -> Path:
        folder = root / name
        if not folder.exists():
            config = ModelConfig(**SMALL | options)
            weights = Transformer(config).named_parameters()
            state = {name: change(name, weight.detach() * (5 if weight.ndim == 2 else 1)) for name, weight in weights}
            tokenizer = load_tokenizer(texts / "tokenizer.model")
            end = tokenizer.end_of_text
            with patch("model.huggingface.folder.is_finite", lambda tensor: True):  # else a damaged model could not be written
                huggingface.export(config, state, folder, huggingface.SpecialTokens(end, padding(tokenizer)[1], (), end))
            for file in ("tokenizer.model", "tokenizer_config.json"):
                shutil.copy(texts / file, folder)
        return folder

    return build


@pytest.fixture
def pruned(texts, tmp_path):
    return _runner(prune.main, texts, tmp_path)


@pytest.fixture
def quantized(texts, tmp_path):
    return _runner(quantize.main, texts, tmp_path)


def _runner(main, texts: Path, tmp_path: Path):
    """Return a function that compresses a model with the given options, and returns the folder and the exit status."""

    def run(model: Path, *options: str, output: str = "out") -> tuple[Path, int]:
        return tmp_path / output, main([str(model), "--data", str(texts), "--output", str(tmp_path / output), *QUICK, *options])

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the dequantized weights of a Hugging Face folder by our names."""
    return dict(huggingface.load(folder)[1])
