"""The training state as named slices of parameters. A checkpoint holds the same state whatever layout wrote it, and any layout can read it.

Each rank writes one safetensors file (https://github.com/huggingface/safetensors, "Format"). For every slice of a parameter that
its optimizer holds, the file has the float32 weight and the optimizer's states. The file's metadata gives the position of each slice
in the whole parameter. A reader copies from all files what its own layout needs, one slice at a time. Where tensor parallelism cut a
matrix in another way, one tensor of that matrix is assembled whole.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from data.command_line import UserError
from launch.checkpoints.checkpoint import HashingFile

WEIGHT = "weight"
"""Name of a parameter's float32 weight among its tensors in a checkpoint."""
_BEFORE_RECORDS: dict = {"optimizer_name": "adamw", "optimizer_states": ["exp_avg", "exp_avg_sq"]}
"""The entries of manifests from versions that did not write them yet."""
Region = tuple[tuple[int, int], ...]
"""A rectangular part of a tensor: (first, end) of each dimension."""

_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}  # values per checksum operation: on a CPU they stay in the cache, and one thread suffices


@dataclasses.dataclass(frozen=True)
class ShardSlice:
    """Consecutive values of one parameter."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    region: Region
    """The part of the parameter that is the rank's own tensor: all of it, except under tensor parallelism."""
    start: int
    """Index of the slice's first value in that part, flattened."""
    count: int
    """Number of values."""

    @classmethod
    def of_whole(cls, name: str, shape: Sequence[int]) -> "ShardSlice":
        """Return the slice that is a whole parameter."""
        return cls(name, tuple(shape), whole_region(shape), 0, math.prod(shape))

    def region_of(self, whole: Tensor) -> Tensor:
        """Return a view of the region in the whole parameter.  [shape] -> [shape of the region]"""
        return whole[_index(self.region)]

    def take_from(self, whole: Tensor) -> Tensor:
        """Return the slice's values out of the whole parameter.  [shape] -> [count]"""
        return self.region_of(whole).reshape(-1)[self.start : self.start + self.count]


def whole_region(shape: Iterable[int]) -> Region:
    """Return the region that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def _index(region: Region) -> tuple[slice, ...]:
    return tuple(slice(first, end) for first, end in region)


def kinds_in(manifest: dict) -> tuple[str, ...]:
    """Return the names of the tensors that a checkpoint holds for each parameter: the weight, then the optimizer's states.

    A manifest's checksums are in this order.
    """
    return WEIGHT, *(_BEFORE_RECORDS | manifest)["optimizer_states"]


def optimizer_name_in(manifest: dict) -> str:
    """Return the name of the optimizer that a checkpoint was trained with."""
    return (_BEFORE_RECORDS | manifest)["optimizer_name"]


def optimizer_description_in(manifest: dict) -> str:
    """Return the name and the settings of the optimizer that wrote a checkpoint; the name alone if an earlier version wrote it."""
    return manifest.get("optimizer_description", optimizer_name_in(manifest))


def checksum(values: Tensor, shard_slice: ShardSlice) -> int:
    """Return the sum of each value's bits times an odd number that depends on its index in the whole parameter, modulo 2**64.

    Checksums of slices add up to the parameter's checksum, however it is cut. A flipped bit or two swapped values change it.
    values: float32 [count]
    """
    chunk = min(shard_slice.count, _CHUNK.get(values.device.type, 1 << 15))
    covers_whole = shard_slice.region == whole_region(shard_slice.shape)
    indices = torch.arange(chunk, device=values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, shard_slice.count, chunk):
        bits = values[first : first + chunk].view(torch.int32).long()
        in_chunk = indices[: len(bits)]
        if covers_whole:
            total += (bits * (2 * in_chunk + 1)).sum() + 2 * (shard_slice.start + first) * bits.sum()
        else:
            total += (bits * (2 * _indices_in_whole(in_chunk + shard_slice.start + first, shard_slice) + 1)).sum()
    return int(total)


def _indices_in_whole(indices: Tensor, shard_slice: ShardSlice) -> Tensor:
    """Convert indices in the slice's flattened region to indices in the flattened whole parameter.  [n] -> [n]"""
    whole, stride = torch.zeros_like(indices), 1
    for (first, end), size in zip(reversed(shard_slice.region), reversed(shard_slice.shape), strict=True):
        whole += (indices % (end - first) + first) * stride
        indices, stride = indices // (end - first), stride * size
    return whole


