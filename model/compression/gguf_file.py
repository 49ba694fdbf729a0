"""GGUF, the file format of llama.cpp: writing a decoder and reading it back.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. In the block types Q8_0 and Q4_0, 32 entries of a row share a float16
scale. The `gguf` package maps the tensor names of Hugging Face to those of the file. Matrices are [out, in].
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import huggingface
from model.config import ModelConfig
from model.huggingface import Counterpart
from model.huggingface.verification import check_loading_report, hide_progress_bars
from model.layers import Stream
from model.transformer import parameter_shapes
from model.walk import outputs

Kind = Literal["f32", "f16", "q8_0", "q4_0"]

_TYPE = gguf.GGMLQuantizationType
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3, "gpt2": gguf.MODEL_ARCH.GPT2}
_ROTARY_FACTORS = "rope_freqs.weight"
_LENGTH = struct.Struct("<Q")  # before each text
_MAX_TOKENS = 512  # longest compared sequence
# Keys of config.json that transformers does not read from a GGUF file; verification sets them. For gpt2 it counts the tokens, which
# verification skips.
_NOT_READ = ("vocab_size", "head_dim", "rope_parameters", "attention_bias", "mlp_bias", "n_positions", "n_inner", "activation_function")


def architecture(config: ModelConfig) -> str:
    """Return llama.cpp's name for an architecture. Raises ValueError that names every option that llama.cpp cannot express."""
    name = huggingface.architecture(config)
    if name not in _ARCHITECTURES:
        raise ValueError(f'GGUF supports decoders only; this is an {config.architecture.replace("_", "-")} ("{name}").')
    complaints = []
    if config.sliding_window is not None:
        complaints.append(f"model.sliding_window {config.sliding_window} is not supported by llama.cpp's {name}; it must be null.")
    if name == "gpt2" and config.activation != "gelu_tanh":
        complaints.append(f'model.activation "{config.activation}" is not supported by llama.cpp\'s gpt2; it must be "gelu_tanh".')
    if name == "qwen3" and config.rope_scaling == "llama3":
        complaints.append('model.rope_scaling "llama3" is not supported by llama.cpp\'s qwen3; it must be none, linear, ntk or yarn.')
    if complaints:
        raise ValueError("llama.cpp cannot express this model.\n" + "\n".join(complaints))
    return name


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One tensor of the file."""

    name: str
    source: Counterpart
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    heads: int = 0
    """Number of heads whose rows are stored with the rotary pairs (i, i + head/2) next to each other; 0: none."""

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file."""
        entries, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // entries * block_bytes


def size(config: ModelConfig, kind: Kind) -> int:
    """Return the bytes of a file's tensors. Raises ValueError if llama.cpp does not support the model."""
    return sum(tensor.num_bytes for tensor in _tensors(config, kind))


def write(config: ModelConfig, state: Mapping[str, Tensor], tokenizer: Mapping[str, Any], path: Path, kind: Kind) -> None:
    """Write `state`, by our names, into the new file `path`; one tensor of `state` is read at a time.

    Norms, biases and positions are float32 in every `kind`. With q4_0 the head (or the embedding tied to it) is q8_0, because
    llama.cpp also keeps it more precise. A matrix whose rows are not a multiple of 32 is f16 with both.
    `tokenizer` holds the metadata entries of the tokenizer. Raises ValueError if llama.cpp does not support the model, if `state` does not
    belong to it, if the disk has too little space, or if a weight is not finite or too large.
    """
    name = architecture(config)
    tensors = _tensors(config, kind)
    wanted = {ours for tensor in tensors for ours in tensor.source.ours}
    if wrong := sorted(wanted ^ set(state)):
        raise ValueError(f"The state has missing or unknown tensors: {', '.join(wrong[:8])}.")
    needed, free = size(config, kind), shutil.disk_usage(path.parent).free
    if free < needed:
        raise ValueError(f"{path.name} needs {needed:,} bytes; its disk has {free:,} free.")
    writer = gguf.GGUFWriter(path, name)
    metadata: dict[str, Any] = {"general.name": path.stem, "general.file_type": int(_FILE_TYPES[kind])}
    if kind in ("q8_0", "q4_0"):
        metadata |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    metadata |= {f"{name}.{key}": value for key, value in _shape(config, name).items()} | dict(tokenizer)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
    factors = _rotary_factors(config)
    if factors is not None:
        writer.add_tensor_info(_ROTARY_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tensors:
            writer.write_tensor_data(_encoded(tensor, state))
    except OSError as error:
        if error.errno is None and "requested and" not in str(error):
            raise
        # numpy does not keep the reason why it wrote fewer numbers than requested: the disk is full
        raise OSError(error.errno or errno.ENOSPC, error.strerror or os.strerror(errno.ENOSPC), str(path)) from error
    finally:
        writer.close()


class _Reader(gguf.GGUFReader):
    """The tensors and single values of a file; lists are skipped.

    The package would make an array of each token and each merge of the tokenizer, 30 seconds for a vocabulary of 128,256 ids.
    """

    def __init__(self, path: os.PathLike[str] | str, mode: Literal["r", "r+", "c"] = "r"):
        """Open the file. Raises ValueError if it is cut off or damaged."""
        try:
            super().__init__(path, mode)
        except (ValueError, LookupError, OverflowError, struct.error) as error:  # the package checks no end of the file
            raise ValueError(f"{path} is not a whole GGUF file: it is cut off or damaged ({error}).") from error

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[gguf.GGUFValueType]]:
        """Return the size of a value, and nothing of its content if it is a list."""
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order == "S":  # S: of a machine with the other byte order
            return super()._get_field_parts(orig_offs, raw_type)
        content = self.data.data
        kind, length = struct.unpack_from("<IQ", content, orig_offs)
        end = orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(length):
                end += 8 + _LENGTH.unpack_from(content, end)[0]
        else:
            end += length * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


