"""A written folder as transformers reads it, compared with our network."""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.compression.activations import rounding
from model.compression.grids import Quantized
from model.compression.packed import CacheScheme, Scheme
from model.config import ModelConfig
from model.huggingface.choice import auto_class
from model.layers import Stream
from model.loss import IGNORED, token_losses
from model.walk import Step, outputs

_MOST_TOKENS = 4096  # of a sequence that is compared: attention over 131,072 tokens would take a CPU hours


def verify(
    folder: str | os.PathLike,
    config: ModelConfig,
    state: Mapping[str, Tensor | Quantized],
    tolerance: float = 1e-4,
    schemes: Mapping[str, Scheme] | None = None,
    kv_cache: CacheScheme | None = None,
) -> float:
    """Compare a written folder, as transformers reads it, with our network on random sequences, in float32.

    The sequences are of full length (at most 4,096 tokens), one of them with padding, with token types where there are some.
    `state`, `schemes` and `kv_cache` are those that were written; what is not Quantized is rounded as the folder's weights were. Our
    network is filled and run layer by layer, so that beside theirs, which transformers holds whole, memory takes a layer and the logits.
    Returns the largest difference of a logit; where something is rounded while the network runs, that without rounding it. Raises
    RuntimeError where it is above `tolerance` x the largest logit (at least 1), or where transformers misses a tensor or finds one too
    many.
    """
    folder, schemes = Path(folder), schemes or {}
    model = _read_by_transformers(folder, config)
    dtype = json.loads((folder / "config.json").read_text())["torch_dtype"]
    stored = _AsStored(state, getattr(torch, dtype))
    if kv_cache or any(scheme.activations != "none" for scheme in schemes.values()):
        # The last bit of float32, in which no two implementations agree, decides to which of two codes a number between them is
        # rounded: Marian's logits differ by 0.7 % of the largest between transformers' own two ways of attention. So this says
        # that rounding leads neither far off; without it they are compared as closely as any others.
        _compare(folder, model, config, stored, rounding(schemes, kv_cache), 0.1)
        for module in model.modules():
            module.quantization_enabled = False  # type: ignore[assignment]
    return _compare(folder, model, config, stored, rounding({}), tolerance)


def _compare(
    folder: Path, model: nn.Module, config: ModelConfig, state: Mapping[str, Tensor], prepare: Callable[[Step], object], tolerance: float
) -> float:
    """The largest difference of a logit between their network and ours, which is prepared as model.walk.outputs has it."""
    inputs = _random_inputs(config)
    is_padding = inputs[-1 if config.architecture == "encoder_decoder" else 1] == 0
    differences = []
    with torch.inference_mode():
        for our_logits, their_logits in zip(_ours(config, state, prepare, inputs), _theirs(model, config, inputs), strict=True):
            if our_logits.ndim == 3:  # what is said of padding is nothing
                our_logits[is_padding] = 0
                their_logits[is_padding] = 0
            largest = max(1.0, our_logits.abs().max().item())
            differences.append(our_logits.sub_(their_logits).abs_().max().item())
            if not differences[-1] <= tolerance * largest:
                raise RuntimeError(
                    f"{folder}: logits differ from ours by up to {differences[-1]:.3g}, "
                    f"more than {tolerance:g} x {largest:.3g}, the largest of them."
                )
    return max(differences)


