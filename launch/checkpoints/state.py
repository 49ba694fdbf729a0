"""The training state as named slices of parameters: what a checkpoint holds, whatever layout wrote it and whatever layout reads it.

Each rank writes one safetensors file (https://github.com/huggingface/safetensors, "Format"): for every shard_slice of a parameter that
its optimizer holds, the float32 weight and AdamW's two moments. The file's metadata says where the shard_slice lies in the whole
parameter. A reader takes from all files what its own layout needs, a shard_slice at a time; where tensor parallelism cut a matrix
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
Region = tuple[tuple[int, int], ...]
"""A part of a tensor: (first, end) of each dimension."""

_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}  # numbers whose checksum is computed at a time: on a CPU in cache, and by one thread


@dataclasses.dataclass(frozen=True)
class ShardSlice:
    """Consecutive numbers of one parameter."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    region: Region
    """The part of it that a rank's own tensor is: all of it, but for tensor parallelism."""
    start: int
    """The first number of the shard_slice, in that part laid out flat."""
    count: int

    def of(self, whole: Tensor) -> Tensor:
        """Its numbers in the whole parameter.  -> [count]"""
        return whole[_index(self.region)].reshape(-1)[self.start : self.start + self.count]


def whole_region(shape: Iterable[int]) -> Region:
    return tuple((0, size) for size in shape)


def _index(region: Region) -> tuple[slice, ...]:
    return tuple(slice(first, end) for first, end in region)


def checksum(values: Tensor, shard_slice: ShardSlice) -> int:
    """The sum over a shard_slice of each number's bits times an odd number of its place in the whole parameter, modulo 2**64.

    Sums of slices add up to the parameter's, however it is cut; a changed bit, or two numbers that changed places, change it.
    values: float32 [count]
    """
    chunk = min(shard_slice.count, _CHUNK.get(values.device.type, 1 << 15))
    in_whole = shard_slice.region == whole_region(shard_slice.shape)
    places = torch.arange(chunk, device=values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, shard_slice.count, chunk):
        bits = values[first : first + chunk].view(torch.int32).long()
        here = places[: len(bits)]
        if in_whole:
            total += (bits * (2 * here + 1)).sum() + 2 * (shard_slice.start + first) * bits.sum()
        else:
            total += (bits * (2 * _places_in_whole(here + shard_slice.start + first, shard_slice) + 1)).sum()
    return int(total)


def _places_in_whole(places: Tensor, shard_slice: ShardSlice) -> Tensor:
    """From places in a shard_slice's region, laid out flat, to places in the whole parameter, laid out flat.  [n] -> [n]"""
    whole, stride = torch.zeros_like(places), 1
    for (first, end), size in zip(reversed(shard_slice.region), reversed(shard_slice.shape), strict=True):
        whole += (places % (end - first) + first) * stride
        places, stride = places // (end - first), stride * size
    return whole


def write(file: HashingFile, slices: list[ShardSlice], values: Iterable[tuple[ShardSlice, Mapping[str, Tensor]]]) -> None:
    """Write the slices as one safetensors file; `values` gives each in turn, with its numbers by kind, float32 [count]."""
    about = {shard_slice.name: [shard_slice.shape, shard_slice.region, shard_slice.start] for shard_slice in slices}
    header: dict = {"__metadata__": {"stretches": json.dumps(about)}}
    end = 0
    for shard_slice in slices:
        for kind in KINDS:
            place = {"dtype": "F32", "shape": [shard_slice.count], "data_offsets": [end, end + 4 * shard_slice.count]}
            header[f"{shard_slice.name}.{kind}"] = place
            end += 4 * shard_slice.count
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
        self._found: dict[str, list[tuple[ShardSlice, safetensors.safe_open]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safetensors.safe_open(path, framework="pt")
                slices = json.loads(file.metadata()["stretches"])
            except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
                raise UserError(f"{path} is not one of a checkpoint's files: {error}.") from error
            for name, (shape, region, start) in slices.items():
                (count,) = file.get_slice(f"{name}.{KINDS[0]}").get_shape()
                shard_slice = ShardSlice(name, tuple(shape), tuple((first, end) for first, end in region), start, count)
                self.shapes[name] = shard_slice.shape
                self._found.setdefault(name, []).append((shard_slice, file))

    def names(self) -> Iterator[str]:
        """All parameters, those of the first layer first."""
        layer = lambda name: int(name.partition(".")[0]) if name[0].isdigit() else -1  # noqa: E731
        yield from sorted(self.shapes, key=lambda name: (layer(name), name))

    def read(self, wanted: ShardSlice, kind: str, into: Tensor) -> None:
        """Copy the numbers of a shard_slice into `into` [count]. Raises UserError where the files lack some or know another shape."""
        if self.shapes.get(wanted.name) != wanted.shape:
            raise UserError(
                f"{self.folder} holds {wanted.name} as {list(self.shapes.get(wanted.name, ()))}; this model has {list(wanted.shape)}."
            )
        if all(there.region == wanted.region for there, _ in self._found[wanted.name]):
            self._copy(self._found[wanted.name], kind, wanted.start, into)
        else:
            into.copy_(wanted.of(self.whole(wanted.name, kind)))

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter, float32, in its shape."""
        tensor = torch.empty(self.shapes[name])
        for region in {there.region for there, _ in self._found[name]}:
            is_all = region == whole_region(tensor.shape)
            part = tensor if is_all else torch.empty([end - first for first, end in region])
            self._copy([entry for entry in self._found[name] if entry[0].region == region], kind, 0, part.view(-1))
            if not is_all:
                tensor[_index(region)] = part
        return tensor

    def _copy(self, entries: list[tuple[ShardSlice, safetensors.safe_open]], kind: str, start: int, into: Tensor) -> None:
        """Fill `into` from place `start` of a region on, out of the slices of that region."""
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
