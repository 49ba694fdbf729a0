"""Quantized weights as tensors of a safetensors file, and back, as compressed-tensors stores them.

https://github.com/vllm-project/compressed-tensors, version 0.20.0; its compressors are the only definition of these formats.
A linear layer M has these tensors in index of M.weight [out, in]:

pack-quantized         weight_packed int32 [out, in bits / 32], weight_scale [out, groups], weight_shape int64 [2]; if asymmetric
                       also weight_zero_point int32 [out bits / 32, groups]
int-quantized          weight int8 [out, in], weight_scale [out, 1]
float-quantized        weight E4M3 [out, in], weight_scale [out, 1]
nvfp4-pack-quantized   weight_packed uint8 [out, in / 2], weight_scale E4M3 [out, in / 16], weight_global_scale float32 [1]
mxfp4-pack-quantized   weight_packed uint8 [out, in / 2], weight_scale E8M0 as uint8 [out, in / 32]

If keys and values are kept as codes, an attention layer A also has A.k_scale and A.v_scale [1].

An int32 holds consecutive codes from its lowest bit on, plus 2^(bits-1) so that none is negative; a code may begin in one int32 and end in
the next. A uint8 holds an even column in its low half. Scales of the first three have the type of the other weights in the file.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from model.compression.grids import Byte, Grid, Quantized

Activations = Literal["none", "int8", "fp8"]

_VERSION = "0.20.0"
_SCALE_TYPES = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The quantization of a linear layer. Raises ValueError for a combination that the format cannot store."""

    grid: Grid
    activations: Activations = "none"
    """Type to which the inputs are rounded, each token with its own scale, computed while the network runs."""

    def __post_init__(self) -> None:
        if self.activations == "int8" and self.grid != Grid("int", 8, None):
            raise ValueError(f"activations int8 need kind int, 8 bits, one scale per row (no group_size) and symmetric; got {self.grid}.")
        if self.activations == "fp8" and self.grid.kind != "fp8":
            raise ValueError(f"activations fp8 need kind fp8; got {self.grid}.")

    @property
    def format(self) -> str:
        """Name of the format in compressed-tensors."""
        if self.grid.kind != "int":
            return "float-quantized" if self.grid.kind == "fp8" else f"{self.grid.kind}-pack-quantized"
        return "pack-quantized" if self.activations == "none" else "int-quantized"

    @property
    def is_packed(self) -> bool:
        """True if several codes share an entry of a tensor whose name is not that of the weight."""
        return self.format.endswith("pack-quantized")

    @property
    def is_unpacked_to_bfloat16(self) -> bool:
        """True if compressed-tensors always unpacks the weight to bfloat16: such layers only run in a bfloat16 network."""
        return self.grid.kind in ("nvfp4", "mxfp4")

    def __str__(self) -> str:
        return str(self.grid) if self.activations == "none" else f"{self.grid}, inputs {self.activations}"


@dataclasses.dataclass(frozen=True)
class CacheScheme:
    """The quantization of a decoder's cached keys, rotated, and values: symmetric, with fixed scales."""

    kind: Byte
    scales: tuple[tuple[float, float], ...]
    """Scales of each block: (of the codes of its keys, of those of its values)."""

    def __str__(self) -> str:
        return f"keys and values {self.kind}"


def describe_schemes(schemes: Iterable[Scheme], kv_cache: CacheScheme | None) -> str:
    """Return the distinct schemes as one text for messages."""
    return "; ".join(dict.fromkeys(map(str, [*schemes, *([kv_cache] if kv_cache else [])])))


