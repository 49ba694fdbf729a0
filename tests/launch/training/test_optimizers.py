"""Each optimizer names the states that it has, and only its own file and the settings know it."""

import re

import pytest
import torch
from torch import nn

from launch.checkpoints.state import kinds_in
from launch.training.optimizers import OPTIMIZERS, optimizer_for
from launch.training.settings import OptimizerSettings
from tests.ranks import REPOSITORY

KNOW_ADAMW = {
    "launch/training/optimizers/adamw.py",
    "launch/training/optimizers/__init__.py",
    "launch/training/settings.py",
    "launch/checkpoints/state.py",  # what checkpoints without a record hold
    "launch/benchmarks/training_step_contenders.py",  # other implementations
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_the_states_that_it_names(name, model):
    optimizer = OPTIMIZERS[name](OptimizerSettings())
    built = optimizer.build(model)
    assert optimizer.name == name and optimizer.steps(built) == 0
    weight = model[0].weight
    created = {state: tensor.clone() for state, tensor in optimizer.state_of(built, weight).items()}
    assert all(not tensor.any() for tensor in created.values())
    built.state.clear()
    model(torch.ones(1, 3)).sum().backward()
    built.step()
    after = optimizer.state_of(built, weight)
    assert after.keys() == created.keys() and optimizer.steps(built) == 1
    assert [(state, after[state].element_size()) for state in optimizer.states] == list(optimizer.states.items())
    assert all(after[state].shape == weight.shape for state in optimizer.states)
    optimizer.set_steps(built, 7)
    assert optimizer.steps(built) == 7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_records_the_optimizer_that_wrote_it(name):
    optimizer = OPTIMIZERS[name](OptimizerSettings())
    assert kinds_in(optimizer.record()) == optimizer.kinds
    assert optimizer.checkpoint_bytes == 4 * len(optimizer.kinds)


def test_a_checkpoint_without_a_record_holds_the_states_of_adamw():
    adamw = OPTIMIZERS["adamw"](OptimizerSettings())
    assert kinds_in({}) == adamw.kinds == ("weight", "exp_avg", "exp_avg_sq") and adamw.state_bytes == 8


def test_the_default_optimizer_gives_the_weights_of_torchs_adamw(model):
    reference = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    reference.load_state_dict(model.state_dict())
    settings = OptimizerSettings(weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-6)
    ours = optimizer_for(settings).build(model)
    decayed = [reference[0].weight]
    others = [reference[0].bias, reference[1].weight, reference[1].bias]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6, fused=True)
    for step in range(5):
        for network, optimizer in ((model, ours), (reference, theirs)):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            optimizer.zero_grad()
            network(torch.linspace(-1, 1, 6).view(2, 3)).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_only_the_optimizers_own_file_and_the_settings_know_adamw():
    files = {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in (REPOSITORY / "launch").rglob("*.py")}
    assert {name for name, text in files.items() if re.search(r"adamw|exp_avg", text, re.I)} <= KNOW_ADAMW
