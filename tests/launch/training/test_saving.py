"""What is refused before it becomes the state of a run."""

import types

import pytest
import torch

from data.command_line import UserError
from launch.checkpoints.state import WEIGHT, ShardSlice
from launch.ranks.collectives import Ranks
from launch.ranks.processes import Process
from launch.training import saving
from model.config import ModelConfig
from model.transformer import parameter_shapes

CONFIG = ModelConfig(vocab_size=16, sequence_length=8, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=16)


class Memory:
    """The state of a rank that holds every weight whole, without optimizer states."""

    optimizer = types.SimpleNamespace(kinds=(WEIGHT,))
    training_dtype = torch.float16

    def __init__(self) -> None:
        self.owned = [ShardSlice.of_whole(name, shape) for name, shape in parameter_shapes(CONFIG).items()]
        self.values = {one.name: torch.ones(one.count) for one in self.owned}

    def visit(self, slices):
        for one in slices:
            yield one, {WEIGHT: self.values[one.name]}

    def read(self, weights) -> None:
        weights.fill(self.values)

    def resume(self, steps: int) -> None:
        pass


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 70000.0])  # the last one is infinite in fp16
def test_initial_weights_that_are_not_finite_are_refused(value):
    ranks = Ranks(Process(0, 1, 0, 1), torch.device("cpu"))
    name = list(parameter_shapes(CONFIG))[3]

    def spoil(values: dict[str, torch.Tensor]) -> None:
        values[name][-1] = value

    assert saving.start_from(Memory(), CONFIG, ranks, types.SimpleNamespace(path="folder", fill=lambda values: None))
    message = rf"^init folder cannot be trained: {name} \(weight\) has values that are not finite in float16 on rank 0\."
    with pytest.raises(UserError, match=message):
        saving.start_from(Memory(), CONFIG, ranks, types.SimpleNamespace(path="folder", fill=spoil))
