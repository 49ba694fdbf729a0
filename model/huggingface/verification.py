"""Comparison of an exported folder, as transformers reads it, with our network."""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.compression.activations import rounding
from model.compression.grids import Quantized
from model.compression.packed import CacheScheme, Scheme
from model.config import ModelConfig
from model.huggingface.choice import auto_class
from model.huggingface.folder import State
from model.layers import Stream
from model.loss import IGNORED, token_losses
from model.walk import Step, outputs

_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_SOURCE_TOKENS = 256  # of a folder that is compared before it is exported or compressed
_MAX_TOKENS = 4096  # longest compared sequence: attention over 131,072 tokens would take hours on a CPU


def verify(
    folder: str | os.PathLike,
    config: ModelConfig,
    state: Mapping[str, Tensor | Quantized],
    tolerance: float = 1e-4,
    schemes: Mapping[str, Scheme] | None = None,
    kv_cache: CacheScheme | None = None,
) -> float:
    """Compare an exported folder, as transformers reads it, with our network on random sequences, in float32.

    The sequences have full length (at most 4,096 tokens). If the network is not a decoder, one has padding; if it has token types, these
    are random too. `state`, `schemes` and `kv_cache` are those that were exported; weights that are not Quantized are rounded to the type
    of the folder's weights. Our network is loaded and run layer by layer: memory holds transformers' whole network, one layer and the
    logits. Returns the largest difference of a logit. If activations, keys or values are quantized, it is measured without their
    rounding. Raises RuntimeError if it is above `tolerance` x the largest logit (at least 1), or if transformers reports missing or
    unexpected tensors.
    """
    folder = Path(folder)
    dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
    stored = _AsStored(state, getattr(torch, dtype), getattr(torch, dtype))
    return _verify(_load_by_transformers(folder, config), folder, config, stored, schemes or {}, kv_cache, tolerance, _MAX_TOKENS)


def verify_source(folder: Path, config: ModelConfig, state: State, tolerance: float = 1e-4) -> float:
    """Compare a Hugging Face folder that we did not write, as transformers reads it, with `config` and `state`, as we read it.

    The sequences are short. Returns the largest difference of a logit. Raises ValueError if it is above `tolerance` x the largest logit (at
    least 1): then config.json has a setting that transformers reads and we do not know.
    """
    config_json = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    dtype = config_json.get("dtype") or config_json.get("torch_dtype") or "float32"
    stored = _AsStored(_Codes(state), getattr(torch, dtype), torch.float32)
    try:
        model = _load_by_transformers(folder, config, problems=("missing_keys", "mismatched_keys"))  # old files hold constants too
        return _verify(model, folder, config, stored, state.schemes, state.kv_cache, tolerance, _SOURCE_TOKENS)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises errors of any type
        reads = f"transformers {importlib.metadata.version('transformers')} does not read this model as we do"
        raise ValueError(f"{folder}: {reads}, so nothing is written: {error}") from error


def _verify(
    model: nn.Module,
    folder: Path,
    config: ModelConfig,
    stored: "_AsStored",
    schemes: Mapping[str, Scheme],
    kv_cache: CacheScheme | None,
    tolerance: float,
    most_tokens: int,
) -> float:
    """Return the largest difference of a logit for sequences of at most `most_tokens` tokens."""
    if kv_cache or any(scheme.activations != "none" for scheme in schemes.values()):
        # A difference in the last bit of float32, which any two implementations have, can round a number to another code: Marian's
        # logits differ by 0.7 % of the largest between two attention implementations of transformers. So the comparison with rounding
        # has a wide tolerance, and the one without rounding the usual tolerance.
        _compare(folder, model, config, stored, rounding(schemes, kv_cache), 0.1, most_tokens)
        for module in model.modules():
            module.quantization_enabled = False  # type: ignore[assignment]
    return _compare(folder, model, config, stored, rounding({}), tolerance, most_tokens)


def _compare(
    folder: Path,
    model: nn.Module,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    prepare: Callable[[Step], object],
    tolerance: float,
    most_tokens: int,
) -> float:
    """Return the largest difference of a logit between the two networks. `prepare` is applied to each of our layers before it runs."""
    inputs = _random_inputs(config, most_tokens)
    is_padding = inputs[-1 if config.architecture == "encoder_decoder" else 1] == 0
    differences = []
    with torch.inference_mode():
        for our_logits, their_logits in zip(_our_logits(config, state, prepare, inputs), _their_logits(model, config, inputs), strict=True):
            if our_logits.ndim == 3:  # logits of padding have no meaning
                our_logits[is_padding] = 0
                their_logits[is_padding] = 0
            largest = max(1.0, our_logits.abs().max().item())
            differences.append(our_logits.sub_(their_logits).abs_().max().item())
            if not differences[-1] <= tolerance * largest:
                raise RuntimeError(
                    f"{folder}: logits differ from ours by up to {differences[-1]:.3g}, "
                    f"more than {tolerance:g} x {largest:.3g}, the largest logit."
                )
    return max(differences)


