"""An exported folder as transformers reads it, compared with our network."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.huggingface.choice import auto_class
from model.transformer import layers, outputs_of

_MOST_TOKENS = 4096  # of a sequence that is compared: attention over 131,072 tokens would take a CPU hours


def verify(folder: str | os.PathLike, config: ModelConfig, state: Mapping[str, Tensor], tolerance: float = 1e-4) -> float:
    """Compare an exported folder, as transformers reads it, with our network on random sequences, in float32.

    The sequences are of full length (at most 4,096 tokens), one of them with padding, with token types where there are some.
    `state` is rounded as the folder's weights were; our network is filled and run layer by layer, so that beside theirs, which
    transformers holds whole, memory takes a layer and the logits. Returns the largest difference of a logit; raises RuntimeError
    where it is above `tolerance` x the largest logit (at least 1), or where transformers misses a tensor or finds one too many.
    """
    folder = Path(folder)
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["torch_dtype"])
    inputs = _random_inputs(config)
    is_padding = inputs[-1 if config.architecture == "encoder_decoder" else 1] == 0
    differences = []
    with torch.inference_mode():
        wanted = _theirs(folder, config, inputs)
        ours = _ours(config, state, dtype, inputs)
        for our_logits, their_logits in zip(ours, wanted, strict=True):
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


def _ours(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    passed = inputs
    for number, layer in enumerate(layers(dataclasses.replace(config, document_mask=False, dropout=0.0))):
        name = f"tied_modules.{layer.tied_key}" if layer.tied_key else str(number)
        with torch.device("meta"):
            module = layer.module(*layer.arguments)
        weights = {weight: state[f"{name}.{weight}"].to("cpu", dtype).float() for weight, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        module.eval()
        passed = module(passed) if layer.forward is None else layer.forward(module, passed)
    if not config.num_classes:
        return [outputs_of(config, passed)]
    return list(outputs_of(config, passed)) if config.token_head else [outputs_of(config, passed)[1]]


def _theirs(folder: Path, config: ModelConfig, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import transformers  # here, because it takes seconds to import and nothing else needs it

    loader = getattr(transformers, auto_class(config))
    model, report = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise RuntimeError(f"{folder}: transformers reports {kind} {sorted(map(str, report[kind]))}.")
    tokens, segments, *others = inputs
    asked = {"input_ids": tokens, "attention_mask": (segments != 0).long()}
    if config.architecture == "encoder_decoder":
        asked["decoder_input_ids"] = others[0]
    elif others:
        asked["token_type_ids"] = others[0]
    output = model.eval()(**asked)
    if config.token_head and config.num_classes:
        return [output.prediction_logits, output.seq_relationship_logits]
    return [output.logits]