def layout(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each tensor that stores a weight [out, in], by its name after that of the layer. `dtype`: type of scales.

    Raises ValueError if groups do not divide a row.
    """
    grid, (rows, columns) = scheme.grid, shape
    groups = grid.num_groups(columns)
    scale = {"weight_scale": (_SCALE_TYPES.get(grid.kind, dtype), (rows, groups))}
    if scheme.is_unpacked_to_bfloat16:
        whole = {"weight_global_scale": (torch.float32, (1,))} if grid.kind == "nvfp4" else {}
        return {"weight_packed": (torch.uint8, (rows, columns // 2)), **scale, **whole}
    if scheme.format != "pack-quantized":
        return {"weight": (torch.int8 if grid.kind == "int" else torch.float8_e4m3fn, shape), **scale}
    words = lambda codes: math.ceil(codes * grid.bits / 32)  # noqa: E731
    zeros = {} if grid.symmetric else {"weight_zero_point": (torch.int32, (words(rows), groups))}
    return {"weight_packed": (torch.int32, (rows, words(columns))), **scale, "weight_shape": (torch.int64, (2,)), **zeros}


def packed(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors that `layout` names."""
    assert quantized.grid == scheme.grid, f"a weight on {quantized.grid} cannot be stored as {scheme}"
    codes, bits = quantized.codes, quantized.grid.bits
    tensors = {"weight_scale": quantized.scale}
    if scheme.is_unpacked_to_bfloat16:
        tensors["weight_packed"] = codes[:, ::2] | codes[:, 1::2] << 4
        if quantized.global_scale is not None:
            tensors["weight_global_scale"] = quantized.global_scale
    elif scheme.format == "pack-quantized":
        tensors |= {"weight_packed": _pack(codes, bits), "weight_shape": torch.tensor(codes.shape)}
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = _pack(quantized.zero_point.T, bits).T
    else:
        tensors["weight"] = codes
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def unpacked(tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
    """Return the weight that `packed` stored."""
    grid, scale = scheme.grid, tensors["weight_scale"]
    if scheme.is_unpacked_to_bfloat16:
        pairs = tensors["weight_packed"]
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        return Quantized(grid, codes, scale, global_scale=tensors.get("weight_global_scale"))
    if scheme.format != "pack-quantized":
        return Quantized(grid, tensors["weight"], scale)
    rows, columns = tensors["weight_shape"].tolist()
    codes = _unpack(tensors["weight_packed"], grid.bits, columns)
    zeros = None if grid.symmetric else _unpack(tensors["weight_zero_point"].T, grid.bits, rows).T.contiguous()
    return Quantized(grid, codes, scale, zeros)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into int32 words; 32 codes of b bits fill b words.  [rows, codes] int8 -> [rows, words] int32"""
    count = codes.shape[1]
    above_zero = codes.int() + 2 ** (bits - 1)
    above_zero = torch.nn.functional.pad(above_zero, (0, -count % 32)).unflatten(1, (-1, 32))
    words = above_zero.new_zeros(*above_zero.shape[:2], bits)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        words[..., word] |= above_zero[..., index] << shift
        if shift + bits > 32:
            words[..., word + 1] |= above_zero[..., index] >> (32 - shift)
    return words.flatten(1)[:, : math.ceil(count * bits / 32)]


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of each row of words.  [rows, words] int32 -> [rows, count] int8"""
    without_sign = words.long() & 0xFFFFFFFF
    without_sign = torch.nn.functional.pad(without_sign, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty(*without_sign.shape[:2], 32, dtype=torch.int8, device=words.device)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        code = without_sign[..., word] >> shift
        if shift + bits > 32:
            code |= without_sign[..., word + 1] << (32 - shift)
        codes[..., index] = (code & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.flatten(1)[:, :count].contiguous()


def configuration(schemes: Mapping[str, Scheme], others: Iterable[str], kv_cache: Byte | None = None) -> dict[str, Any]:
    """Return the quantization_config of config.json: the scheme of each linear layer, by Hugging Face's names, the layers without a
    scheme, and the type of cached keys and values.

    One scheme for all layers is written for "Linear", as llm-compressor does. Otherwise the layers of a block with the same scheme are
    one pattern, because engines that join query, key and value look up all three.
    """
    kinds = list(dict.fromkeys(schemes.values()))
    if len(kinds) > 1 and not all(kind.grid.symmetric for kind in kinds):
        raise ValueError(f"{'; '.join(map(str, kinds))}: either all or no layers can be asymmetric; transformers does not read a mixture.")
    groups = {}
    for number, kind in enumerate(kinds):
        targets = ["Linear"] if len(kinds) == 1 else list(_patterns(schemes, kind))
        inputs = None if kind.activations == "none" else _bytes_entry(kind.activations, "token", dynamic=True)
        groups[f"group_{number}"] = {
            "format": kind.format,
            "targets": targets,
            "weights": _weights_entry(kind.grid),
            "input_activations": inputs,
            "output_activations": None,
        }
    formats = {kind.format for kind in kinds}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(others),
        "kv_cache_scheme": None if kv_cache is None else _bytes_entry(kv_cache, "tensor", dynamic=False),
    }


def _patterns(schemes: Mapping[str, Scheme], kind: Scheme) -> Iterator[str]:
    """Yield the targets of a scheme: a pattern for a block whose layers all have it, names for other layers."""
    blocks: dict[str, list[str]] = {}
    for name in schemes:
        blocks.setdefault(re.match(r".*?\.\d+\.|", name)[0], []).append(name)  # type: ignore[index]
    for block, names in blocks.items():
        if all(schemes[name] == kind for name in names):
            yield f"re:{re.escape(block)}.*"
        else:
            yield from (name for name in names if schemes[name] == kind)


def _weights_entry(grid: Grid) -> dict[str, Any]:
    strategy = "channel" if grid.group_size is None else "tensor_group" if grid.kind == "nvfp4" else "group"
    entry = {
        "num_bits": grid.bits,
        "type": "int" if grid.kind == "int" else "float",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group_size,
        "dynamic": False,
    }
    return entry | ({"scale_dtype": str(_SCALE_TYPES[grid.kind])} if grid.kind in _SCALE_TYPES else {})


def _bytes_entry(kind: Byte, strategy: str, dynamic: bool) -> dict[str, Any]:
    """Return the entry for numbers that are rounded while the network runs."""
    number = "int" if kind == "int8" else "float"
    return {"num_bits": 8, "type": number, "symmetric": True, "strategy": strategy, "group_size": None, "dynamic": dynamic}


@dataclasses.dataclass(frozen=True)
class ParsedConfiguration:
    """A quantization_config that was parsed."""

    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    """Each scheme with its targets: "Linear", names of linear layers, or patterns after "re:"."""
    ignore: tuple[str, ...]
    """Linear layers without a scheme, as targets."""
    kv_cache: Byte | None
    """Type of cached keys and values; None if they are not quantized."""

    def scheme_of(self, layer: str) -> Scheme | None:
        """Return the scheme of a linear layer, by Hugging Face's name; None if it has none."""
        if any(_matches(layer, name) for name in self.ignore):
            return None
        return next((scheme for targets, scheme in self.schemes if any(_matches(layer, target) for target in targets)), None)


def _matches(layer: str, target: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target in ("Linear", layer)


def parse_configuration(configuration_json: Mapping[str, Any]) -> ParsedConfiguration:
    """Parse the quantization_config of a config.json. Raises ValueError that names what is not supported."""
    if (method := configuration_json.get("quant_method")) != "compressed-tensors":
        raise ValueError(f'quantization_config: quant_method "{method}" is not supported, only "compressed-tensors".')
    if (status := configuration_json.get("quantization_status", "compressed")) != "compressed":
        raise ValueError(f'quantization_config: quantization_status "{status}" is not supported, only "compressed".')
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        if configuration_json.get(key) and configuration_json[key] != {"format": "dense"}:
            raise ValueError(f"quantization_config: {key} is not supported.")
    schemes = []
    for name, group in (configuration_json.get("config_groups") or {}).items():
        if not isinstance(group, Mapping):
            raise ValueError(f"quantization_config: {name} names a preset; only groups that are written out are supported.")
        scheme = _scheme_of(name, group)
        if (given_format := group.get("format") or configuration_json.get("format")) != scheme.format:
            raise ValueError(f'quantization_config: format "{given_format}" of {name} is not supported; {scheme} is "{scheme.format}".')
        schemes.append((tuple(group["targets"]), scheme))
    if not schemes:
        raise ValueError("quantization_config has no config_groups; keys and values alone are not supported.")
    kv_cache: Byte | None = None
    if cache := configuration_json.get("kv_cache_scheme"):
        kv_cache = _byte_type(cache)
        _check_supported("kv_cache_scheme", cache, _bytes_entry(kv_cache, "tensor", dynamic=False))
    return ParsedConfiguration(tuple(schemes), tuple(configuration_json.get("ignore") or ()), kv_cache)


def _byte_type(entry: Mapping[str, Any]) -> Byte:
    return "int8" if entry.get("type", "int") == "int" else "fp8"


def _scheme_of(name: str, group: Mapping[str, Any]) -> Scheme:
    inputs = group.get("input_activations")
    activations: Activations = "none"
    if inputs is not None:
        activations = _byte_type(inputs)
        _check_supported(f"{name}.input_activations", inputs, _bytes_entry(activations, "token", dynamic=True))
    if group.get("output_activations"):
        raise ValueError(f"quantization_config: {name}.output_activations is not supported.")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"quantization_config: {name} has no weights.")
    bits, size, symmetric = weights.get("num_bits", 8), weights.get("group_size"), weights.get("symmetric", True)
    if weights.get("type", "int") == "int":
        kind: Any = "int"
    elif bits == 8:
        kind = "fp8"
    else:
        kind = "nvfp4" if weights.get("strategy") == "tensor_group" else "mxfp4"
    try:
        scheme = Scheme(Grid(kind, bits, None if size == -1 else size, symmetric), activations)
    except ValueError as error:
        raise ValueError(f"quantization_config: {name} is not supported: {error}") from error
    _check_supported(f"{name}.weights", weights, _weights_entry(scheme.grid))
    if weights.get("actorder") in ("group", "dynamic"):
        raise ValueError(f'quantization_config: {name}.weights has actorder "{weights["actorder"]}", which is not supported.')
    return scheme


def _check_supported(section: str, entry: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise ValueError if a key of a section has another value than the supported one."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    for key, value in supported.items():
        given = entry.get(key, defaults.get(key))
        if given != value and not (key == "group_size" and given == -1) and not (key == "scale_dtype" and given is None):
            needed = json.dumps(value)
            raise ValueError(f"quantization_config: {key} of {section} is {json.dumps(given)}; with the other keys it must be {needed}.")
