"""Whole weights out of a checkpoint, whatever ZeRO stage wrote it; and a model from whatever a person points a door at."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.command_line import UserError
from launch.training import checkpoint
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
        return TrainedModel(_filled(config, state), config, folder, _tokenizer_in(folder), None)
    if not (folder / checkpoint.MANIFEST).is_file():
        folder = _newest_in_run(folder)
    elif complaint := checkpoint.damage(folder):
        raise UserError(complaint)
    manifest = checkpoint.read_manifest(folder)
    config = ModelConfig(**manifest["model"])
    return TrainedModel(_filled(config, read_weights(folder)), config, folder, _tokenizer_in(folder.parent.parent), manifest["step"])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Parameter name -> float32 tensor, joined from the files of all ranks of a checkpoint.

    Only tensors and plain data are unpickled, and of the optimizer's files (mapped) only the master weights are read. DeepSpeed's
    own zero_to_fp32 unpickles whatever it finds, and does not know what ZeRO-1 writes in bf16.
    """
    stage = checkpoint.read_manifest(folder)["layout"]["zero_stage"]
    states = _read(next(iter(sorted(folder.glob("*_model_states.pt")))))
    if stage == 0:
        return states["module"]
    by_rank = lambda path: int(re.search(r"pp_rank_(\d+)", path.name).group(1))  # noqa: E731
    parts = [_read(path)["optimizer_state_dict"] for path in sorted(folder.glob("*_optim_states.pt"), key=by_rank)]
    if stage == 3:
        return _join_each(states["param_shapes"], [part["fp32_flat_groups"] for part in parts])
    return _join_groups(states["param_shapes"], [part["single_partition_of_fp32_groups"] for part in parts])


def _join_groups(groups: list[dict[str, torch.Size]], parts: list[list[Tensor]]) -> dict[str, Tensor]:
    """ZeRO-1 and -2: the parameters of a group lie behind one another in one vector, which is cut among the ranks."""
    weights = {}
    for number, shapes in enumerate(groups):
        vector = torch.cat([part[number] for part in parts])
        start = 0
        for name, shape in shapes.items():
            weights[name] = vector[start : start + shape.numel()].view(shape)
            start += shape.numel()
    return weights


def _join_each(groups: list[dict[str, torch.Size]], parts: list[list[Tensor]]) -> dict[str, Tensor]:
    """ZeRO-3: each parameter is cut among the ranks, and the pieces of all of them lie behind one another on each rank."""
    vectors = [torch.cat(part) for part in parts]
    weights, start = {}, 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        piece = math.ceil(shape.numel() / len(parts))
        weights[name] = torch.cat([vector[start : start + piece] for vector in vectors])[: shape.numel()].view(shape)
        start += piece
    return weights


class _Ignored:
    """Stands for DeepSpeed's own classes in its files: loss scaler, stage, address. Nothing of theirs is read or run."""

    def __new__(cls, *args, **kwargs) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def _read(path: Path) -> dict:
    with torch.serialization.safe_globals([(_Ignored, name) for name in _DEEPSPEED_CLASSES]):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


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


def _tokenizer_in(folder: Path) -> Path | None:
    return next((folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()), None)
