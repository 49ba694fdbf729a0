"""Our decoder as a Hugging Face checkpoint, and back: GPT-2, Llama or Qwen3, with no code of ours needed to load it.

A folder holds config.json, generation_config.json and safetensors files (https://github.com/huggingface/safetensors#format).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import ModelConfig
from model.layers import Block, FinalNorm, Head, Positions, TokenEmbedding
from model.transformer import Transformer, layers

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """One tensor of theirs and what it is made of: ours, stacked [out, in] and perhaps transposed to [in, out].

    Where there is none of ours (a bias that we left out) theirs is `zeros` long and holds zeros.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    zeros: int = 0


def architecture(config: ModelConfig) -> str:
    """ "gpt2", "llama" or "qwen3"; raises ValueError naming every option that none of them has.

    Dropout, the document mask and the initialisation belong to training and stand in no one's way.
    """
    name, label = {
        "learned": ("gpt2", "GPT-2"),
        "rotary": ("qwen3", "Qwen3") if config.qk_norm else ("llama", "Llama"),
        "sinusoidal": ("", "any architecture"),
    }[config.positions]
    allowed: dict[str, tuple] = {
        "gpt2": {"norm": ("layernorm",), "activation": tuple(_GPT2_ACTIVATIONS), "qk_norm": (False,)},
        "llama": {"norm": ("rmsnorm",), "activation": ("swiglu",)},
        "qwen3": {"norm": ("rmsnorm",), "activation": ("swiglu",), "biases": (False,)},
        "": {"positions": ("learned", "rotary")},
    }[name] | {"norm_position": ("pre",)}
    complaints = []
    for option, values in allowed.items():
        if (value := getattr(config, option)) not in values:
            need = " or ".join(_spell(value) for value in values)
            complaints.append(f"model.{option} {_spell(value)} has no counterpart in {label}; it must be {need}.")
    if name == "gpt2" and config.num_key_value_heads != config.num_attention_heads:
        complaints.append(
            f"model.num_key_value_heads {config.num_key_value_heads} has no counterpart in GPT-2; "
            f"it must be num_attention_heads {config.num_attention_heads}."
        )
    if name == "gpt2" and config.head_size * config.num_attention_heads != config.hidden_size:
        complaints.append(
            f"model.head_size {config.head_size} has no counterpart in GPT-2; "
            f"times num_attention_heads {config.num_attention_heads} it must be hidden_size {config.hidden_size}."
        )
    if name == "llama" and config.hidden_size % config.num_attention_heads:
        complaints.append(
            f"model.hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}, as it must be in Llama; in Qwen3 (qk_norm) it need not."
        )
    if complaints:
        raise ValueError("No Hugging Face architecture has this model.\n" + "\n".join(complaints))
    return name


