"""The folder of a Hugging Face checkpoint, which is written and read tensor by tensor."""

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
from model.finite import is_finite
from model.huggingface.architecture import HEADLESS, NO_TOKENS, Architecture, Counterpart, SpecialTokens
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

GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Keys of config.json that belong to generation_config.json too."""
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of a tensor in a file."""


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
    """Write `state`, by our names, as a Hugging Face checkpoint into `folder`, which must be empty or missing.

    A weight with a scheme is a Quantized in `state`, with scales of type `dtype`, and is written in the format of compressed-tensors. All
    other tensors are written as `dtype`. `kv_cache` needs schemes; its scales must be representable in `dtype`.
    One tensor of `state` is read at a time, so a Mapping that reads lazily never holds the whole model. After an error the folder may be
    incomplete: give a temporary folder and rename it when everything is written and checked.
    Raises ValueError if `folder` contains files, if the architecture has no counterpart, if `state` does not belong to the model, or if
    a weight is not finite or too large for its type.
    """
    folder, schemes = Path(folder), schemes or {}
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already and is not empty. Give a new folder.")
    if dtype not in _DTYPES:
        raise ValueError(f"Cannot export as {dtype}. Supported: {', '.join(str(known) for known in _DTYPES)}.")
    config_json = to_huggingface(config, tokens, dtype)
    shapes = parameter_shapes(config)
    _check_names(set(state), set(shapes), "The model's state")
    if schemes:
        config_json["quantization_config"] = quantization_config(config, schemes, dtype, kv_cache.kind if kv_cache else None)
    layouts = {entry: _layout(entry, shapes, schemes, dtype) for entry in counterparts(config)}
    shards = _split(layouts, max_shard_bytes)
    scales = {}
    if kv_cache is not None:
        names = itertools.chain.from_iterable(_cache_scale_names(config))
        scales = dict(zip(names, torch.tensor(kv_cache.scales, dtype=dtype).view(-1, 1), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = _merged(layouts[entry] for entry in shard)
        tensors: Iterable[Tensor] = (tensor for entry in shard for tensor in _tensors(entry, layouts[entry], state, schemes))
        if number == len(shards):
            layout |= dict.fromkeys(scales, (dtype, (1,)))
            tensors = itertools.chain(tensors, scales.values())
        _write_shard(folder / file, layout, tensors)
        index |= dict.fromkeys(layout, file)
        total += _layout_bytes(layout)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(folder / "config.json", config_json)
    if config.architecture != "encoder":
        ids = {key: config_json[key] for key in GENERATION_KEYS if config_json.get(key) is not None}
        _write_json(folder / "generation_config.json", {**tokens.generation, **ids})


def quantization_config(
    config: ModelConfig, schemes: Mapping[str, Scheme], dtype: torch.dtype = torch.float32, kv_cache: Byte | None = None
) -> dict[str, Any]:
    """Return the quantization_config of config.json. `schemes`: by our names; `dtype`: type of all other weights.

    Raises ValueError that names the weight if the format or transformers does not support its quantization.
    """
    theirs, shapes = ARCHITECTURES[architecture(config)], parameter_shapes(config)
    entries = list(counterparts(config))
    entry_by_name = {ours: entry for entry in entries for ours in entry.ours}
    for name, scheme in schemes.items():
        if entry_by_name[name].transposed:
            raise ValueError(
                f"{theirs.label} stores linear weights as [in, out], which compressed-tensors does not support. "
                "Instead, export the model to GGUF with a quantized type."
            )
        if theirs.label == "T5" and scheme.is_packed:
            raise ValueError(
                f"{scheme} is not supported for T5: transformers cannot load packed weights of it. "
                "Supported: int8 with activations int8, and fp8."
            )
        if config.architecture == "encoder_decoder" and scheme.is_unpacked_to_bfloat16:
            raise ValueError(
                f"{scheme} is not supported for {theirs.label}: it needs a bfloat16 model, "
                "in which transformers would also round the positions."
            )
        if scheme.is_unpacked_to_bfloat16 and dtype != torch.bfloat16:
            raise ValueError(
                f"{scheme.grid.kind} needs all other weights in torch.bfloat16 (got {dtype}), because transformers unpacks it to bfloat16."
            )
        _layout(entry_by_name[name], shapes, schemes, dtype)
    if kv_cache is not None and config.architecture != "decoder":
        raise ValueError(f"kv_cache {kv_cache} is supported only for decoders; the architecture is {config.architecture}.")
    by_module = {entry_by_name[name].module: scheme for name, scheme in schemes.items()}
    matrices = [entry.module for entry in entries if entry.theirs.endswith(".weight") and len(_their_shape(entry, shapes)) == 2]
    duplicates = [name.removesuffix(".weight") for name in theirs.duplicates(config) if name.endswith(".weight")]
    return packed.configuration(by_module, [name for name in (*matrices, *duplicates) if name not in by_module], kv_cache)


def _cache_scale_names(config: ModelConfig) -> list[tuple[str, str]]:
    """Return the Hugging Face names of the scales of each block's keys and values."""
    layers = [entry.module for entry in counterparts(config) for ours in entry.ours if ours.endswith(".attention.key.weight")]
    attentions = [layer.rpartition(".")[0] for layer in layers]
    return [(f"{attention}.k_scale", f"{attention}.v_scale") for attention in attentions]


class State(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by our names and in our shapes; each is read when it is accessed.

    A quantized weight is dequantized to float32.
    Raises ValueError if a tensor is missing or unknown, differs from the tensor that it must equal, or has a wrong type or shape.
    """

    def __init__(self, folder: Path, config: ModelConfig, quantization: packed.ParsedConfiguration | None = None):
        theirs = ARCHITECTURES[architecture(config)]
        self._files = {theirs.current_name(name): (path, name) for name, path in _tensor_files(folder).items()}
        self._entries = {ours: (entry, index) for entry in counterparts(config) for index, ours in enumerate(entry.ours)}
        self.schemes: dict[str, Scheme] = {}
        """Scheme of each quantized weight, by our name."""
        if quantization is not None:
            for ours, (entry, _) in self._entries.items():
                scheme = quantization.scheme_of(entry.module)
                if scheme is not None and f"{entry.module}.weight_scale" in self._files and entry.theirs.endswith(".weight"):
                    self.schemes[ours] = scheme
        shapes = parameter_shapes(config)
        self._layouts = {entry: _layout(entry, shapes, self.schemes, torch.float32) for entry, _ in self._entries.values()}
        cache_kind = quantization.kv_cache if quantization else None
        if cache_kind and config.architecture != "decoder":
            raise ValueError(f"{folder}: kv_cache_scheme is supported only for decoders; the architecture is {config.architecture}.")
        scales = _cache_scale_names(config) if cache_kind else []
        layout = _merged(self._layouts.values()) | dict.fromkeys(itertools.chain.from_iterable(scales), (torch.float32, (1,)))
        self._check_tensors(folder, config, theirs, layout)
        self.kv_cache = self._read_cache_scheme(folder, cache_kind, scales) if cache_kind else None
        """Quantization of the keys and values in the cache; None if they are not quantized."""

    def _check_tensors(self, folder: Path, config: ModelConfig, theirs: Architecture, layout: Layout) -> None:
        """Raise ValueError if the files' tensors differ from `layout` in name, dtype or shape, or if a duplicate differs."""
        wanted = set(layout)
        given = {name for name in self._files if name in wanted or not name.endswith(theirs.constants)}
        for duplicate, original in theirs.duplicates(config).items():
            if duplicate in given - wanted and original in given & wanted:
                if not torch.equal(self._read(duplicate), self._read(original)):
                    raise ValueError(f"{folder}: {duplicate} differs from {original}; they must be equal.")
                given.remove(duplicate)
        for name in given & set(theirs.zeros):
            if self._read(name).any():
                raise ValueError(f"{folder}: {name} is not zero; only zeros are supported.")
            given.remove(name)
        if not given & wanted and given <= {name.removeprefix(theirs.prefix) for name in wanted}:
            named = f"no name of a tensor begins with {theirs.prefix}"
            raise ValueError(f"{folder} holds {HEADLESS}: {named}. Save the model of {' or '.join(theirs.classes)}.")
        _check_names(given, wanted, str(folder))
        for tensor, (dtype, needed_shape) in layout.items():
            path, name = self._files[tensor]
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(name)
                shape, dtype_name = tuple(stored.get_shape()), stored.get_dtype()
            if shape != needed_shape:
                raise ValueError(f"{folder}: {tensor} has shape {list(shape)}; by config.json it must be {list(needed_shape)}.")
            dtype_names = [_DTYPE_NAMES[known] for known in (_DTYPES if dtype in _DTYPES else (dtype,))]
            if dtype_name not in dtype_names:
                raise ValueError(f"{folder}: {tensor} has type {dtype_name}; it must be {' or '.join(dtype_names)}.")

    def _read_cache_scheme(self, folder: Path, kind: Byte, names: list[tuple[str, str]]) -> CacheScheme:
        """Read the scales of the cached keys and values. `names`: of the two scales of each block."""
        scales = {name: self._read(name).item() for name in itertools.chain.from_iterable(names)}
        for name, scale in scales.items():
            if not 0 < scale < math.inf:
                raise ValueError(f"{folder}: {name} is {scale}; a scale must be finite and above 0.")
        return CacheScheme(kind, tuple((scales[key], scales[value]) for key, value in names))

    def _read(self, theirs: str) -> Tensor:
        path, name = self._files[theirs]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.schemes:
            return self.quantized(name).weight()
        entry, index = self._entries[name]
        tensor = self._read(entry.theirs)
        tensor = tensor.T if entry.transposed else tensor
        return tensor.chunk(len(entry.ours))[index].contiguous()

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor or, of a quantized weight, the first of its tensors."""
        entry, _ = self._entries[name]
        return self._files[next(iter(self._layouts[entry]))][0]

    def quantized(self, name: str) -> Quantized:
        """Return a weight that has a scheme as its stored codes."""
        entry, _ = self._entries[name]
        tensors = {tensor.removeprefix(f"{entry.module}."): self._read(tensor) for tensor in self._layouts[entry]}
        return packed.unpacked(tensors, self.schemes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load(folder: str | os.PathLike) -> tuple[ModelConfig, State]:
    """Return the configuration and the weights of a Hugging Face folder; each weight has our name and is read when it is accessed.

    Raises ValueError that names what is missing or not supported. Pickled weights are refused, because reading them can run code.
    """
    folder = Path(folder)
    config_json, files = _read_config_json(folder), _tensor_files(folder)
    try:
        theirs = ARCHITECTURES[model_type(config_json)]
        tensors = {theirs.current_name(name): path for name, path in files.items()}
        config = from_huggingface(theirs.corrected_by_tensors(config_json, tensors))
        quantization = packed.parse_configuration(config_json["quantization_config"]) if config_json.get("quantization_config") else None
    except (ValueError, TypeError, AttributeError) as error:  # the last two: a value has a wrong type
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return config, State(folder, config, quantization)


def decoder_start(folder: str | os.PathLike) -> int | None:
    """Return the folder's decoder_start_token_id: padding in published T5 and Marian models, mostly end of text in ours; else None."""
    return _read_config_json(Path(folder)).get("decoder_start_token_id")


def _read_config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a Hugging Face checkpoint: it has no config.json.")
    try:
        config_json = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors of Windows write a byte-order mark
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config_json, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return config_json


def _their_shape(entry: Counterpart, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if not entry.ours:
        return entry.zeros
    stacked = (sum(shapes[name][0] for name in entry.ours), *shapes[entry.ours[0]][1:])
    return stacked[::-1] if entry.transposed else stacked


def _layout(entry: Counterpart, shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme], dtype: torch.dtype) -> Layout:
    """Return the tensors of a file that hold an entry: the tensor itself or, if it is quantized, its codes, scales and so on."""
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


def _merged(layouts: Iterable[Layout]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: kind for layout in layouts for name, kind in layout.items()}


def _layout_bytes(layout: Layout) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())


def _tensors(
    entry: Counterpart, layout: Layout, state: Mapping[str, Tensor | Quantized], schemes: Mapping[str, Scheme]
) -> Iterator[Tensor]:
    """Yield the tensors of an entry in the order of `layout`."""
    if (scheme := _scheme_of(entry, schemes)) is not None:
        quantized = state[entry.ours[0]]
        assert isinstance(quantized, Quantized), f"{entry.ours[0]} has a scheme but no codes"
        tensors = {f"{entry.module}.{part}": tensor for part, tensor in packed.packed(quantized, scheme).items()}
    else:
        [(dtype, shape)] = layout.values()
        parts = [_unquantized(state[name]).detach().to("cpu", dtype) for name in entry.ours]
        stacked = torch.cat(parts) if parts else torch.zeros(shape, dtype=dtype)
        tensors = {entry.theirs: (stacked.T if entry.transposed else stacked).contiguous()}
    for name, (dtype, shape) in layout.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{' + '.join(entry.ours)} has shape {list(tensors[name].shape)}; by the configuration it must be {list(shape)}."
            )
        assert tensors[name].dtype == dtype, f"{name} is {tensors[name].dtype} and not {dtype}"
        if not is_finite(tensors[name]):
            limit = f"not finite, or above {torch.finfo(dtype).max:g}, the largest number of {str(dtype).removeprefix('torch.')}"
            raise ValueError(f"{' + '.join(entry.ours)} contains numbers that are {limit}.")
        yield tensors[name]


def _unquantized(tensor: Tensor | Quantized) -> Tensor:
    assert isinstance(tensor, Tensor), "a weight without a scheme is quantized"
    return tensor


def _check_names(given: set[str], wanted: set[str], owner: str) -> None:
    """Raise ValueError that lists up to 8 missing or unknown tensors of `owner`."""
    for problem, names in (("lacks tensors", wanted - given), ("has unknown tensors", given - wanted)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ValueError(f"{owner} {problem}: {', '.join(sorted(names)[:8])}{more}.")


def _split(layouts: Mapping[Counterpart, Layout], max_bytes: int) -> list[list[Counterpart]]:
    """Return the entries in order, split into shards of at most max_bytes; an entry larger than that is a shard of its own."""
    shards: list[list[Counterpart]] = [[]]
    used_bytes = 0
    for entry, layout in layouts.items():
        entry_bytes = _layout_bytes(layout)
        if shards[-1] and used_bytes + entry_bytes > max_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(entry)
        used_bytes += entry_bytes
    return shards


def _write_shard(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer needs all tensors at once."""
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


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each tensor. Raises ValueError if there are none or one cannot be read."""
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
    file_of: dict[str, Path] = {}
    for name in sorted(files):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{index} names {name}, which is not a file in {folder}.")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except Exception as error:  # safetensors' own error class has moved between versions
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
            file_of |= dict.fromkeys(file.keys(), path)
    return file_of
