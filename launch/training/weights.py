"""Whole weights out of a checkpoint; and a model from whatever a person points a door at."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.command_line import UserError
from launch.training import checkpoint
from launch.training.run_folder import tokenizer_in
from launch.training.state import SavedState
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model read from disk, in float32 on the CPU, and what is known about it."""

    model: Transformer
    config: ModelConfig
    folder: Path
    tokenizer: Path | None
    """Its tokenizer's file, where one lies beside it."""
    step: int | None
    """Of the checkpoint."""


def load_model(path: str) -> TrainedModel:
    """Read a run folder (its newest whole checkpoint), one checkpoint in it, or an exported Hugging Face folder."""
    folder = Path(path).resolve()
    if (folder / "config.json").is_file() and not (folder / checkpoint.MANIFEST).is_file():
        try:
            config, state = huggingface.load(folder)
        except ValueError as error:
            raise UserError(str(error)) from error
        return TrainedModel(_filled(config, state), config, folder, tokenizer_in(folder), None)
    if not (folder / checkpoint.MANIFEST).is_file():
        folder = _newest_in_run(folder)
    elif complaint := checkpoint.damage(folder):
        raise UserError(complaint)
    manifest = checkpoint.read_manifest(folder)
    checkpoint.refuse_earlier_format(folder, manifest)
    config = ModelConfig(**manifest["model"])
    return TrainedModel(_filled(config, read_weights(folder)), config, folder, tokenizer_in(folder.parent.parent), manifest["step"])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Parameter name -> float32 tensor, whatever layout wrote the checkpoint."""
    saved = SavedState(folder)
    return {name: saved.whole(name) for name in saved.names()}


def _filled(config: ModelConfig, state: Mapping[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval()


def _newest_in_run(folder: Path) -> Path:
    root = folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give a run folder, a checkpoint in one, or an exported Hugging Face folder.")
    newest = checkpoint.newest_good(root, checkpoint.damage, print, may_rename=False)
    if newest is None:
        raise UserError(f"{folder} holds no checkpoint and no config.json; it is neither a run folder nor an exported model.")
    return newest
