"""What a compression has done so far, on disk: the tensors of each layer in a file, published when it is whole, and read back one by one.

OUTPUT.unfinished/plan.json       what is compressed, and how: another plan is not gone on with
                  layer-00003.safetensors, .json    its tensors by our names, and what is told of it
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.command_line import UserError
from launch.training.checkpoint import write_durably
from model.compression.grids import Grid, Quantized

_PIECES = ("codes", "scale", "zero_point", "global_scale")


class Parts(Mapping[str, "Tensor | Quantized"]):
    """Parameters by our names, whole or as codes, each read when it is asked for."""

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        """Begin, or go on with what an earlier start of the same plan left. Raises UserError where it was another plan's."""
        self.folder = output.with_name(f"{output.name}.unfinished")
        self._plan = plan
        self._files: dict[str, Path] = {}
        self._grids: dict[str, Grid] = {}

    def open(self) -> int:
        """How many layers an earlier start of the same plan has left. Raises UserError where the folder is something else's."""
        record = self.folder / "plan.json"
        try:
            if self.folder.exists() and not (record.is_file() and json.loads(record.read_text(encoding="utf-8")) == self._plan):
                raise UserError(
                    f"{self.folder} holds what another command has begun, or no compression at all. Start that command again to go on "
                    f"with it, remove the folder, or give another --output."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(record, json.dumps(self._plan, indent=1))
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror or error}.") from error
        return self.find()

    def find(self) -> int:
        """Look which layers are there, from the first on without a gap; how many."""
        self._files, self._grids = {}, {}
        number = 0
        while (about := self._path(number, "json")).is_file():
            told = json.loads(about.read_text(encoding="utf-8"))
            self._grids |= {name: Grid(**grid) for name, grid in told["grids"].items()}
            self._files |= dict.fromkeys(told["names"], self._path(number, "safetensors"))
            number += 1
        return number

    def write(self, number: int, tensors: Mapping[str, "Tensor | Quantized"], told: dict[str, Any]) -> None:
        """Publish a layer. Raises UserError, leaving what was there, where the disk is full."""
        pieces, grids = {}, {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Quantized):
                grids[name] = dataclasses.asdict(tensor.grid)
                pieces |= {f"{name}.{piece}": getattr(tensor, piece) for piece in _PIECES if getattr(tensor, piece) is not None}
            else:
                pieces[name] = tensor
        path, temporary = self._path(number, "safetensors"), self._path(number, "tmp")
        try:
            save_file({name: piece.detach().cpu().contiguous() for name, piece in pieces.items()}, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            write_durably(self._path(number, "json"), json.dumps({"names": list(tensors), "grids": grids, "told": told}))
        except Exception as error:  # of the disk, or safetensors' own, which has moved between versions
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written: {error}. The layers before it are kept; the same command goes on behind them."
            ) from error
        self._files |= dict.fromkeys(tensors, path)
        self._grids |= {name: Grid(**grid) for name, grid in grids.items()}

    def told(self, number: int) -> dict[str, Any]:
        """What was told of a layer."""
        return json.loads(self._path(number, "json").read_text(encoding="utf-8"))["told"]

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def __getitem__(self, name: str) -> "Tensor | Quantized":
        with safe_open(self._files[name], framework="pt") as file:
            if name not in self._grids:
                return file.get_tensor(name)
            there = set(file.keys())
            pieces = {piece: file.get_tensor(f"{name}.{piece}") for piece in _PIECES if f"{name}.{piece}" in there}
        return Quantized(self._grids[name], **pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"layer-{number:05d}.{kind}"


class Weights(Mapping[str, Tensor]):
    """The same as tensors of numbers, which whoever loads the finished folder computes with."""

    def __init__(self, parts: Mapping[str, "Tensor | Quantized"]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        return part.weight() if isinstance(part, Quantized) else part.to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
