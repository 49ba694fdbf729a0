"""LAMB and LARS on one process are the formulas of their papers."""

import dataclasses
import importlib
import sys
import types

import pytest
import torch
from torch import nn

from data.command_line import UserError
from launch.checkpoints.state import ShardSlice
from launch.ranks.layout import Layout
from launch.training.optimizers import optimizer_for
from launch.training.optimizers.base import scalars_of
from launch.training.optimizers.pieces import Piece, Pieces
from launch.training.settings import OptimizerSettings
from tests.launch.training.optimizer_references import REFERENCES, attach_whole
from tests.packages import package_files


def attached(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return the torch optimizer of a model whose parameters are whole."""
    optimizer = optimizer_for(settings)
    built = optimizer.build(model)
    attach_whole(optimizer, built, model)
    return built


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 6))


def set_gradients(step: int, *models: nn.Module) -> None:
    """Give the models the gradients of a loss on the inputs of a step."""
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    for model in models:
        model.zero_grad()
        (model(inputs.to(model[0].weight.dtype)) - 1).square().mean().backward()


def set_rate(built: torch.optim.Optimizer, rate: float) -> None:
    for group in built.param_groups:
        group["lr"] = rate


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.0},
        {"beta1": 0.0, "epsilon": 1e-3, "weight_decay": 1.0, "momentum": 0.0},
        {"cautious_decay": True, "weight_decay": 1.0, "momentum": 0.5},
    ],
)
# In float32 a weight of 1 has steps of 1.19e-7.
@pytest.mark.parametrize(
    ("name", "rate", "dtype", "bound"),
    [("lamb", 0.01, torch.float32, 1.2e-7), ("lamb", 0.01, torch.float64, 1e-13), ("lars", 2.0, torch.float64, 1e-13)],
)
def test_an_optimizer_with_trust_ratios_is_the_formula_of_its_paper(name, rate, dtype, bound, changes):
    settings = dataclasses.replace(OptimizerSettings(name=name), **changes)
    ours, reference, start = (network().to(dtype) for _ in range(3))
    for model in (ours, reference):
        nn.init.zeros_(model[3].weight)  # a ratio of 1 in the first step
    built, take_step = attached(ours, settings), REFERENCES[name](reference, settings)
    for step in range(20):
        rate_of_step = rate * (step + 1) / 20
        set_gradients(step, ours, reference)
        set_rate(built, rate_of_step)
        built.step()
        take_step(rate_of_step)
    moved, apart = (
        [float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), other.parameters(), strict=True)]
        for other in (start, reference)
    )
    assert min(moved) > 1e-3 and max(apart) < bound


def test_reported_trust_ratios_and_changes_are_those_of_the_weights():
    settings = OptimizerSettings(name="lamb")
    model = network()
    built = attached(model, settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.ones(1, 12)).square().sum().backward()
    set_rate(built, 0.01)
    built.step()
    updates = optimizer_for(settings).report(built)
    assert list(updates) == ["0.weight", "3.weight"], "vectors have no trust ratio"
    for name, update in updates.items():
        change = float((model.get_parameter(name).detach() - before[name]).norm())
        assert update.weight_norm == pytest.approx(float(before[name].norm()), rel=1e-5)
        assert update.change_norm == pytest.approx(change, rel=1e-3) == pytest.approx(0.01 * update.weight_norm, rel=1e-3)
    scalars = scalars_of(updates)
    assert scalars["optimizer/relative_update"] == pytest.approx(0.01)
    ratios = sorted(update.trust_ratio for update in updates.values())
    assert [scalars[f"optimizer/trust_ratio_{name}"] for name in ("min", "median", "max")] == pytest.approx(
        [ratios[0], sum(ratios) / 2, ratios[1]]
    )


def test_sub_groups_that_differ_between_ranks_are_refused():
    halves = [ShardSlice("1.weight", (4, 2), ((0, 3), (0, 2)), 0, 6), ShardSlice("1.weight", (4, 2), ((3, 4), (0, 2)), 0, 2)]
    held = [Piece(one, sub_group, 0, 0, False) for sub_group, one in enumerate(halves)]
    with pytest.raises(UserError, match=r"sub_group_size divides parameters differently .* which share 1\.weight unevenly.* Use a larger"):
        Pieces([torch.zeros(6), torch.zeros(2)], held, Layout(1), 0, torch.device("cpu"))


@pytest.mark.slow
def test_lamb_is_that_of_timm(tmp_path, monkeypatch):
    package = types.ModuleType("timm_optim")  # the file alone: the whole package needs torchvision
    package.__path__ = [str(package_files(tmp_path, "timm==1.0.31") / "timm" / "optim")]
    monkeypatch.setitem(sys.modules, "timm_optim", package)
    settings = OptimizerSettings(name="lamb", weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-6)
    ours, reference = network().double(), network().double()
    built = attached(ours, settings)
    groups = [
        {"params": [reference[0].weight, reference[3].weight], "weight_decay": 0.3},
        {"params": [reference[0].bias, *reference[2].parameters(), reference[3].bias], "weight_decay": 0.0},
    ]
    theirs = importlib.import_module("timm_optim.lamb").Lamb(groups, betas=(0.8, 0.9), eps=1e-6, max_grad_norm=None)
    for step in range(20):
        set_gradients(step, ours, reference)
        for optimizer in (built, theirs):
            set_rate(optimizer, 0.01)
            optimizer.step()
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
