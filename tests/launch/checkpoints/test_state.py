"""Shard slices: parameters that were written in slices of any kind are read back whole, and a wrong value is detected."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from launch.checkpoints import state
from launch.checkpoints.checkpoint import HashingFile
from launch.checkpoints.state import SavedState, ShardSlice, checksum, whole_region

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES = {"tied_modules.embedding.weight": (10, 6), "1.attention.query.weight": (8, 6), "1.norm.weight": (6,), "2.weight": (4, 3)}


def numbers(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


ALL = {kind: numbers(kind) for kind in KINDS}


def cut_into_regions(shape: tuple[int, ...], dim: int, parts: int) -> list[state.Region]:
    """Cut a tensor along a dimension into nearly equal parts; into one part if it lacks the dimension or is too short."""
    if dim >= len(shape) or shape[dim] < parts:
        return [whole_region(shape)]
    edges = [shape[dim] * number // parts for number in range(parts + 1)]
    return [tuple((edges[n], edges[n + 1]) if d == dim else (0, size) for d, size in enumerate(shape)) for n in range(parts)]


def cut(dim: int, tensor_ranks: int, zero_ranks: int) -> list[list[ShardSlice]]:
    """Return the slices of each of tensor_ranks x zero_ranks ranks: cut along `dim`, then flattened and cut among the ZeRO ranks."""
    ranks: list[list[ShardSlice]] = [[] for _ in range(tensor_ranks * zero_ranks)]
    for name, shape in SHAPES.items():
        for place, region in enumerate(cut_into_regions(shape, dim, tensor_ranks)):
            size = math.prod(end - first for first, end in region)
            each = -(-size // zero_ranks)
            for zero in range(zero_ranks):
                if (count := min(each, size - zero * each)) > 0:
                    ranks[zero * tensor_ranks + place].append(ShardSlice(name, shape, region, zero * each, count))
    return ranks


def values_of(shard_slice: ShardSlice, kind: str) -> torch.Tensor:
    part = ALL[kind][shard_slice.name][tuple(slice(first, end) for first, end in shard_slice.region)]
    return part.reshape(-1)[shard_slice.start : shard_slice.start + shard_slice.count].clone()


def write(folder: Path, ranks: list[list[ShardSlice]]) -> Path:
    for rank, slices in enumerate(ranks):
        if slices:
            file = HashingFile(folder / f"rank_{rank:05d}.safetensors")
            values = ((shard_slice, {kind: values_of(shard_slice, kind) for kind in KINDS}) for shard_slice in slices)
            state.write(file, slices, KINDS, values)
            file.finish()
    return folder


cuts = st.tuples(st.integers(0, 1), st.integers(1, 3), st.integers(1, 5))


@given(cuts, cuts)
@settings(deadline=None, max_examples=60)
def test_any_ranks_read_what_any_other_ranks_wrote(tmp_path_factory, written, wanted):
    saved = SavedState(write(tmp_path_factory.mktemp("state"), cut(*written)))
    assert saved.shapes == SHAPES
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(saved.whole(name, kind), ALL[kind][name])
    for shard_slice in (shard_slice for slices in cut(*wanted) for shard_slice in slices):
        for kind in KINDS:
            into = torch.full((shard_slice.count,), torch.nan)
            saved.read(shard_slice, kind, into)
            assert torch.equal(into, values_of(shard_slice, kind)), (shard_slice, kind)


@given(cuts)
@settings(deadline=None, max_examples=60)
def test_checksums_of_slices_add_up_to_that_of_the_parameter(written):
    sums = dict.fromkeys(SHAPES, 0)
    for shard_slice in (shard_slice for slices in cut(*written) for shard_slice in slices):
        sums[shard_slice.name] += checksum(values_of(shard_slice, "weight"), shard_slice)
    for name in SHAPES:
        bits = ALL["weight"][name].numpy().reshape(-1).view(np.int32).astype(object)
        by_hand = sum(int(bit) * (2 * place + 1) for place, bit in enumerate(bits))
        assert sums[name] % 2**64 == by_hand % 2**64


def test_a_checksum_changes_with_every_bit_and_every_swap():
    name = "2.weight"
    shard_slice = ShardSlice.of_whole(name, SHAPES[name])
    values = values_of(shard_slice, "weight")
    seen = {checksum(values, shard_slice)}
    for place in range(12):
        for bit in range(32):
            changed = values.clone()
            changed.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 2**bit
            seen.add(checksum(changed, shard_slice))
        for other in range(place):
            swapped = values.clone()
            swapped[[place, other]] = swapped[[other, place]]
            seen.add(checksum(swapped, shard_slice))
    assert len(seen) == 1 + 12 * 32 + 12 * 11 // 2


def test_a_checksum_does_not_depend_on_how_values_are_chunked():
    values = torch.randn(200_001)
    whole = ShardSlice.of_whole("long", (200_001,))
    parts = [(0, 70_000), (70_000, 65_536), (135_536, 64_465)]
    added = sum(checksum(values[a : a + n], dataclasses.replace(whole, start=a, count=n)) for a, n in parts)
    assert (added - checksum(values, whole)) % 2**64 == 0


def test_files_are_valid_safetensors(tmp_path):
    write(tmp_path, cut(0, 1, 2))
    first = safetensors.torch.load_file(tmp_path / "rank_00000.safetensors")
    assert torch.equal(first["1.norm.weight.exp_avg"], ALL["exp_avg"]["1.norm.weight"][:3])
    raw = (tmp_path / "rank_00000.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0 and len(raw) == 8 + length + max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry)


def test_names_are_in_the_order_of_the_layers(tmp_path):
    assert list(SavedState(write(tmp_path, cut(0, 1, 1))).names()) == list(SHAPES)


def test_a_missing_file_and_a_different_shape_are_refused_by_name(tmp_path):
    write(tmp_path, cut(0, 1, 2))
    shard_slice = ShardSlice.of_whole("1.norm.weight", (7,))
    with pytest.raises(UserError, match=r"holds 1.norm.weight as \[6\]; this model has \[7\]"):
        SavedState(tmp_path).read(shard_slice, "weight", torch.empty(7))
    with pytest.raises(UserError, match=r"holds 9.weight as \[\]"):
        SavedState(tmp_path).read(dataclasses.replace(shard_slice, name="9.weight"), "weight", torch.empty(7))
    (tmp_path / "rank_00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds 3 of 6 values of 1.norm.weight.weight"):
        SavedState(tmp_path).whole("1.norm.weight")
