"""Which architecture of transformers a network of ours is, and a config.json's."""

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
"""By their model_type."""


def architecture(config: ModelConfig) -> str:
    """Their model_type for a network of ours; raises ValueError naming every option that none of theirs has.

    Dropout, the document mask and the initialisation belong to training and stand in no one's way.
    """
    if config.architecture == "encoder":
        name = "bert"
    elif config.architecture == "encoder_decoder":
        name = "t5" if config.positions == "relative" else "marian"
    elif config.positions == "learned":
        name = "gpt2"
    else:
        name = "qwen3" if config.qk_norm else "llama"
    complaints = list(ARCHITECTURES[name].refusals(config))
    if complaints:
        raise ValueError("No Hugging Face architecture has this model.\n" + "\n".join(complaints))
    return name


def to_huggingface(config: ModelConfig, tokens: SpecialTokens = NO_TOKENS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The contents of config.json."""
    name = architecture(config)
    theirs = ARCHITECTURES[name]
    return {
        "architectures": [theirs.class_of(config)],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": tokens.end_of_text,
        "eos_token_id": tokens.end_of_text,
        "pad_token_id": tokens.padding,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4 reads this name, 5 both
    } | theirs.state(config, tokens)


def from_huggingface(stated: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json states; raises ValueError naming what we do not have."""
    theirs = ARCHITECTURES[model_type(stated)]
    complaints = [*theirs.unknown_features(stated), *theirs.unstated(stated)]
    if complaints:
        raise ValueError("\n".join(complaints))
    return theirs.read(stated)


def model_type(stated: Mapping[str, Any]) -> str:
    """What a config.json calls its architecture; raises ValueError where we do not have it."""
    name = stated.get("model_type")
    if name not in ARCHITECTURES:
        raise ValueError(f'model_type "{name}" is not one of {", ".join(ARCHITECTURES)}.')
    return name


def counterparts(config: ModelConfig) -> Iterator[Counterpart]:
    """Every tensor of theirs, in the order of our list of layers. A tied head is the embedding, and not named again."""
    return ARCHITECTURES[architecture(config)].counterparts(config)


def auto_class(config: ModelConfig) -> str:
    """The class of transformers that finds the class of this network."""
    return ARCHITECTURES[architecture(config)].auto_class(config)
