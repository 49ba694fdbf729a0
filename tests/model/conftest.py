import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer


@pytest.fixture
def tiny():
    """A function that returns a small configuration; keywords change it."""

    def build(**changes) -> ModelConfig:
        settings = {"vocab_size": 61, "sequence_length": 24, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
        return ModelConfig(**(settings | changes))

    return build


@pytest.fixture
def randomise():
    """A function that changes every parameter: initial zeros and ones would hide a forgotten bias or gain."""

    def move(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return module.eval()

    return move


@pytest.fixture
def network(randomise):
    """A function that returns the network of a configuration in eval mode, with no parameter at its initial value."""
    return lambda config: randomise(Transformer(config))
