"""The model of --init: the shape that its weights fix, and the settings of it that may change."""

import contextlib
import dataclasses
import json
from pathlib import Path

from model.config import ModelConfig

NOT_IN_THE_WEIGHTS = (
    "dropout",
    "document_mask",
    "initializer_range",
    "prefix_attention",
    "sliding_window",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_original_length",
)
"""Model settings that may change while the weights stay."""


def model_of_init(path: str, output: str) -> ModelConfig:
    """Return the model whose weights are at `path`. Raises UserError if there is none, or one that is not supported.

    If the run in `output` has started from `path`, the model of its record is returned, because the weights may be removed by then.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recipe = json.loads((Path(output) / "run.json").read_text(encoding="utf-8"))["recipe"]
        if recipe["init"] == path:
            return ModelConfig(**recipe["model"])
    from launch.checkpoints.initial import opened  # imports torch, which other settings do not need

    return opened(path).config


def differences_from_init(model: ModelConfig, path: str, output: str) -> dict[str, object]:
    """Return name -> value in init, for each setting of a model that does not fit the weights at `path`."""
    in_init, given = (dataclasses.asdict(config) for config in (model_of_init(path, output), model))
    # A pretrained encoder can become a classifier.
    free = {*NOT_IN_THE_WEIGHTS, "num_classes", "token_head", *(["sequence_length"] if model.positions != "learned" else [])}
    return {name: in_init[name] for name in given if name not in free and given[name] != in_init[name]}
