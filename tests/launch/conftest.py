"""Fixtures: a small prepared corpus, and the arguments of a tiny run on it."""

import random

import pytest

from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared folder of a few hundred short made-up documents."""
    folder = tmp_path_factory.mktemp("corpus")
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 7))) for _ in range(400)]
    for number in range(300):
        (folder / f"{number:03d}.txt").write_text(" ".join(dice.choices(words, k=120)) + "\n")
    output = tmp_path_factory.mktemp("data") / "prepared"
    prepare(PrepareSettings(input=(str(folder),), output=str(output), vocab_size=800, held_out=0.1, workers=1))
    return output


@pytest.fixture
def tiny(prepared, tmp_path):
    """Arguments of launch/pretrain.py for a model of 0.1 M parameters on the prepared corpus."""
    model = {
        "vocab_size": 800,
        "sequence_length": 32,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    words = ["--data", str(prepared), "--output", str(tmp_path / "run")]
    for name, value in model.items():
        words += [f"--model.{name}", str(value)]
    words += ["--batch.global_batch_size", "8", "--batch.micro_batch_size", "2", "--train_steps", "12", "--schedule.warmup_steps", "2"]
    words += ["--log.interval", "4", "--log.validation_interval", "6", "--log.validation_samples", "4", "--log.sample_interval", "6"]
    words += ["--optimizer.name", "adamw", "--optimizer.learning_rate", "5e-3"]
    return [*words, "--checkpoint.interval", "4", "--checkpoint.keep", "10"]
