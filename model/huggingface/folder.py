"""The folder of a Hugging Face checkpoint: written tensor by tensor, and read so."""

import contextlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.compression import packed
from model.compression.grids import Byte, Quantized
from model.compression.packed import CacheScheme, Scheme
from model.config import ModelConfig
from model.huggingface.architecture import NO_TOKENS, Counterpart, SpecialTokens
from model.huggingface.choice import ARCHITECTURES, architecture, counterparts, from_huggingface, model_type, to_huggingface
from model.transformer import parameter_shapes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of tensors by name."""


def export(
    config: ModelConfig,
    state: Mapping[str, Tensor | Quantized],
    folder: str | os.PathLike,
    tokens: SpecialTokens = NO_TOKENS,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    schemes: Mapping[str, Scheme] | None = None,
    kv_cache: CacheScheme | None = None,
) -> None:
    """Write `state`, by our names, as a Hugging Face checkpoint into `folder`, which is empty or does not exist yet.

    What has a scheme is Quantized in `state`, its scales of `dtype`, and is written as compressed-tensors stores it; the rest as `dtype`.
    `kv_cache`, beside schemes, has scales that are numbers of `dtype`.
    One tensor of `state` is asked for at a time, so a Mapping that reads lazily never holds the model. After an error the folder may be
    incomplete: the caller gives a temporary one and renames it when all is written and checked.
    Raises ValueError if `folder` holds files, if the architecture has no counterpart, and if `state` is not the model's.
    """
    folder, schemes = Path(folder), schemes or {}
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already and is not empty; an export is written to a new folder.")
    if dtype not in _DTYPES:
        raise ValueError(f"Cannot export as {dtype}; there are: {', '.join(str(known) for known in _DTYPES)}.")
    stated = to_huggingface(config, tokens, dtype)
    shapes = parameter_shapes(config)
    _check_names(set(state), set(shapes), "The model's state")
    if schemes:
        stated["quantization_config"] = quantization_config(config, schemes, dtype, kv_cache.kind if kv_cache else None)
    layouts = {entry: _layout(entry, shapes, schemes, dtype) for entry in counterparts(config)}
    shards = _split(layouts, max_shard_bytes)
    scales = {}
    if kv_cache is not None:
        names = itertools.chain.from_iterable(_names_of_cache_scales(config))
        scales = dict(zip(names, torch.tensor(kv_cache.scales, dtype=dtype).view(-1, 1), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = _together(layouts[entry] for entry in shard)
        tensors = (tensor for entry in shard for tensor in _tensors(entry, layouts[entry], state, schemes))
        if number == len(shards):
            layout |= dict.fromkeys(scales, (dtype, (1,)))
            tensors = itertools.chain(tensors, scales.values())
        _write_shard(folder / file, layout, tensors)
        index |= dict.fromkeys(layout, file)
        total += _num_bytes(layout)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(folder / "config.json", stated)
    if config.architecture != "encoder":
        keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        _write_json(folder / "generation_config.json", {key: stated[key] for key in keys if stated.get(key) is not None})


def quantization_config(
    config: ModelConfig, schemes: Mapping[str, Scheme], dtype: torch.dtype = torch.float32, kv_cache: Byte | None = None
) -> dict[str, Any]:
    """What config.json says of weights, by our names, that are quantized beside others of `dtype`, and of keys and values.

    Raises ValueError for what the format, or transformers, has no place for, naming the weight.
    """
    theirs, shapes = ARCHITECTURES[architecture(config)], parameter_shapes(config)
    entries = list(counterparts(config))
    of_ours = {ours: entry for entry in entries for ours in entry.ours}
    for name, scheme in schemes.items():
        if of_ours[name].transposed:
            raise ValueError(f"{theirs.label} keeps linear weights [in, out], which compressed-tensors has no place for; GGUF has one.")
        if theirs.label == "T5" and scheme.is_packed:
            raise ValueError(f"{scheme} in T5: transformers cannot load packed weights of it, only int8 with activations int8, and fp8.")
        if config.architecture == "encoder_decoder" and scheme.is_unpacked_to_bfloat16:
            raise ValueError(f"{scheme} in {theirs.label}: it runs in bfloat16, to which transformers would round its positions too.")
        if scheme.is_unpacked_to_bfloat16 and dtype != torch.bfloat16:
            raise ValueError(f"{scheme.grid.kind} beside weights of {dtype}: it must be torch.bfloat16, to which transformers unpacks it.")
        _layout(of_ours[name], shapes, schemes, dtype)
    if kv_cache is not None and config.architecture != "decoder":
        raise ValueError(f"kv_cache {kv_cache} is for decoders; the architecture is {config.architecture}.")
    by_module = {of_ours[name].module: scheme for name, scheme in schemes.items()}
    matrices = [entry.module for entry in entries if entry.theirs.endswith(".weight") and len(_their_shape(entry, shapes)) == 2]
    copies = [copy.removesuffix(".weight") for copy in theirs.copies(config) if copy.endswith(".weight")]
    return packed.configuration(by_module, [name for name in (*matrices, *copies) if name not in by_module], kv_cache)


def _names_of_cache_scales(config: ModelConfig) -> list[tuple[str, str]]:
    """Their names for the scale of the keys, and of the values, of each block."""
    layers = [entry.module for entry in counterparts(config) for ours in entry.ours if ours.endswith(".attention.key.weight")]
    places = [layer.rpartition(".")[0] for layer in layers]
    return [(f"{place}.k_scale", f"{place}.v_scale") for place in places]


class State(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by our names and in our shapes, each read when it is asked for.

    A quantized one is what its codes stand for, in float32.
    Raises ValueError where a tensor is missing, unknown, not what it is said to be a copy of, or of another shape than `config` says.
    """

    def __init__(self, folder: Path, config: ModelConfig, quantization: packed.ParsedConfiguration | None = None):
        theirs = ARCHITECTURES[architecture(config)]
        self._files = {theirs.current_name(name): (path, name) for name, path in _files_of_tensors(folder).items()}
        self._entries = {ours: (entry, place) for entry in counterparts(config) for place, ours in enumerate(entry.ours)}
        self.schemes: dict[str, Scheme] = {}
        """Of the weights that are quantized."""
        if quantization is not None:
            for ours, (entry, _) in self._entries.items():
                scheme = quantization.scheme_of(entry.module)
                if scheme is not None and f"{entry.module}.weight_scale" in self._files and entry.theirs.endswith(".weight"):
                    self.schemes[ours] = scheme
        shapes = parameter_shapes(config)
        self._layouts = {entry: _layout(entry, shapes, self.schemes, torch.float32) for entry, _ in self._entries.values()}
        layout = _together(self._layouts.values())
        kind_of_cache = quantization.kv_cache if quantization else None
        if kind_of_cache and config.architecture != "decoder":
            raise ValueError(f"{folder}: kv_cache_scheme is supported in decoders alone; the architecture is {config.architecture}.")
        scales = _names_of_cache_scales(config) if kind_of_cache else []
        layout |= dict.fromkeys(itertools.chain.from_iterable(scales), (torch.float32, (1,)))
        wanted = set(layout)
        given = {name for name in self._files if name in wanted or not name.endswith(theirs.constants)}
        for copy, original in theirs.copies(config).items():
            if copy in given - wanted and original in given & wanted:
                if not torch.equal(self._read(copy), self._read(original)):
                    raise ValueError(f"{folder}: {copy} differs from {original}, which it must be a copy of.")
                given.remove(copy)
        for name in given & set(theirs.zeros):
            if self._read(name).any():
                raise ValueError(f"{folder}: {name} is not zero; only zeros are supported.")
            given.remove(name)
        _check_names(given, wanted, str(folder))
        for tensor, (dtype, right) in layout.items():
            path, name = self._files[tensor]
            with safe_open(path, framework="pt") as file:
                given_as = file.get_slice(name)
                shape, kind = tuple(given_as.get_shape()), given_as.get_dtype()
            if shape != right:
                raise ValueError(f"{folder}: {tensor} is {list(shape)}; config.json says {list(right)}.")
            kinds = [_DTYPE_NAMES[known] for known in (_DTYPES if dtype in _DTYPES else (dtype,))]
            if kind not in kinds:
                raise ValueError(f"{folder}: {tensor} is of type {kind}; it must be {' or '.join(kinds)}.")
        self.kv_cache: CacheScheme | None = None
        """As which codes keys and values are kept, if so."""
        if kind_of_cache:
            found = {name: self._read(name).item() for name in itertools.chain.from_iterable(scales)}
            for name, scale in found.items():
                if not 0 < scale < math.inf:
                    raise ValueError(f"{folder}: {name} is {scale}; a scale is finite and above 0.")
            self.kv_cache = CacheScheme(kind_of_cache, tuple((found[key], found[value]) for key, value in scales))

    def _read(self, theirs: str) -> Tensor:
        path, name = self._files[theirs]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.schemes:
            return self.quantized(name).weight()
        entry, place = self._entries[name]
        tensor = self._read(entry.theirs)
        tensor = tensor.T if entry.transposed else tensor
        return tensor.chunk(len(entry.ours))[place].contiguous()

    def file_of(self, name: str) -> Path:
        """Where a tensor lies, or the first of what a quantized one is made of."""
        entry, _ = self._entries[name]
        return self._files[next(iter(self._layouts[entry]))][0]

    def quantized(self, name: str) -> Quantized:
        """A weight that has a scheme, as it is stored."""
        entry, _ = self._entries[name]
        tensors = {tensor.removeprefix(f"{entry.module}."): self._read(tensor) for tensor in self._layouts[entry]}
        return packed.unpacked(tensors, self.schemes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load(folder: str | os.PathLike) -> tuple[ModelConfig, State]:
    """The configuration and the weights, by our names and read lazily, of a folder of an architecture that we have.

    Raises ValueError naming what is not there, what we do not have, and pickled weights, which are code.
    """
    folder = Path(folder)
    stated, files = _stated(folder), _files_of_tensors(folder)
    try:
        theirs = ARCHITECTURES[model_type(stated)]
        tensors = {theirs.current_name(name): path for name, path in files.items()}
        config = from_huggingface(theirs.seen_with(stated, tensors))
        quantization = packed.parse_configuration(stated["quantization_config"]) if stated.get("quantization_config") else None
    except (ValueError, TypeError, AttributeError) as error:  # the last two: values of other types than these keys have
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return config, State(folder, config, quantization)


def decoder_start(folder: str | os.PathLike) -> int | None:
    """The id that a folder says a decoder's target begins with: in published T5 and Marian models padding, in ours end of text."""
    return _stated(Path(folder)).get("decoder_start_token_id")


def _stated(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; a Hugging Face checkpoint has one.")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{path} holds no mapping.")
    return stated


def _their_shape(entry: Counterpart, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if not entry.ours:
        return entry.zeros
    stacked = (sum(shapes[name][0] for name in entry.ours), *shapes[entry.ours[0]][1:])
    return stacked[::-1] if entry.transposed else stacked


def _layout(entry: Counterpart, shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme], dtype: torch.dtype) -> Layout:
    """What a file holds of an entry: the tensor itself, or what a quantized one is made of."""
    shape = _their_shape(entry, shapes)
    if (scheme := _scheme_of(entry, schemes)) is None:
        return {entry.theirs: (dtype, shape)}
    try:
        parts = packed.layout(scheme, shape, dtype)
    except ValueError as error:
        raise ValueError(f"{entry.theirs} {list(shape)}: {error}") from error
    return {f"{entry.module}.{part}": kind for part, kind in parts.items()}


def _scheme_of(entry: Counterpart, schemes: Mapping[str, Scheme]) -> Scheme | None:
    return schemes.get(entry.ours[0]) if entry.ours else None


def _together(layouts: Iterable[Layout]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: kind for layout in layouts for name, kind in layout.items()}


def _num_bytes(layout: Layout) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())


