"""Choice of the architecture of transformers for a network of ours or for a config.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from model.config import ModelConfig
from model.huggingface.architecture import NO_TOKENS, Architecture, Counterpart, SpecialTokens
from model.huggingface.bert import Bert
from model.huggingface.gpt2 import GPT2
from model.huggingface.llama import Llama, Qwen3
from model.huggingface.marian import Marian
from model.huggingface.t5 import T5

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": GPT2(),
    "llama": Llama(),
    "qwen3": Qwen3(),
    "bert": Bert(),
    "marian": Marian(),
    "t5": T5(),
}
"""Architectures by their model_type in config.json."""


def architecture(config: ModelConfig) -> str:
    """Return the model_type for a network of ours. Raises ValueError that names every option without a counterpart.

    Dropout, the document mask and the initialisation concern only training and are always accepted.
    """
    if config.architecture == "encoder":
        name = "bert"
    elif config.architecture == "encoder_decoder":
        name = "t5" if config.positions == "relative" else "marian"
    elif config.positions == "learned":
        name = "gpt2"
    else:
        name = "qwen3" if config.qk_norm else "llama"
    complaints = list(ARCHITECTURES[name].unsupported_options(config))
    if complaints:
        raise ValueError("No Hugging Face architecture can express this model.\n" + "\n".join(complaints))
    return name


def to_huggingface(config: ModelConfig, tokens: SpecialTokens = NO_TOKENS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the content of config.json. Raises ValueError that names every option without a counterpart."""
    name = architecture(config)
    theirs = ARCHITECTURES[name]
    return {
        "architectures": [theirs.transformers_class(config)],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        **tokens.ids,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4 reads this name, 5 both
    } | theirs.write_config(config, tokens)


def from_huggingface(config_json: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of a config.json. Raises ValueError that names everything that we do not support."""
    theirs = ARCHITECTURES[model_type(config_json)]
    complaints = [*theirs.unsupported_features(config_json), *theirs.missing_keys(config_json)]
    if complaints:
        raise ValueError("\n".join(complaints))
    return theirs.read_config(config_json)


def model_type(config_json: Mapping[str, Any]) -> str:
    """Return the model_type of a config.json. Raises ValueError if it is not supported."""
    name = config_json.get("model_type")
    if name not in ARCHITECTURES:
        raise ValueError(f'model_type "{name}" is not one of {", ".join(ARCHITECTURES)}.')
    return name


def counterparts(config: ModelConfig) -> Iterator[Counterpart]:
    """Return all Hugging Face tensors in the order of our list of layers. A tied head is the embedding and is not repeated."""
    return ARCHITECTURES[architecture(config)].counterparts(config)


def auto_class(config: ModelConfig) -> str:
    """Return the name of the Auto class of transformers that loads this network."""
    return ARCHITECTURES[architecture(config)].auto_class(config)