def write(
    file: HashingFile, slices: list[ShardSlice], kinds: Sequence[str], values: Iterable[tuple[ShardSlice, Mapping[str, Tensor]]]
) -> None:
    """Write slices as one safetensors file. `values` yields them in the same order, each with its tensors by kind, float32 [count]."""
    positions = {one.name: [one.shape, one.region, one.start] for one in slices}
    header: dict = {"__metadata__": {"stretches": json.dumps(positions)}}  # the key's name is part of the format
    end = 0
    for one in slices:
        for kind in kinds:
            header[f"{one.name}.{kind}"] = {"dtype": "F32", "shape": [one.count], "data_offsets": [end, end + 4 * one.count]}
            end += 4 * one.count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensors in values:
        for kind in kinds:
            file.write(tensors[kind].cpu().numpy().data.cast("B"))


class SavedState:
    """The state in a checkpoint's files, read by parameter and kind. Files are memory-mapped; only what is asked for is copied."""

    def __init__(self, folder: Path):
        """Open all files of a checkpoint. Raises UserError if one of them does not belong to a checkpoint."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._saved: dict[str, list[tuple[ShardSlice, safetensors.safe_open]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safetensors.safe_open(path, framework="pt")
                positions = json.loads(file.metadata()["stretches"])
            except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
                raise UserError(f"{path} is not a file of a checkpoint: {error}.") from error
            for name, (shape, region, start) in positions.items():
                (count,) = file.get_slice(f"{name}.{WEIGHT}").get_shape()
                saved = ShardSlice(name, tuple(shape), tuple((first, end) for first, end in region), start, count)
                self.shapes[name] = saved.shape
                self._saved.setdefault(name, []).append((saved, file))

    def names(self) -> Iterator[str]:
        """Yield the names of all parameters in the order of the layers."""
        layer = lambda name: int(name.partition(".")[0]) if name[0].isdigit() else -1  # noqa: E731
        yield from sorted(self.shapes, key=lambda name: (layer(name), name))

    def read(self, wanted: ShardSlice, kind: str, into: Tensor) -> None:
        """Copy the values of a slice into `into` [count]. Raises UserError if the files lack some or have another shape."""
        if self.shapes.get(wanted.name) != wanted.shape:
            raise UserError(
                f"{self.folder} holds {wanted.name} as {list(self.shapes.get(wanted.name, ()))}; this model has {list(wanted.shape)}."
            )
        if all(saved.region == wanted.region for saved, _ in self._saved[wanted.name]):
            self._copy(self._saved[wanted.name], kind, wanted.start, into)
        else:
            into.copy_(wanted.take_from(self.whole(wanted.name, kind)))

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return one tensor of a whole parameter, float32, in the parameter's shape."""
        tensor = torch.empty(self.shapes[name])
        for region in {saved.region for saved, _ in self._saved[name]}:
            is_whole = region == whole_region(tensor.shape)
            part = tensor if is_whole else torch.empty([end - first for first, end in region])
            self._copy([entry for entry in self._saved[name] if entry[0].region == region], kind, 0, part.view(-1))
            if not is_whole:
                tensor[_index(region)] = part
        return tensor

    def _copy(self, entries: list[tuple[ShardSlice, safetensors.safe_open]], kind: str, start: int, into: Tensor) -> None:
        """Fill `into` with the values of a region from index `start` on. `entries` are the slices of that region and their files."""
        copied = 0
        for saved, file in entries:
            first, end = max(start, saved.start), min(start + len(into), saved.start + saved.count)
            if first >= end:
                continue
            values = file.get_slice(f"{saved.name}.{kind}")
            into[first - start : end - start].copy_(values[first - saved.start : end - saved.start])
            copied += end - first
        if copied != len(into):
            raise UserError(f"{self.folder} holds {copied:,} of {len(into):,} values of {entries[0][0].name}.{kind}.")