def perplexity_by_transformers(
    folder: str | os.PathLike, config: ModelConfig, samples: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> float:
    """Of a decoder in a folder as transformers reads it, in float32: exp of the mean loss of a target.

    Each of `samples` is (tokens, targets), [batch, seq] both, the target IGNORED where there is none; a row is one text to them, as it
    is to ours without a document mask. Raises RuntimeError where transformers misses a tensor or finds one too many.
    """
    model = _read_by_transformers(Path(folder), config, device)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.inference_mode():
        for tokens, targets in samples:
            logits = model(input_ids=tokens.to(device), use_cache=False).logits
            total += token_losses(logits, targets.to(logits.device)).double().sum().cpu()
            count += int((targets != IGNORED).sum())
    return math.exp(total / count)


class _AsStored(Mapping[str, Tensor]):
    """What transformers makes of what was written, by our names, in float32."""

    def __init__(self, state: Mapping[str, Tensor | Quantized], dtype: torch.dtype):
        self._state, self._dtype = state, dtype

    def __getitem__(self, name: str) -> Tensor:
        stored = self._state[name]
        if not isinstance(stored, Quantized):
            return stored.to("cpu", self._dtype).float()
        weight = stored.weight()
        if stored.grid.kind == "nvfp4":  # the one product of E2M1 that bfloat16, to which it is unpacked, cannot hold
            return weight.bfloat16().float()
        return weight if stored.zero_point is None else weight.to(self._dtype).float()  # multiplied out in the type of the scales

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def refuse_incomplete(report: Mapping[str, Collection], place: Path) -> None:
    """Raise RuntimeError where transformers, which says so in its loading_info, missed a tensor or found one too many."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise RuntimeError(f"{place}: transformers reports {kind} {sorted(map(str, report[kind]))}.")


def without_bars() -> contextlib.AbstractContextManager:
    """What libraries draw on a terminal would fill a log with lines."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _random_inputs(config: ModelConfig) -> tuple[Tensor, ...]:
    """What our first layer reads: of an encoder and of an encoder-decoder two rows, the second with padding behind its tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(config.sequence_length, _MOST_TOKENS)
    rows = 1 if config.architecture == "decoder" else 2
    draw = lambda ids, length: torch.randint(ids, (rows, length), generator=generator)  # noqa: E731
    tokens, segments = draw(config.vocab_size, length), torch.ones(rows, length, dtype=torch.long)
    if config.architecture != "decoder":
        segments[1, max(1, length * 2 // 3) :] = 0
    if config.architecture == "encoder_decoder":
        target = draw(config.vocab_size, max(1, length * 3 // 4))
        return tokens, segments, target, torch.ones_like(target)
    return (tokens, segments, draw(config.token_types, length)) if config.token_types else (tokens, segments)


def _ours(config: ModelConfig, state: Mapping[str, Tensor], prepare: Callable[[Step], object], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    [said] = outputs(dataclasses.replace(config, document_mask=False), state, [Stream.from_tensors(inputs)], prepare=prepare)
    if not isinstance(said, tuple):
        return [said]
    return list(said) if config.token_head else [said[1]]


def _theirs(model: nn.Module, config: ModelConfig, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    tokens, segments, *others = inputs
    asked = {"input_ids": tokens, "attention_mask": (segments != 0).long()}
    if config.architecture == "encoder_decoder":
        asked["decoder_input_ids"] = others[0]
    elif others:
        asked["token_type_ids"] = others[0]
    output = model(**asked)
    if config.token_head and config.num_classes:
        return [output.prediction_logits, output.seq_relationship_logits]
    return [output.logits]


def _read_by_transformers(folder: Path, config: ModelConfig, device: torch.device | str = "cpu") -> nn.Module:
    """In float32 and in its eval mode; RuntimeError where a tensor is missing, or is one too many."""
    import transformers  # here, because it takes seconds to import and nothing else needs it

    stated = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    weights = [group["weights"] for group in getattr(stated, "quantization_config", {}).get("config_groups", {}).values()]
    # Compressed-tensors unpacks E2M1 to bfloat16 whatever the network is, so that only a network of bfloat16 runs.
    is_bfloat16 = any((one["type"], one["num_bits"]) == ("float", 4) for one in weights)
    if not all(one["symmetric"] for one in weights):
        # It makes no place for zero points that are packed: transformers reads them only where it multiplies the weights out at once.
        stated.quantization_config["dequantize"] = True
    with without_bars():
        model, report = getattr(transformers, auto_class(config)).from_pretrained(
            folder,
            config=stated,
            dtype=torch.bfloat16 if is_bfloat16 else torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device)
        if weights:  # unpacked where it is when it is first asked
            first = torch.zeros(1, 1, dtype=torch.long, device=device)
            with torch.no_grad():
                model(input_ids=first, **({"decoder_input_ids": first} if config.architecture == "encoder_decoder" else {}))
    refuse_incomplete(report, folder)
    return nn.Module.float(model.eval()) if is_bfloat16 else model.eval()  # its own float() refuses what was quantized