def perplexity_by_transformers(
    folder: str | os.PathLike, config: ModelConfig, samples: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> float:
    """Return the perplexity of a decoder's folder, as transformers reads it, in float32: exp(mean loss of a target).

    Each sample is (tokens, targets), both [batch, seq], with IGNORED for positions without a target. Each row is one text, as it is in our
    network without a document mask. Raises RuntimeError if transformers reports missing or unexpected tensors.
    """
    model = _load_by_transformers(Path(folder), config, device)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.inference_mode():
        for tokens, targets in samples:
            logits = model(input_ids=tokens.to(device), use_cache=False).logits
            total += token_losses(logits, targets.to(logits.device)).double().sum().cpu()
            count += int((targets != IGNORED).sum())
    return math.exp(total / count)


class _Codes(Mapping[str, Tensor | Quantized]):
    """The weights of a folder by our names, the quantized ones as their codes."""

    def __init__(self, state: State):
        self._state = state

    def __getitem__(self, name: str) -> Tensor | Quantized:
        return self._state.quantized(name) if name in self._state.schemes else self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _AsStored(Mapping[str, Tensor]):
    """The weights that transformers computes with after reading the stored ones, by our names, in float32.

    `dtype` is the type of the scales of quantized weights, and `plain_dtype` that of the other weights.
    """

    def __init__(self, state: Mapping[str, Tensor | Quantized], dtype: torch.dtype, plain_dtype: torch.dtype):
        self._state, self._dtype, self._plain_dtype = state, dtype, plain_dtype

    def __getitem__(self, name: str) -> Tensor:
        stored = self._state[name]
        if not isinstance(stored, Quantized):
            return stored.to("cpu", self._plain_dtype).float()
        weight = stored.weight()
        if stored.grid.kind == "nvfp4":  # transformers unpacks to bfloat16, which cannot hold every product of the two scales
            return weight.bfloat16().float()
        return weight if stored.zero_point is None else weight.to(self._dtype).float()  # transformers dequantizes in the type of the scales

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def check_loading_report(report: Mapping[str, Collection], path: Path, problems: Sequence[str] = _PROBLEMS) -> None:
    """Raise RuntimeError if the loading_info of transformers reports missing, unexpected or mismatched tensors."""
    for kind in problems:
        if report.get(kind):
            raise RuntimeError(f"{path}: transformers reports {kind} {sorted(map(str, report[kind]))}.")


def hide_progress_bars() -> contextlib.AbstractContextManager:
    """Return a context that hides the progress bars of libraries unless standard error is a terminal; a log would fill with them."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _random_inputs(config: ModelConfig, most_tokens: int = _MAX_TOKENS) -> tuple[Tensor, ...]:
    """Return random inputs of our first layer. Encoders and encoder-decoders get two rows, the second with padding at its end."""
    generator = torch.Generator().manual_seed(0)
    length = min(config.sequence_length, most_tokens)
    rows = 1 if config.architecture == "decoder" else 2
    draw = lambda ids, length: torch.randint(ids, (rows, length), generator=generator)  # noqa: E731
    tokens, segments = draw(config.vocab_size, length), torch.ones(rows, length, dtype=torch.long)
    if config.architecture != "decoder":
        segments[1, max(1, length * 2 // 3) :] = 0
    if config.architecture == "encoder_decoder":
        target = draw(config.vocab_size, max(1, length * 3 // 4))
        return tokens, segments, target, torch.ones_like(target)
    return (tokens, segments, draw(config.token_types, length)) if config.token_types else (tokens, segments)


def _our_logits(
    config: ModelConfig, state: Mapping[str, Tensor], prepare: Callable[[Step], object], inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    [output] = outputs(dataclasses.replace(config, document_mask=False), state, [Stream.from_tensors(inputs)], prepare=prepare)
    if not isinstance(output, tuple):
        return [output]
    return list(output) if config.token_head else [output[1]]


def _their_logits(model: nn.Module, config: ModelConfig, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    tokens, segments, *others = inputs
    model_inputs = {"input_ids": tokens, "attention_mask": (segments != 0).long()}
    if config.architecture == "encoder_decoder":
        model_inputs["decoder_input_ids"] = others[0]
    elif others:
        model_inputs["token_type_ids"] = others[0]
    output = model(**model_inputs)
    if config.token_head and config.num_classes:
        return [output.prediction_logits, output.seq_relationship_logits]
    return [output.logits]


def _load_by_transformers(
    folder: Path, config: ModelConfig, device: torch.device | str = "cpu", problems: Sequence[str] = _PROBLEMS
) -> nn.Module:
    """Load a folder in float32 and eval mode. Raises RuntimeError if transformers reports one of the problems."""
    import transformers  # here, because the import takes seconds and only verification needs it

    config_json = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    their_config = transformers.CONFIG_MAPPING[config_json["model_type"]].from_dict(config_json)
    their_config.return_dict = True
    weights = [group["weights"] for group in getattr(their_config, "quantization_config", {}).get("config_groups", {}).values()]
    # compressed-tensors always unpacks E2M1 to bfloat16, so only a bfloat16 network runs.
    is_bfloat16 = any((one["type"], one["num_bits"]) == ("float", 4) for one in weights)
    if not all(one["symmetric"] for one in weights):
        # compressed-tensors creates no parameter for packed zero points; transformers reads them only if it dequantizes while loading.
        their_config.quantization_config["dequantize"] = True
    with hide_progress_bars():
        model, report = getattr(transformers, auto_class(config)).from_pretrained(
            folder,
            config=their_config,
            dtype=torch.bfloat16 if is_bfloat16 else torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device)
        if weights:  # the first forward pass unpacks them in place
            first = torch.zeros(1, 1, dtype=torch.long, device=device)
            with torch.no_grad():
                model(input_ids=first, **({"decoder_input_ids": first} if config.architecture == "encoder_decoder" else {}))
    check_loading_report(report, folder, problems)
    return nn.Module.float(model.eval()) if is_bfloat16 else model.eval()  # transformers' own float() refuses quantized models