class GGUFState(Mapping[str, Tensor]):
    """The weights of a GGUF file by our names, in float32; each is read and dequantized when it is accessed.

    All block types that the `gguf` package reads are supported, K-quants too. Raises ValueError if a tensor is missing, unknown, or has
    a shape that does not match `config`.
    """

    def __init__(self, path: Path, config: ModelConfig):
        stored = _tensors(config, "f32")
        self._read = {tensor.name: tensor for tensor in _Reader(path).tensors if tensor.name != _ROTARY_FACTORS}
        self._entries = {ours: (tensor, index) for tensor in stored for index, ours in enumerate(tensor.source.ours)}
        if wrong := sorted(set(self._read) ^ {tensor.name for tensor in stored}):
            raise ValueError(f"{path} has missing or unknown tensors: {', '.join(wrong[:8])}.")
        for tensor in stored:
            if (shape := tuple(map(int, reversed(self._read[tensor.name].shape)))) != tensor.shape:
                raise ValueError(f"{path}: {tensor.name} has shape {list(shape)}; by the configuration it is {list(tensor.shape)}.")

    def __getitem__(self, name: str) -> Tensor:
        tensor, index = self._entries[name]
        encoded = self._read[tensor.name]
        weight = torch.from_numpy(gguf.dequantize(encoded.data, encoded.tensor_type).reshape(tensor.shape).copy())
        if tensor.heads:
            weight = weight.unflatten(0, (tensor.heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        return weight.chunk(len(tensor.source.ours))[index].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def indivisible(config: ModelConfig, multiple: int) -> list[str]:
    """Return the names of matrices whose rows are not a multiple of `multiple` entries."""
    return [tensor.name for tensor in _tensors(config, "f16") if tensor.kind == _TYPE.F16 and tensor.shape[-1] % multiple]


def types(path: Path) -> Counter[str]:
    """Return the number of tensors of each type in a file."""
    return Counter(tensor.tensor_type.name.lower() for tensor in _Reader(path).tensors)


def verify(path: Path, config: ModelConfig, tolerance: float = 1e-4) -> float:
    """Compare a file, as transformers reads it, with our network with the weights of the file, in float32 on a random sequence.

    Returns the largest difference of a logit. Raises RuntimeError if it is above `tolerance` x the largest logit (at least 1), or if
    transformers does not find or does not read a tensor. transformers does not read rope scaling, biases and the head width from a GGUF
    file; these are set from `config`.
    """
    tokens = torch.randint(config.vocab_size, (1, min(config.sequence_length, _MAX_TOKENS)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = logits(config, GGUFState(path, config), tokens)
        largest = max(1.0, difference.abs().max().item())
        difference -= _logits_by_transformers(path, config, tokens)
    if not difference.abs().max().item() <= tolerance * largest:
        raise RuntimeError(
            f"{path}: logits of transformers differ from ours by up to {difference.abs().max().item():.3g}, "
            f"more than {tolerance:g} x the largest logit {largest:.3g}."
        )
    return difference.abs().max().item()


def logits(config: ModelConfig, state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Return the logits of a decoder, with one layer in memory at a time.  [batch, seq] -> [batch, seq, vocab]"""
    [output] = outputs(dataclasses.replace(config, document_mask=False), state, [Stream(tokens, torch.ones_like(tokens))])
    assert isinstance(output, Tensor)
    return output


@contextlib.contextmanager
def _our_reader() -> Iterator[None]:
    """Let transformers read files with _Reader while the context lasts."""
    original = gguf.GGUFReader
    gguf.GGUFReader = _Reader  # type: ignore[misc]
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


def _logits_by_transformers(path: Path, config: ModelConfig, tokens: Tensor) -> Tensor:
    import transformers  # here, because the import takes seconds and only verification needs it

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    loader: Any = transformers.AutoModelForCausalLM
    # transformers would read the file with the package's reader, twice, and only for the tokenizer's lists, which it does not need here.
    with hide_progress_bars(), _our_reader():
        their_config = transformers.AutoConfig.from_pretrained(path.parent, **source)
        for key, value in huggingface.to_huggingface(config).items():
            if key in _NOT_READ:
                setattr(their_config, key, value)
        model, report = loader.from_pretrained(path.parent, config=their_config, dtype=torch.float32, output_loading_info=True, **source)
    check_loading_report(report, path)
    num_stored = types(path).total() - (_rotary_factors(config) is not None)
    if num_stored != (num_read := len(list(model.parameters()))):  # transformers ignores unknown tensors without a message
        raise RuntimeError(f"{path} holds {num_stored} tensors; transformers has read {num_read}.")
    return model.eval()(tokens).logits


def _tensors(config: ModelConfig, kind: Kind) -> list[_Stored]:
    """Return the tensors of a file in the order of our list of layers."""
    name = architecture(config)
    shapes = parameter_shapes(config)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[name], config.num_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if name == "llama" else {}
    tensors = []
    for entry in huggingface.counterparts(config):
        base, _, part = entry.theirs.rpartition(".")
        gguf_name = names.get_name(base)
        assert gguf_name is not None, f"gguf has no name for {entry.theirs}"
        shape = entry.zeros or (sum(shapes[ours][0] for ours in entry.ours), *shapes[entry.ours[0]][1:])
        is_head = gguf_name == ("token_embd" if config.tie_embeddings else "output")
        stored = _block_type(kind, shape, is_head) if gguf_name != "position_embd" else _TYPE.F32
        tensors.append(_Stored(f"{gguf_name}.{part}", entry, shape, stored, heads.get(gguf_name.rpartition(".")[2], 0)))
    return tensors


def _block_type(kind: Kind, shape: tuple[int, ...], is_head: bool) -> gguf.GGMLQuantizationType:
    """Return the type in which a tensor of this shape is stored."""
    if len(shape) == 1 or kind == "f32":
        return _TYPE.F32
    if kind == "f16" or shape[-1] % gguf.GGML_QUANT_SIZES[_TYPE.Q8_0][0]:
        return _TYPE.F16
    return _TYPE.Q8_0 if kind == "q8_0" or is_head else _TYPE.Q4_0


def _encoded(tensor: _Stored, state: Mapping[str, Tensor]) -> NDArray:
    """Return the bytes of a tensor in the file. Raises ValueError for a wrong shape and for weights that its type cannot hold."""
    if not tensor.source.ours:
        return np.zeros(tensor.shape, np.float32)
    weight = torch.cat([state[ours].detach().to("cpu", torch.float32) for ours in tensor.source.ours])
    if tuple(weight.shape) != tensor.shape:
        raise ValueError(
            f"{' + '.join(tensor.source.ours)} has shape {list(weight.shape)}; by the configuration it is {list(tensor.shape)}."
        )
    limit = torch.finfo(torch.float32 if tensor.kind == _TYPE.F32 else torch.float16).max
    if not weight.abs().max().item() <= limit:
        above = f"not finite, or above {limit:g}, the largest number of {tensor.kind.name.lower()}"
        raise ValueError(f"{' + '.join(tensor.source.ours)} contains numbers that are {above}.")
    if tensor.heads:
        weight = weight.unflatten(0, (tensor.heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return gguf.quantize(weight.contiguous().numpy(), tensor.kind)


def _shape(config: ModelConfig, name: str) -> dict[str, int | float | str]:
    """Return the metadata entries of the network's shape, without the architecture's name before them."""
    assert config.num_key_value_heads and config.head_size and config.intermediate_size
    shape: dict[str, int | float | str] = {
        "vocab_size": config.vocab_size,
        "context_length": config.sequence_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    if name == "gpt2":
        return shape | {"attention.layer_norm_epsilon": config.norm_epsilon}
    shape |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(huggingface.to_huggingface(config)["rope_theta"]),
    }
    if config.rope_scaling in ("linear", "yarn"):
        shape |= {"rope.scaling.type": config.rope_scaling, "rope.scaling.factor": float(config.rope_factor)}
    if config.rope_scaling == "yarn":
        assert config.rope_original_length
        shape["rope.scaling.original_context_length"] = config.rope_original_length
    return shape


def _rotary_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Return the factor of each wavelength of Llama 3.1, which llama.cpp reads as a tensor.  -> [head / 2]"""
    if config.rope_scaling != "llama3":
        return None
    assert config.rope_original_length and config.head_size
    frequencies = config.rope_theta ** -(np.arange(0, config.head_size, 2) / config.head_size)
    turns = config.rope_original_length * frequencies / (2 * np.pi)
    kept = ((turns - 1) / (4 - 1)).clip(0, 1)
    return (1 / ((1 - kept) / config.rope_factor + kept)).astype(np.float32)
