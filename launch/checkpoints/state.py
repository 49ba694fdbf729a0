"""The training state as named stretches of parameters: what a checkpoint holds, whatever layout wrote it and whatever layout reads it.

Each rank writes one safetensors file (https://github.com/huggingface/safetensors, "Format"): for every stretch of a parameter that
its optimizer holds, the float32 weight and AdamW's two moments. The file's metadata says where the stretch lies in the whole
parameter. A reader takes from all files what its own layout needs, a stretch at a time; where tensor parallelism cut a matrix
otherwise, one kind of that matrix is put together whole.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from data.command_line import UserError
from launch.checkpoints.checkpoint import HashingFile

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of each number of the model; the last two as torch.optim.AdamW names them."""
Box = tuple[tuple[int, int], ...]
"""A part of a tensor: (first, end) of each dimension."""

_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}  # numbers whose checksum is computed at a time: on a CPU in cache, and by one thread


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive numbers of one parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    box: Box
    """The part of it that a rank's own tensor is: all of it, but for tensor parallelism."""
    start: int
    """The first number of the stretch, in that part laid out flat."""
    count: int

    def of(self, whole: Tensor) -> Tensor:
        """Its numbers in the whole parameter.  -> [count]"""
        return whole[_slices(self.box)].reshape(-1)[self.start : self.start + self.count]


def whole_box(shape: Iterable[int]) -> Box:
    return tuple((0, size) for size in shape)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, end) for first, end in box)


def checksum(values: Tensor, stretch: Stretch) -> int:
    """The sum over a stretch of each number's bits times an odd number of its place in the whole parameter, modulo 2**64.

    Sums of stretches add up to the parameter's, however it is cut; a changed bit, or two numbers that changed places, change it.
    values: float32 [count]
    """
    chunk = min(stretch.count, _CHUNK.get(values.device.type, 1 << 15))
    in_whole = stretch.box == whole_box(stretch.shape)
    places = torch.arange(chunk, device=values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, stretch.count, chunk):
        bits = values[first : first + chunk].view(torch.int32).long()
        here = places[: len(bits)]
        if in_whole:
            total += (bits * (2 * here + 1)).sum() + 2 * (stretch.start + first) * bits.sum()
        else:
            total += (bits * (2 * _places_in_whole(here + stretch.start + first, stretch) + 1)).sum()
    return int(total)


def _places_in_whole(places: Tensor, stretch: Stretch) -> Tensor:
    """From places in a stretch's box, laid out flat, to places in the whole parameter, laid out flat.  [n] -> [n]"""
    whole, stride = torch.zeros_like(places), 1
    for (first, end), size in zip(reversed(stretch.box), reversed(stretch.shape), strict=True):
        whole += (places % (end - first) + first) * stride
        places, stride = places // (end - first), stride * size
    return whole


def write(file: HashingFile, stretches: list[Stretch], values: Iterable[tuple[Stretch, Mapping[str, Tensor]]]) -> None:
    """Write the stretches as one safetensors file; `values` gives each in turn, with its numbers by kind, float32 [count]."""
    about = {stretch.name: [stretch.shape, stretch.box, stretch.start] for stretch in stretches}
    header: dict = {"__metadata__": {"stretches": json.dumps(about)}}
    end = 0
    for stretch in stretches:
        for kind in KINDS:
            place = {"dtype": "F32", "shape": [stretch.count], "data_offsets": [end, end + 4 * stretch.count]}
            header[f"{stretch.name}.{kind}"] = place
            end += 4 * stretch.count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, numbers in values:
        for kind in KINDS:
            file.write(numbers[kind].cpu().numpy().data.cast("B"))


class SavedState:
    """The state in a checkpoint's files, read by parameter and kind. Files are mapped; only what is asked for is copied."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._found: dict[str, list[tuple[Stretch, safetensors.safe_open]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safetensors.safe_open(path, framework="pt")
                stretches = json.loads(file.metadata()["stretches"])
            except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
                raise UserError(f"{path} is not one of a checkpoint's files: {error}.") from error
            for name, (shape, box, start) in stretches.items():
                (count,) = file.get_slice(f"{name}.{KINDS[0]}").get_shape()
                stretch = Stretch(name, tuple(shape), tuple((first, end) for first, end in box), start, count)
                self.shapes[name] = stretch.shape
                self._found.setdefault(name, []).append((stretch, file))

    def names(self) -> Iterator[str]:
        """All parameters, those of the first layer first."""
        layer = lambda name: int(name.partition(".")[0]) if name[0].isdigit() else -1  # noqa: E731
        yield from sorted(self.shapes, key=lambda name: (layer(name), name))

    def read(self, wanted: Stretch, kind: str, into: Tensor) -> None:
        """Copy the numbers of a stretch into `into` [count]. Raises UserError where the files lack some or know another shape."""
        if self.shapes.get(wanted.name) != wanted.shape:
            raise UserError(
                f"{self.folder} holds {wanted.name} as {list(self.shapes.get(wanted.name, ()))}; this model has {list(wanted.shape)}."
            )
        if all(there.box == wanted.box for there, _ in self._found[wanted.name]):
            self._copy(self._found[wanted.name], kind, wanted.start, into)
        else:
            into.copy_(wanted.of(self.whole(wanted.name, kind)))

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter, float32, in its shape."""
        tensor = torch.empty(self.shapes[name])
        for box in {there.box for there, _ in self._found[name]}:
            is_all = box == whole_box(tensor.shape)
            part = tensor if is_all else torch.empty([end - first for first, end in box])
            self._copy([entry for entry in self._found[name] if entry[0].box == box], kind, 0, part.view(-1))
            if not is_all:
                tensor[_slices(box)] = part
        return tensor

    def _copy(self, entries: list[tuple[Stretch, safetensors.safe_open]], kind: str, start: int, into: Tensor) -> None:
        """Fill `into` from place `start` of a box on, out of the stretches of that box."""
        copied = 0
        for there, file in entries:
            first, end = max(start, there.start), min(start + len(into), there.start + there.count)
            if first >= end:
                continue
            saved = file.get_slice(f"{there.name}.{kind}")
            into[first - start : end - start].copy_(saved[first - there.start : end - there.start])
            copied += end - first
        if copied != len(into):
            raise UserError(f"{self.folder} holds {copied:,} of {len(into):,} numbers of {entries[0][0].name}.{kind}.")
