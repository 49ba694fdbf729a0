"""Whole weights out of a checkpoint, whatever ZeRO stage wrote it; and a model from whatever a person points a door at."""

import dataclasses
import os
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from data.command_line import UserError
from launch.training import checkpoint
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer

SAFE_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""The only classes that DeepSpeed's own checkpoints need; anything else in one is refused, not run."""


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
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / checkpoint.MANIFEST).is_file():
        try:
            config, state = huggingface.load(folder)
        except ValueError as error:
            raise UserError(str(error)) from error
        return TrainedModel(_filled(config, state), config, folder, _tokenizer_in(folder), None)
    if not (folder / checkpoint.MANIFEST).is_file():
        folder = _newest_in_run(folder)
    elif complaint := checkpoint.damage(folder):
        raise UserError(complaint)
    manifest = checkpoint.read_manifest(folder)
    config = ModelConfig(**manifest["model"])
    return TrainedModel(_filled(config, read_weights(folder)), config, folder, _tokenizer_in(folder.parent.parent), manifest["step"])


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Parameter name -> float32 tensor, joined from the files of all ranks of a checkpoint."""
    if not list(folder.glob("*_optim_states.pt")):  # ZeRO-0 keeps the weights whole
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # that function would unpickle whatever it finds
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _filled(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
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


def _tokenizer_in(folder: Path) -> Path | None:
    return next((folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()), None)