def _tensors(
    entry: Counterpart, layout: Layout, state: Mapping[str, Tensor | Quantized], schemes: Mapping[str, Scheme]
) -> Iterator[Tensor]:
    """What `layout` says of an entry, in its order."""
    if (scheme := _scheme_of(entry, schemes)) is not None:
        tensors = {f"{entry.module}.{part}": tensor for part, tensor in packed.packed(state[entry.ours[0]], scheme).items()}
    else:
        [(dtype, shape)] = layout.values()
        stacked = (
            torch.cat([state[name].detach().to("cpu", dtype) for name in entry.ours]) if entry.ours else torch.zeros(shape, dtype=dtype)
        )
        tensors = {entry.theirs: (stacked.T if entry.transposed else stacked).contiguous()}
    for name, (dtype, shape) in layout.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{' + '.join(entry.ours)} would be {list(tensors[name].shape)}; the configuration says {list(shape)}.")
        assert tensors[name].dtype == dtype, f"{name} is {tensors[name].dtype} and not {dtype}"
        yield tensors[name]


def _check_names(given: set[str], wanted: set[str], what: str) -> None:
    for problem, names in (("lacks", wanted - given), ("has unknown tensors", given - wanted)):
        if names:
            raise ValueError(f"{what} {problem}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}.")


def _split(layouts: Mapping[Counterpart, Layout], max_bytes: int) -> list[list[Counterpart]]:
    """The entries in order, as many to a shard as fit in max_bytes, at least one."""
    shards: list[list[Counterpart]] = [[]]
    used_bytes = 0
    for entry, layout in layouts.items():
        entry_bytes = _num_bytes(layout)
        if shards[-1] and used_bytes + entry_bytes > max_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(entry)
        used_bytes += entry_bytes
    return shards


def _write_shard(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """A safetensors file, tensor by tensor, where the library's own writer would need all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif index.is_file():
        try:
            files = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files.") from error
    elif any(folder.glob("*.bin")):
        raise ValueError(f"{folder} has only pickled weights (.bin), which can run code when read. Save it as safetensors first.")
    else:
        raise ValueError(f"{folder} has no model.safetensors and no model.safetensors.index.json.")
    place: dict[str, Path] = {}
    for name in sorted(files):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{index} names {name}, which is not a file of {folder}.")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # safetensors' own error class has moved between versions
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
            place |= dict.fromkeys(file.keys(), path)
    return place