def to_huggingface(config: ModelConfig, end_of_text: int | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The contents of config.json. `end_of_text` is the id that ends a document; it also begins one."""
    name = architecture(config)
    stated: dict[str, Any] = {
        "architectures": [CLASSES[name]],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4 reads this name, 5 both
    }
    if name == "gpt2":
        return stated | {
            "n_positions": config.sequence_length,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "activation_function": _GPT2_ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_epsilon,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
    stated |= {
        "max_position_embeddings": config.sequence_length,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,  # transformers 4 reads this, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        "attention_bias": config.biases,
    }
    return stated | ({"mlp_bias": config.biases} if name == "llama" else {"use_sliding_window": False})


def from_huggingface(stated: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json states; raises ValueError naming what our decoder does not have."""
    name = stated.get("model_type")
    if name not in CLASSES:
        raise ValueError(f'model_type "{name}" is not one of {", ".join(CLASSES)}.')
    complaints = _unknown_features(name, stated)
    needed = {
        "gpt2": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
        "llama": ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    }
    complaints += [f'"{key}" is missing.' for key in needed["gpt2" if name == "gpt2" else "llama"] if key not in stated]
    if complaints:
        raise ValueError("\n".join(complaints))
    # The values behind stated.get are those of the transformers classes, which leave them out of old files.
    if name == "gpt2":
        activations = {theirs: ours for ours, theirs in _GPT2_ACTIVATIONS.items()}
        return ModelConfig(
            vocab_size=stated["vocab_size"],
            sequence_length=stated["n_positions"],
            hidden_size=stated["n_embd"],
            num_layers=stated["n_layer"],
            num_attention_heads=stated["n_head"],
            intermediate_size=stated.get("n_inner"),
            norm="layernorm",
            norm_epsilon=stated.get("layer_norm_epsilon", 1e-5),
            positions="learned",
            activation=activations[stated.get("activation_function", "gelu_new")],
            biases=True,
            tie_embeddings=stated.get("tie_word_embeddings", True),
            dropout=stated.get("resid_pdrop", 0.1),
            initializer_range=stated.get("initializer_range", 0.02),
        )
    return ModelConfig(
        vocab_size=stated["vocab_size"],
        sequence_length=stated["max_position_embeddings"],
        hidden_size=stated["hidden_size"],
        num_layers=stated["num_hidden_layers"],
        num_attention_heads=stated["num_attention_heads"],
        num_key_value_heads=stated.get("num_key_value_heads"),
        head_size=stated.get("head_dim") or (128 if name == "qwen3" else None),
        intermediate_size=stated["intermediate_size"],
        norm="rmsnorm",
        norm_epsilon=stated.get("rms_norm_eps", 1e-6),
        positions="rotary",
        rope_theta=_rope(stated).get("rope_theta", stated.get("rope_theta", 10000.0)),
        activation="swiglu",
        biases=stated.get("attention_bias", False),
        qk_norm=name == "qwen3",
        tie_embeddings=stated.get("tie_word_embeddings", False),
        initializer_range=stated.get("initializer_range", 0.02),
    )


def counterparts(config: ModelConfig) -> Iterator[Counterpart]:
    """Every tensor of theirs, in the order of our list of layers. A tied head is the embedding, and not named again."""
    name = architecture(config)
    block = 0
    for number, layer in enumerate(layers(config)):
        if layer.module is TokenEmbedding and layer.forward is None:
            ours = f"tied_modules.{layer.tied_key}" if layer.tied_key else str(number)
            yield Counterpart({"gpt2": "transformer.wte.weight"}.get(name, "model.embed_tokens.weight"), (f"{ours}.weight",))
        elif layer.module is Positions:
            yield Counterpart("transformer.wpe.weight", (f"{number}.weight",))
        elif layer.module is Block:
            yield from (_gpt2_block if name == "gpt2" else _llama_block)(config, number, block)
            block += 1
        elif layer.module is FinalNorm and name == "gpt2":
            yield from _gpt2_module("transformer.ln_f", f"{number}.norm", config, config.hidden_size)
        elif layer.module is FinalNorm:
            yield Counterpart("model.norm.weight", (f"{number}.norm.weight",))
        elif layer.module is Head:
            yield Counterpart("lm_head.weight", (f"{number}.weight",))


def export(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    folder: str | os.PathLike,
    end_of_text: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    complete: Callable[[Path], object] | None = None,
) -> None:
    """Write `state`, by our names, as a Hugging Face checkpoint into the new `folder`.

    One tensor of `state` is asked for at a time, so a Mapping that reads lazily never holds the model. All is written beside
    `folder` and renamed at the end; `complete` is called with the unfinished folder, to add a tokenizer or to check it.
    Raises ValueError where `folder` exists, where the architecture has no counterpart, and where `state` is not the model's.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; an export is written to a new folder.")
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"Cannot export as {dtype}; there are: {', '.join(str(known) for known in _DTYPE_NAMES)}.")
    stated = to_huggingface(config, end_of_text, dtype)
    shapes = _shapes(config)
    _check_names(set(state), set(shapes), "The model's state")
    shards = _split(list(counterparts(config)), shapes, dtype.itemsize, max_shard_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's own is for its owner alone
        index: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(unfinished / file, shard, state, shapes, dtype)
            index |= {entry.theirs: file for entry in shard}
        if len(shards) > 1:
            total_bytes = sum(torch.Size(_their_shape(entry, shapes)).numel() for shard in shards for entry in shard) * dtype.itemsize
            _write_json(unfinished / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": index})
        _write_json(unfinished / "config.json", stated)
        _write_json(unfinished / "generation_config.json", {key: stated[key] for key in ("bos_token_id", "eos_token_id")})
        if complete is not None:
            complete(unfinished)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class State(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder by our names and in our shapes, each read when it is asked for.

    Raises ValueError where a tensor is missing, unknown or of another shape than `config` says.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self._files = _files_of_tensors(folder)
        entries = list(counterparts(config))
        # The first GPT-2 checkpoints were saved without the outer module's name.
        prefix = "" if any(entry.theirs in self._files for entry in entries) else "transformer."
        self._entries = {
            ours: (dataclasses.replace(entry, theirs=entry.theirs.removeprefix(prefix)), place)
            for entry in entries
            for place, ours in enumerate(entry.ours)
        }
        wanted = {entry.theirs for entry, _ in self._entries.values()}
        # Masks and wavelengths are constants that old files hold; a tied head is the embedding's copy.
        constants = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
        given = {name for name in self._files if name in wanted or not name.endswith(constants)}
        if config.tie_embeddings and "lm_head.weight" in given - wanted:
            embedding = next(entry.theirs for entry, _ in self._entries.values())
            if not torch.equal(self._read("lm_head.weight"), self._read(embedding)):
                raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from {embedding}.")
            given.remove("lm_head.weight")
        _check_names(given, wanted, str(folder))
        shapes = _shapes(config)
        for entry, _ in self._entries.values():
            with safe_open(self._files[entry.theirs], framework="pt") as file:
                shape = tuple(file.get_slice(entry.theirs).get_shape())
            if shape != (right := _their_shape(entry, shapes)):
                raise ValueError(f"{folder}: {entry.theirs} is {list(shape)}; config.json says {list(right)}.")

    def _read(self, theirs: str) -> Tensor:
        with safe_open(self._files[theirs], framework="pt") as file:
            return file.get_tensor(theirs)

    def __getitem__(self, name: str) -> Tensor:
        entry, place = self._entries[name]
        tensor = self._read(entry.theirs)
        tensor = tensor.T if entry.transposed else tensor
        return tensor.chunk(len(entry.ours))[place].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load(folder: str | os.PathLike) -> tuple[ModelConfig, State]:
    """The configuration and the weights, by our names and read lazily, of a GPT-2, Llama or Qwen3 folder.

    Raises ValueError naming what is not there, what our decoder does not have, and pickled weights, which are code.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; a Hugging Face checkpoint has one.")
    try:
        config = from_huggingface(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:  # no JSON, or values that are no numbers
        raise ValueError(f"{path}: {error}") from error
    return config, State(folder, config)


def verify(folder: str | os.PathLike, config: ModelConfig, state: Mapping[str, Tensor], tolerance: float = 1e-4) -> float:
    """Compare an exported folder, as transformers reads it, with our model on one random sequence of full length, in float32.

    `state` is rounded as the folder's weights were. Returns the largest difference of a logit; raises RuntimeError where it is
    above `tolerance` x the largest logit (at least 1), or where transformers misses a tensor or finds one too many.
    """
    from transformers import AutoModelForCausalLM  # here, because it takes seconds to import and nothing else needs it

    folder = Path(folder)
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["torch_dtype"])
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise RuntimeError(f"{folder}: transformers reports {kind} {sorted(map(str, report[kind]))}.")
    ours = Transformer(dataclasses.replace(config, document_mask=False, dropout=0.0))
    with torch.inference_mode():
        for name, parameter in ours.named_parameters():
            parameter.copy_(state[name].to(dtype))
        tokens = torch.randint(config.vocab_size, (1, config.sequence_length), generator=torch.Generator().manual_seed(0))
        logits = ours.eval()(tokens, torch.ones_like(tokens))
        largest = max(1.0, logits.abs().max().item())
        difference = logits.sub_(theirs.eval()(tokens).logits).abs_().max().item()
    if not difference <= tolerance * largest:
        raise RuntimeError(
            f"{folder}: logits differ from ours by up to {difference:.3g}, more than {tolerance:g} x {largest:.3g}, the largest of them."
        )
    return difference


def _spell(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _rope(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    return stated.get("rope_parameters") or stated.get("rope_scaling") or {}


def _unknown_features(name: str, stated: Mapping[str, Any]) -> list[str]:
    """A sentence for each feature of a config.json that our decoder does not have."""
    complaints = [f'"{key}" is not supported.' for key in ("auto_map", "quantization_config") if stated.get(key)]
    if (stated.get("architectures") or [CLASSES[name]]) != [CLASSES[name]]:
        complaints.append(f"architectures is {stated['architectures']}; only {CLASSES[name]} is supported.")
    constants = {
        "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        "llama": {"hidden_act": "silu", "mlp_bias": stated.get("attention_bias", False)},
        "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    }[name]
    defaults = {"mlp_bias": False}
    for key, supported in constants.items():
        if stated.get(key, defaults.get(key, supported)) != supported:
            beside = " beside that attention_bias" if key == "mlp_bias" else ""
            complaints.append(f"{key} is {json.dumps(stated.get(key))}; only {json.dumps(supported)} is supported{beside}.")
    if name == "gpt2":
        activation = stated.get("activation_function", "gelu_new")
        if activation not in _GPT2_ACTIVATIONS.values():
            complaints.append(f'activation_function is "{activation}"; supported are {", ".join(_GPT2_ACTIVATIONS.values())}.')
        dropouts = {key: stated.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        if len(set(dropouts.values())) > 1:
            complaints.append(f"{dropouts} differ; only one dropout for all is supported.")
        return complaints
    rope = _rope(stated)
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        complaints.append(f'rope scaling "{kind}" is not supported.')
    if rope.get("partial_rotary_factor", stated.get("partial_rotary_factor", 1.0)) != 1.0:
        complaints.append("partial_rotary_factor is not supported.")
    if set(stated.get("layer_types") or ()) - {"full_attention"}:
        complaints.append(f"layer_types {sorted(set(stated['layer_types']))} are not supported, only full_attention.")
    return complaints


def _gpt2_module(
    theirs: str, ours: str | tuple[str, ...], config: ModelConfig, out_size: int, linear: bool = False
) -> Iterator[Counterpart]:
    """Weight and bias; GPT-2 keeps linear weights [in, out]."""
    names = (ours,) if isinstance(ours, str) else ours
    yield Counterpart(f"{theirs}.weight", tuple(f"{name}.weight" for name in names), transposed=linear)
    if config.biases:
        yield Counterpart(f"{theirs}.bias", tuple(f"{name}.bias" for name in names))
    else:
        yield Counterpart(f"{theirs}.bias", (), zeros=out_size)


def _gpt2_block(config: ModelConfig, number: int, block: int) -> Iterator[Counterpart]:
    hidden, theirs = config.hidden_size, f"transformer.h.{block}"
    fused = tuple(f"{number}.attention.{name}" for name in ("query", "key", "value"))
    yield from _gpt2_module(f"{theirs}.ln_1", f"{number}.attention_norm", config, hidden)
    yield from _gpt2_module(f"{theirs}.attn.c_attn", fused, config, 3 * hidden, linear=True)
    yield from _gpt2_module(f"{theirs}.attn.c_proj", f"{number}.attention.output", config, hidden, linear=True)
    yield from _gpt2_module(f"{theirs}.ln_2", f"{number}.feed_forward_norm", config, hidden)
    yield from _gpt2_module(f"{theirs}.mlp.c_fc", f"{number}.feed_forward.up", config, config.intermediate_size, linear=True)
    yield from _gpt2_module(f"{theirs}.mlp.c_proj", f"{number}.feed_forward.down", config, hidden, linear=True)


_LLAMA_LINEAR = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_LLAMA_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
_QWEN3_NORMS = {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}


def _llama_block(config: ModelConfig, number: int, block: int) -> Iterator[Counterpart]:
    for theirs, ours in (_LLAMA_NORMS | _LLAMA_LINEAR | (_QWEN3_NORMS if config.qk_norm else {})).items():
        yield Counterpart(f"model.layers.{block}.{theirs}.weight", (f"{number}.{ours}.weight",))
        if config.biases and theirs in _LLAMA_LINEAR:
            yield Counterpart(f"model.layers.{block}.{theirs}.bias", (f"{number}.{ours}.bias",))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}


def _their_shape(entry: Counterpart, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if not entry.ours:
        return (entry.zeros,)
    stacked = (sum(shapes[name][0] for name in entry.ours), *shapes[entry.ours[0]][1:])
    return stacked[::-1] if entry.transposed else stacked


def _their_tensor(entry: Counterpart, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    if not entry.ours:
        return torch.zeros(entry.zeros, dtype=dtype)
    stacked = torch.cat([state[name].detach().to("cpu", dtype) for name in entry.ours])
    return (stacked.T if entry.transposed else stacked).contiguous()


def _check_names(given: set[str], wanted: set[str], what: str) -> None:
    for problem, names in (("lacks", wanted - given), ("has unknown tensors", given - wanted)):
        if names:
            raise ValueError(f"{what} {problem}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}.")


def _split(entries: list[Counterpart], shapes: Mapping[str, tuple[int, ...]], item_bytes: int, max_bytes: int) -> list[list[Counterpart]]:
    """The entries in order, as many to a shard as fit in max_bytes, at least one."""
    shards: list[list[Counterpart]] = [[]]
    used_bytes = 0
    for entry in entries:
        entry_bytes = torch.Size(_their_shape(entry, shapes)).numel() * item_bytes
        if shards[-1] and used_bytes + entry_bytes > max_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(entry)
        used_bytes += entry_bytes
    return shards


def _write_shard(
    path: Path, entries: list[Counterpart], state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """A safetensors file, tensor by tensor, where the library's own writer would need all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        shape = _their_shape(entry, shapes)
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[entry.theirs] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries:
            tensor = _their_tensor(entry, state, dtype)
            if tuple(tensor.shape) != (right := _their_shape(entry, shapes)):
                raise ValueError(f"{' + '.join(entry.ours)} would be {list(tensor.shape)}; the configuration says {list(right)}.")
            file.write(tensor.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    with open(path, "w") as file:
        file.write(json.dumps(contents, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
