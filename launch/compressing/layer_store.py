"""What a compression has done so far, on disk: the tensors of each layer in a file, published when it is whole, and read back one by one.

OUTPUT.unfinished/plan.json       what is compressed, and how: another plan is not gone on with
                  lock            held by the process that writes here
                  NAME.json       what was found out before the first layer
                  layer-00003.safetensors, .json    its tensors by our names, and what is told of it
                  whole           what OUTPUT will be, until it was proven
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.command_line import UserError
from data.files import lock_file, publish_file, write_file
from model.compression.grids import Grid, Quantized

_OF_A_BEGINNING = {"lock", "plan.json.tmp"}  # what a start that was stopped at once has left
_PIECES = ("codes", "scale", "zero_point", "global_scale")


def folder_for(output: Path) -> Path:
    """Where the parts of an output lie until it is whole."""
    return output.with_name(f"{output.name}.unfinished")


class Parts(Mapping[str, "Tensor | Quantized"]):
    """Parameters by our names, whole or as codes, each read when it is asked for."""

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        self.folder = folder_for(output)
        self.whole = self.folder / "whole"
        self._plan = plan
        self._lock: BinaryIO | None = None
        self._files: dict[str, Path] = {}
        self._grids: dict[str, Grid] = {}

    def open(self) -> None:
        """Hold the folder for this process, until `close`. Raises UserError where another holds it, and where it is another plan's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._path("plan").is_file() and {path.name for path in self.folder.iterdir()} - _OF_A_BEGINNING:
                raise UserError(f"{self.folder} is no unfinished compression. Remove the folder, or give another --output.")
            self._lock = lock_file(self.folder / "lock", warning="Make sure that no second process writes there.")
            if self._lock is None:
                raise UserError(f"Another process is writing {self.folder}. Wait for it, or give another --output.")
            if self._path("plan").is_file() and self._read("plan") != json.loads(json.dumps(self._plan)):
                raise UserError(
                    f"{self.folder} holds what another command has begun, or the same of another model or text. Start that command "
                    "again to go on with it, remove the folder, or give another --output."
                )
            self._note("plan", self._plan)
            for killed in [*self.folder.glob(f".{self.whole.name}.*"), *self.folder.glob(self.whole.name)]:  # .whole.*: earlier versions
                shutil.rmtree(killed)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror or error}.") from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def find(self) -> int:
        """Look which layers are there, from the first on without a gap; how many."""
        self._files, self._grids = {}, {}
        number = 0
        while self._path(_layer(number)).is_file():
            told = self._read(_layer(number))
            self._grids |= {name: Grid(**grid) for name, grid in told["grids"].items()}
            self._files |= dict.fromkeys(told["names"], self._path(_layer(number), "safetensors"))
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
        path, temporary = self._path(_layer(number), "safetensors"), self._path(_layer(number), "tmp")
        try:
            save_file({name: piece.detach().cpu().contiguous() for name, piece in pieces.items()}, temporary)
            publish_file(temporary, path, sync_folder=False)
            self._note(_layer(number), {"names": list(tensors), "grids": grids, "told": told})
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written: {error}. The layers before it are kept; the same command goes on behind them."
            ) from error
        self._files |= dict.fromkeys(tensors, path)
        self._grids |= {name: Grid(**grid) for name, grid in grids.items()}

    def told(self, number: int) -> dict[str, Any]:
        """What was told of a layer."""
        return self._read(_layer(number))["told"]

    def known(self, name: str) -> Any:
        """What was noted under a name, or None."""
        return self._read(name) if self._path(name).is_file() else None

    def note(self, name: str, found: Any) -> None:
        """Keep what took long to find out. Raises UserError where the disk is full."""
        try:
            self._note(name, found)
        except OSError as error:
            raise UserError(f"{self._path(name)} could not be written: {error.strerror or error}.") from error

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder)

    def _read(self, name: str) -> Any:
        return json.loads(self._path(name).read_text(encoding="utf-8"))

    def _note(self, name: str, contents: Any) -> None:
        write_file(self._path(name), json.dumps(contents, indent=1))

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

    def _path(self, name: str, kind: str = "json") -> Path:
        return self.folder / f"{name}.{kind}"


def _layer(number: int) -> str:
    return f"layer-{number:05d}"


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
