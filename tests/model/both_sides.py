"""Inputs for a network of ours, and the logits that transformers gives for them."""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import Stream

GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "biases": True}
BERT = {
    "architecture": "encoder",
    "norm": "layernorm",
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "positions": "learned",
    "activation": "gelu",
    "biases": True,
    "token_types": 2,
}
MARIAN = {
    "architecture": "encoder_decoder",
    "norm": "layernorm",
    "norm_position": "post",
    "positions": "sinusoidal",
    "activation": "relu",
    "biases": True,
}
T5 = {"architecture": "encoder_decoder", "positions": "relative", "activation": "geglu", "tie_embeddings": False, "norm_epsilon": 1e-6}


def random_inputs(config: ModelConfig) -> tuple[Tensor, ...]:
    """Return three rows of inputs; rows for an encoder end with 0, 5 and 9 positions of padding."""
    generator = torch.Generator().manual_seed(0)
    shape = 3, config.sequence_length
    tokens, segments = torch.randint(config.vocab_size, shape, generator=generator), torch.ones(shape, dtype=torch.long)
    if config.architecture == "decoder":
        return tokens, segments
    segments[1, -5:] = segments[2, -9:] = 0
    if config.architecture == "encoder":
        types = (torch.arange(shape[1]) > 7).long().expand(shape)
        return (tokens, segments, types) if config.token_types else (tokens, segments)
    target = torch.randint(config.vocab_size, (3, config.sequence_length - 6), generator=generator)
    return tokens, segments, target, torch.ones_like(target)


def samples_of(inputs: tuple[Tensor, ...]) -> list[Stream]:
    """Return each row of a network's inputs as the input of its first layer."""
    return [Stream.from_tensors([tensor[row : row + 1] for tensor in inputs]) for row in range(len(inputs[0]))]


def our_logits(outputs: Tensor | tuple[Tensor, Tensor], config: ModelConfig) -> list[Tensor]:
    """Return the token logits, the class logits, or both, from our network's outputs."""
    if not config.num_classes:
        return [outputs]
    return list(outputs) if config.token_head else [outputs[1]]


def their_logits(model: torch.nn.Module, config: ModelConfig, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the same logits from a model of transformers."""
    tokens, segments, *others = inputs
    model_inputs = {"input_ids": tokens, "attention_mask": (segments != 0).long()}
    if config.architecture == "encoder_decoder":
        model_inputs["decoder_input_ids"] = others[0]
    elif others:
        model_inputs["token_type_ids"] = others[0]
    output = model(**model_inputs)
    return [output.prediction_logits, output.seq_relationship_logits] if "prediction_logits" in output else [output.logits]


def without_padding(logits: list[Tensor], config: ModelConfig, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the logits without those of padding tokens, which have no meaning."""
    segments = inputs[3 if config.architecture == "encoder_decoder" else 1]
    return [one[segments != 0] if one.ndim == 3 else one for one in logits]
