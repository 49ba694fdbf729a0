"""The finished layers of a compression on disk: one file per layer, published when it is complete; tensors are read back one by one.

OUTPUT.unfinished/plan.json       what is compressed and how; a command with another plan does not resume
                  lock            locked by the process that writes here
                  NAME.json       results of the passes before the first layer
                  layer-00003.safetensors, .json    the layer's tensors by our names, and its report
                  whole           the folder that becomes OUTPUT when it has been checked
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

_LEFT_BY_A_STOPPED_START = {"lock", "plan.json.tmp"}
_PIECES = ("codes", "scale", "zero_point", "global_scale")


def folder_for(output: Path) -> Path:
    """Return the folder of the finished layers until the output is complete."""
    return output.with_name(f"{output.name}.unfinished")


class Parts(Mapping[str, "Tensor | Quantized"]):
    """Parameters by our names, as tensors or as codes, each read from disk when it is needed."""

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        self.folder = folder_for(output)
        self.whole = self.folder / "whole"
        self._plan = plan
        self._lock: BinaryIO | None = None
        self._files: dict[str, Path] = {}
        self._grids: dict[str, Grid] = {}

    def open(self) -> None:
        """Lock the folder for this process until `close`. Raises UserError if another process has locked it, or if it has another plan."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._path("plan").is_file() and {path.name for path in self.folder.iterdir()} - _LEFT_BY_A_STOPPED_START:
                raise UserError(f"{self.folder} is not an unfinished compression. Remove the folder, or give another --output.")
            self._lock = lock_file(self.folder / "lock", warning="Make sure that no second process writes there.")
            if self._lock is None:
                raise UserError(f"Another process is writing {self.folder}. Wait for it, or give another --output.")
            if self._path("plan").is_file() and self._read("plan") != json.loads(json.dumps(self._plan)):
                raise UserError(
                    f"{self.folder} was begun by another command, or by this one with another model or text. Run that command again to "
                    "resume it, remove the folder, or give another --output."
                )
            self._note("plan", self._plan)
            for killed in [*self.folder.glob(f".{self.whole.name}.*"), *self.folder.glob(self.whole.name)]:  # .whole.*: earlier versions
                shutil.rmtree(killed)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror or error}.") from error

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()

    def find(self) -> int:
        """Find the finished layers, from the first one without a gap, and return their number."""
        self._files, self._grids = {}, {}
        number = 0
        while self._path(_layer(number)).is_file():
            told = self._read(_layer(number))
            self._grids |= {name: Grid(**grid) for name, grid in told["grids"].items()}
            self._files |= dict.fromkeys(told["names"], self._path(_layer(number), "safetensors"))
            number += 1
        return number

    def write(self, number: int, tensors: Mapping[str, "Tensor | Quantized"], told: dict[str, Any]) -> None:
        """Publish a layer with its report `told`. Raises UserError if the disk is full; the layers before it are kept."""
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
                f"{path} could not be written: {error}. The layers before it are kept; the same command resumes after them."
            ) from error
        self._files |= dict.fromkeys(tensors, path)
        self._grids |= {name: Grid(**grid) for name, grid in grids.items()}

    def told(self, number: int) -> dict[str, Any]:
        """Return the report of a layer."""
        return self._read(_layer(number))["told"]

    def known(self, name: str) -> Any:
        """Return the result stored under a name, or None."""
        return self._read(name) if self._path(name).is_file() else None

    def note(self, name: str, found: Any) -> None:
        """Store a result that took long to compute. Raises UserError if the disk is full."""
        try:
            self._note(name, found)
        except OSError as error:
            raise UserError(f"{self._path(name)} could not be written: {error.strerror or error}.") from error

    def remove(self) -> None:
        """Delete the folder."""
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
    """The same parameters as float32 tensors: the numbers that software which loads the finished folder computes with."""

    def __init__(self, parts: Mapping[str, "Tensor | Quantized"]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts[name]
        return part.weight() if isinstance(part, Quantized) else part.to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
