"""The finished layers of a compression on disk: one file per layer, published when it is complete; tensors are read one by one.

OUTPUT.unfinished/plan.json       the model, the text and the settings; a command with another plan does not resume
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

_FILES_BEFORE_THE_PLAN = {"lock", "plan.json.tmp"}
_QUANTIZED_FIELDS = ("codes", "scale", "zero_point", "global_scale")


def folder_for(output: Path) -> Path:
    """Return the folder of the finished layers until the output is complete."""
    return output.with_name(f"{output.name}.unfinished")


class LayerStore(Mapping[str, "Tensor | Quantized"]):
    """The parameters of the finished layers by our names, as tensors or as codes, each read from disk when it is needed."""

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        self.folder = folder_for(output)
        self.whole = self.folder / "whole"
        self._plan = plan
        self._lock: BinaryIO | None = None
        self._files: dict[str, Path] = {}
        self._grids: dict[str, Grid] = {}

    @property
    def how_to_resume(self) -> str:
        """Sentence that names the finished layers."""
        return f"The finished layers are kept in {self.folder}; the same command resumes after them."

    def open(self) -> None:
        """Lock the folder for this process until `close`. Raises UserError if another process has locked it, or if it has another plan."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._path("plan").is_file() and {path.name for path in self.folder.iterdir()} - _FILES_BEFORE_THE_PLAN:
                raise UserError(f"{self.folder} is not an unfinished compression. Remove the folder, or give another --output.")
            self._lock = lock_file(self.folder / "lock", warning="Make sure that no second process writes there.")
            if self._lock is None:
                raise UserError(f"Another process is writing {self.folder}. Wait for it, or give another --output.")
            if self._path("plan").is_file() and self._read_json("plan") != json.loads(json.dumps(self._plan)):
                raise UserError(
                    f"{self.folder} was started by another command, or by this one with another model or text. Run that command again "
                    "to resume it, remove the folder, or give another --output."
                )
            self._write_json("plan", self._plan)
            for leftover in [*self.folder.glob(f".{self.whole.name}.*"), *self.folder.glob(self.whole.name)]:  # .whole.*: earlier versions
                shutil.rmtree(leftover)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {error.strerror or error}. Free the disk, or give another --output."
            ) from error

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()

    def find_finished_layers(self) -> int:
        """Look on disk for finished layers, from the first one without a gap, and return their number."""
        self._files, self._grids = {}, {}
        number = 0
        while self._path(_layer(number)).is_file():
            layer = self._read_json(_layer(number))
            self._grids |= {name: Grid(**grid) for name, grid in layer["grids"].items()}
            self._files |= dict.fromkeys(layer["names"], self._path(_layer(number), "safetensors"))
            number += 1
        return number

    def write(self, number: int, tensors: Mapping[str, "Tensor | Quantized"], layer_report: dict[str, Any]) -> None:
        """Publish a layer with its report. Raises UserError if the disk is full; the layers before it are kept."""
        stored: dict[str, Tensor] = {}
        grids: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Quantized):
                grids[name] = dataclasses.asdict(tensor.grid)
                fields = {field: getattr(tensor, field) for field in _QUANTIZED_FIELDS}
                stored |= {f"{name}.{field}": part for field, part in fields.items() if part is not None}
            else:
                stored[name] = tensor
        path, temporary = self._path(_layer(number), "safetensors"), self._path(_layer(number), "tmp")
        try:
            save_file({name: part.detach().cpu().contiguous() for name, part in stored.items()}, temporary)
            publish_file(temporary, path, sync_folder=False)
            self._write_json(_layer(number), {"names": list(tensors), "grids": grids, "told": layer_report})
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written: {error}. The layers before it are kept; the same command resumes after them when the disk "
                "has room."
            ) from error
        self._files |= dict.fromkeys(tensors, path)
        self._grids |= {name: Grid(**grid) for name, grid in grids.items()}

    def read_report(self, number: int) -> dict[str, Any]:
        """Return the report of a layer. Raises UserError if it cannot be read."""
        with self._reading():
            return self._read_json(_layer(number))["told"]

    def read_result(self, name: str) -> Any:
        """Return the result stored under a name, or None."""
        return self._read_json(name) if self._path(name).is_file() else None

    def write_result(self, name: str, result: Any) -> None:
        """Store a result that took long to compute. Raises UserError if the disk is full."""
        try:
            self._write_json(name, result)
        except OSError as error:
            raise UserError(
                f"{self._path(name)} could not be written: {error.strerror or error}. Free the disk and run the same command."
            ) from error

    def remove(self) -> None:
        """Delete the folder; one that cannot be deleted does no harm."""
        with contextlib.suppress(OSError):
            self.close()
            shutil.rmtree(self.folder)

    def _read_json(self, name: str) -> Any:
        return json.loads(self._path(name).read_text(encoding="utf-8"))

    def _write_json(self, name: str, contents: Any) -> None:
        write_file(self._path(name), json.dumps(contents, indent=1))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise UserError if a finished layer cannot be read, for example because the folder was removed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder} was removed or changed while it was used: a finished layer cannot be read ({error}). Start again."
            ) from error

    def __getitem__(self, name: str) -> "Tensor | Quantized":
        with self._reading(), safe_open(self._files[name], framework="pt") as file:
            if name not in self._grids:
                return file.get_tensor(name)
            stored = set(file.keys())
            fields = {field: file.get_tensor(f"{name}.{field}") for field in _QUANTIZED_FIELDS if f"{name}.{field}" in stored}
        return Quantized(self._grids[name], **fields)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _path(self, name: str, kind: str = "json") -> Path:
        return self.folder / f"{name}.{kind}"


def _layer(number: int) -> str:
    return f"layer-{number:05d}"


class DequantizedWeights(Mapping[str, Tensor]):
    """The same parameters as float32 tensors: the numbers that software which loads the finished folder computes with."""

    def __init__(self, stored: Mapping[str, "Tensor | Quantized"]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        weight = self._stored[name]
        return weight.weight() if isinstance(weight, Quantized) else weight.to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
