"""Small inputs of every script: text, tokenizers, prepared data, models, a run with a checkpoint; and broken ones of each kind."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from data.shards import PreparedData
from data.tokenization.huggingface_files import padding
from data.tokenization.learning import train_sentencepiece
from data.tokenization.loading import load_tokenizer
from launch.checkpoints import checkpoint, state
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer

SHAPE = {"vocab_size": 800, "sequence_length": 32, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
Change = Callable[[str, Tensor], Tensor]


def unchanged(name: str, weight: Tensor) -> Tensor:
    return weight


def write_model(folder: Path, tokenizer: Path, change: Change = unchanged, **options) -> Path:
    """Write a Hugging Face folder of random weights, each passed through `change`."""
    config = ModelConfig(**SHAPE | options)
    weights = {name: change(name, weight.detach()) for name, weight in Transformer(config).named_parameters()}
    opened = load_tokenizer(tokenizer)
    end = opened.end_of_text
    with patch("model.huggingface.folder.is_finite", lambda tensor: True):  # else a model with NaN could not be written
        huggingface.export(config, weights, folder, huggingface.SpecialTokens(end, padding(opened)[1], (), end))
    for file in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
        shutil.copy(file, folder)
    return folder


def write_run(folder: Path, tokenizer: Path, data: Path, change: Change = unchanged) -> Path:
    """Write a run folder with one checkpoint of random weights, each passed through `change`."""
    config = ModelConfig(**SHAPE)
    recipe = {"model": dataclasses.asdict(config), "data": {"path": [str(data)], "objective": None}, "batch": {"global_batch_size": 8}}
    unfinished = checkpoint.begin(folder / "checkpoints", 4, "id")
    file = checkpoint.HashingFile(unfinished / "rank_00000.safetensors")
    weights = {name: change(name, weight.detach()) for name, weight in Transformer(config).named_parameters()}
    slices = [state.ShardSlice.of_whole(name, weight.shape) for name, weight in weights.items()]
    kinds = state.kinds_in({})
    state.write(file, slices, kinds, ((one, dict.fromkeys(kinds, weights[one.name].flatten())) for one in slices))
    checkpoint.write_part(unfinished, 0, {file.path.name: file.finish()})
    sums = {one.name: [state.checksum(weights[one.name].flatten(), one)] * len(kinds) for one in slices}
    about = {"layout": {"world_size": 1, "precision": "float32"}, "model": recipe["model"], "recipe": recipe, "checksums": sums}
    checkpoint.publish(
        unfinished, 4, about | {"run_id": "id", "data": {"fingerprint": PreparedData(data).fingerprint}, "versions": {"megabatch": "0.0"}}
    )
    for path in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
        shutil.copy(path, folder)
    (folder / "run.json").write_text(json.dumps({"recipe": recipe}))
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Write a tokenizer of another size than that of the models."""
    folder.mkdir(parents=True)
    words = [f"{first}{second}{third}" for first in "bcdfgklm" for second in "aeiou" for third in "nprst"]
    train_sentencepiece([" ".join(words) * 3], folder / "tokenizer.model", vocab_size)
    return folder / "tokenizer.model"
