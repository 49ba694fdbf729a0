"""Each optimizer names the states that it has, and only its own folder and the settings know it."""

import copy
import re
import sys
import typing

import pytest
import torch
from torch import nn

from launch.checkpoints.state import kinds_in
from launch.training.optimizers import OPTIMIZERS, optimizer_for
from launch.training.optimizers.adamw import AdamW
from launch.training.optimizers.beta2 import beta2_of, change_beta2, count_step, sum_of
from launch.training.optimizers.elementwise import Elementwise
from launch.training.settings import OptimizerSettings, RunSettings
from tests.launch.training.optimizer_references import adamw_with_changing_beta2, attach_whole
from tests.ranks import REPOSITORY

KNOW_ADAMW = {
    "launch/training/settings.py",
    "launch/training/advice.py",  # the published values that it quotes are AdamW's
    "launch/checkpoints/state.py",  # what checkpoints without a record hold
}

BY_NAME = ("launch/training/optimizers/", "launch/benchmarks/")
"""Folders that have optimizers, or compare them by name."""


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def test_every_name_in_the_settings_has_an_optimizer():
    assert sorted(typing.get_args(typing.get_type_hints(OptimizerSettings)["name"])) == sorted(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_the_states_that_it_names(name, model):
    optimizer = OPTIMIZERS[name](OptimizerSettings())
    built = optimizer.build(model)
    assert optimizer.name == name and optimizer.steps(built) == 0
    weight = model[0].weight
    created = {state: tensor.clone() for state, tensor in optimizer.state_of(built, weight).items()}
    assert all(not tensor.any() for tensor in created.values())
    built.state.clear()
    attach_whole(optimizer, built, model)
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


def test_only_the_optimizers_own_folder_and_the_settings_know_adamw():
    files = {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in (REPOSITORY / "launch").rglob("*.py")}
    knowing = {name for name, text in files.items() if re.search(r"(?<!has_)adamw|exp_avg", text, re.I)}
    assert {name for name in knowing if not name.startswith(BY_NAME)} <= KNOW_ADAMW


def _train(optimizer, model, rates):
    """Take a step at each rate on a loss whose gradients have both signs."""
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        (model(torch.linspace(-1, 1, 6, dtype=model[0].weight.dtype).view(2, 3)) - 0.3).square().sum().backward()
        optimizer.step()


def _weights_after(settings, model, rates):
    network = copy.deepcopy(model)
    _train(optimizer_for(settings).build(network), network, rates)
    return list(network.parameters())


RATES = [0.01, 0.02, 0.03, 0.02, 0.01]


def test_adamw_with_own_steps_equals_torchs(model):
    """The decay is below the resolution of float64: it takes the path of cautious decay and changes nothing else."""
    settings = OptimizerSettings(weight_decay=1e-30, cautious_decay=True)
    ours, theirs = (_weights_after(one, model.double(), RATES) for one in (settings, OptimizerSettings(weight_decay=0.0)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_bias_correction_is_exact_after_changes_of_beta2(own, model):
    """The reference divides the mean of squares by the sum of its weights; 1 - beta2^t of the present beta2 gives other steps."""
    settings = OptimizerSettings(learning_rate=1.0, beta2=0.999)
    network, expected, uncorrected = (copy.deepcopy(model).double() for _ in range(3))
    optimizer = AdamW(settings)
    built, plain = (one(optimizer, net) for one, net in ((Elementwise.build if own else AdamW.build, network), (AdamW.build, uncorrected)))
    reference = adamw_with_changing_beta2(expected, settings)
    for step, beta2 in enumerate([0.99] * 4 + [0.9] * 3 + [0.999] * 4):
        change_beta2(built, beta2, lambda step=step: step)
        for group in plain.param_groups:
            group["betas"] = settings.beta1, beta2
        for net, take_step in ((network, built.step), (uncorrected, plain.step), (expected, lambda beta2=beta2: reference(0.01, beta2))):
            net.zero_grad()
            (net(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3) + step) - 0.3).square().sum().backward()
            for group in (*built.param_groups, *plain.param_groups):
                group["lr"] = 0.01
            take_step()
        count_step(built)
    far, near = (
        max(float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
        for net in (uncorrected, network)
    )
    assert near < 1e-12 < 1e-3 < far
    assert beta2_of(built) == 0.999 and sum_of(built) == pytest.approx(1 - 0.99**4 * 0.9**3 * 0.999**4)


def test_sgd_equals_torchs_with_decay_beside_the_momentum(model):
    reference = copy.deepcopy(model.double())
    theirs = torch.optim.SGD(reference.parameters(), lr=0.0, momentum=0.9)
    for rate in RATES:
        before = reference[0].weight.detach().clone()
        _train(theirs, reference, [rate])
        with torch.no_grad():
            reference[0].weight.sub_(before, alpha=rate * 0.3)
    ours = _weights_after(OptimizerSettings(name="sgd", momentum=0.9, weight_decay=0.3), model, RATES)
    for a, b in zip(ours, reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("decay, coefficient", [("times_rate", 0.3), ("independent", 0.3 / 0.02)])
@pytest.mark.parametrize("name", ["lion", "adamw", "sgd"])
def test_elementwise_optimizers_equal_their_formulas(name, decay, coefficient, cautious, model):
    settings = OptimizerSettings(
        name=name, learning_rate=0.02, weight_decay=0.3, decay=decay, cautious_decay=cautious, beta1=0.8, beta2=0.9, momentum=0.7
    )
    reference = copy.deepcopy(model.double())
    mean = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    square = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    for step, rate in enumerate(RATES, 1):
        reference.zero_grad()
        _train(torch.optim.SGD(reference.parameters(), lr=0.0), reference, [0.0])
        for index, parameter in enumerate(reference.parameters()):
            gradient, weight = parameter.grad, parameter.detach().clone()
            if name == "lion":
                update = torch.sign(0.8 * mean[index] + 0.2 * gradient)
                mean[index] = 0.9 * mean[index] + 0.1 * gradient
            elif name == "adamw":
                mean[index] = 0.8 * mean[index] + 0.2 * gradient
                square[index] = 0.9 * square[index] + 0.1 * gradient**2
                update = mean[index] / (1 - 0.8**step) / ((square[index] / (1 - 0.9**step)).sqrt() + 1e-8)
            else:
                mean[index] = update = 0.7 * mean[index] + gradient
            decays = (weight.ndim == 2) * ((update * weight >= 0).double() if cautious else 1.0)
            parameter.data = weight - rate * coefficient * decays * weight - rate * update
    for ours, theirs in zip(_weights_after(settings, model, RATES), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.data, theirs.data, rtol=0, atol=1e-12)


def test_a_checkpoint_of_another_optimizer_is_refused_by_both_names(tmp_path):
    adamw, lion = (OPTIMIZERS[name](OptimizerSettings(name=name)) for name in ("adamw", "lion"))
    assert adamw.refusal_of(tmp_path, {}) is None and adamw.refusal_of(tmp_path, adamw.record() | {"optimizer_name": "lamb"}) is None
    assert lion.refusal_of(tmp_path, adamw.record()) == (
        f"{tmp_path} holds the state of the optimizer adamw, which lion cannot use. Resume with optimizer.name adamw, or start another "
        "run from its weights with --init and another --output."
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_independent_decay_is_refused_where_a_trust_ratio_scales_it(name):
    complaints = RunSettings(train_steps=20, optimizer=OptimizerSettings(name=name, decay="independent")).complaints()
    assert bool(complaints) == hasattr(sys.modules[OPTIMIZERS[name].__module__], "trust_ratio")
    for complaint in complaints:
        assert complaint == (
            f"optimizer.decay independent is not supported with optimizer.name {name}, whose trust ratio scales the decay too. "
            "Use --optimizer.decay times_rate."
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_settings_name_the_optimizers_that_read_a_setting(name):
    read = {field for fields in OPTIMIZERS[name].json_parameters.values() for field in fields}
    for field, value in {"beta1": 0.5, "beta2": 0.5, "epsilon": 1e-3, "momentum": 0.5}.items():
        settings = RunSettings(train_steps=20, optimizer=OptimizerSettings(name=name, **{field: value}))
        assert any("has no effect" in complaint for complaint in settings.complaints()) == (field not in read)
