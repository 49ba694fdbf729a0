"""Tests of pruning: which weights become zero, how many, and how the others change."""

import pytest
import torch
from torch import Tensor

from model.compression.pruning import Sparsity, magnitude, sparsegpt, wanda
from model.compression.quantization import sweep
from model.compression.statistics import InputStatistics, output_error

HALF = Sparsity(0.5)


def statistics_of(inputs: Tensor) -> InputStatistics:
    return InputStatistics(len(inputs), inputs.T @ inputs, inputs.abs().mean(dim=0), inputs.abs().amax(dim=0))


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, InputStatistics]:
    """Return a weight and the statistics of correlated inputs of different sizes, with more columns than a batch of the sweep."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(800, 20, generator=generator) @ torch.randn(20, 192, generator=generator)
    inputs = (mixed + torch.randn(800, 192, generator=generator)) * torch.logspace(-0.5, 0.5, 192)[torch.randperm(192, generator=generator)]
    return torch.randn(40, 192, generator=generator), statistics_of(inputs)


def test_sweep_equals_optimal_brain_surgeon_column_by_column(layer):
    weight, statistics = layer
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    swept, damping = sweep(weight, statistics.second_moment, 0.01, lambda column, batch, diagonal: batch[0].round(), order)

    hessian = statistics.second_moment.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(192)
    expected, remaining = weight.double(), order.tolist()
    while remaining:  # optimal brain surgeon, equations 2 and 3 of GPTQ's paper, with a new inverse for each column
        inverse = hessian[remaining][:, remaining].inverse()
        error = expected[:, remaining[0]] - expected[:, remaining[0]].round()
        expected[:, remaining] -= error[:, None] * inverse[0] / inverse[0, 0]
        remaining.pop(0)
    assert damping == 0.01
    assert (swept == expected.round()).double().mean() > 0.999  # float32 may tip a tie
    assert torch.allclose(swept, swept.round())


@pytest.mark.parametrize("text", ["0.3", "0.5", "2:4", "4:8", "1:4"])
def test_each_method_makes_the_requested_number_of_zeros(layer, text):
    weight, statistics = layer
    sparsity = Sparsity.parse(text)
    for changed in (magnitude(weight, sparsity), wanda(weight, statistics, sparsity), sparsegpt(weight, statistics, sparsity)):
        zeros = changed.weight == 0
        assert changed.notes == ()
        if sparsity.pattern:
            assert (zeros.unflatten(1, (-1, sparsity.pattern[1])).sum(dim=2) == sparsity.pattern[0]).all()
    if not sparsity.pattern:
        assert int((magnitude(weight, sparsity).weight == 0).sum()) == round(sparsity.fraction * weight.numel())
        assert int((sparsegpt(weight, statistics, sparsity).weight == 0).sum()) == round(sparsity.fraction * weight.numel())
        assert ((wanda(weight, statistics, sparsity).weight == 0).sum(dim=1) == round(sparsity.fraction * 192)).all()


def test_number_of_zeros_is_exact_for_equal_weights():
    ones = torch.ones(6, 128)
    statistics = statistics_of(torch.randn(300, 128, generator=torch.Generator().manual_seed(0)))
    assert int((magnitude(ones, HALF).weight == 0).sum()) == 3 * 128
    assert int((wanda(torch.zeros(6, 128) + 1, statistics, HALF).weight == 0).sum()) == 3 * 128


def test_wanda_and_magnitude_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    statistics = statistics_of(torch.diag(torch.tensor([1.0, 1.0, 10.0, 100.0])))
    assert magnitude(weight, HALF).weight.tolist() == [[4, -3, 0, 0]]
    assert wanda(weight, statistics, HALF).weight.tolist() == [[0, 0, 2, 1]]


@pytest.mark.parametrize("text", ["0.7", "2:4"])
def test_sparsegpt_has_less_output_error_than_magnitude_and_wanda(layer, text):
    weight, statistics = layer
    sparsity = Sparsity.parse(text)
    error = lambda changed: output_error(changed.weight - weight, weight, statistics)  # noqa: E731
    by_size, by_contribution = error(magnitude(weight, sparsity)), error(wanda(weight, statistics, sparsity))
    assert error(sparsegpt(weight, statistics, sparsity)) < 0.7 * min(by_size, by_contribution)


def test_weights_of_zero_inputs_are_pruned_without_effect_on_others(layer):
    weight, statistics = layer
    inputs = torch.linalg.cholesky(statistics.second_moment.double() + 1e-3 * torch.eye(192)).T.float()
    inputs[:, 128:] = 0
    with_dead = sparsegpt(weight, statistics_of(inputs), HALF)
    without = sparsegpt(weight[:, :128], statistics_of(inputs[:, :128]), HALF)
    assert not with_dead.weight[:, 128:].any()
    assert torch.allclose(with_dead.weight[:, :128], without.weight, atol=1e-4)


def test_singular_hessian_is_damped_more_then_replaced_by_wanda(layer):
    weight, _ = layer
    ones = torch.ones(400, 192) * 30
    moment = ones.T @ ones
    moment[0, 1] = moment[1, 0] = moment[0, 1] * 1.15  # not a valid second moment: one eigenvalue is below zero
    damped = sparsegpt(weight, InputStatistics(400, moment, ones[0], ones[0]), HALF)
    assert damped.damping == pytest.approx(1.0)
    assert damped.notes == ()
    fallback = sparsegpt(weight, InputStatistics(400, moment * float("nan"), ones[0], ones[0]), HALF)
    assert fallback.damping is None
    assert "pruned by Wanda" in fallback.notes[0]


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.5", "half", "4:4", "5:4", "2:6", "2/4", ""])
def test_invalid_sparsity_is_refused(text):
    with pytest.raises(ValueError, match="neither a fraction above 0 and below 1"):
        Sparsity.parse(text)


def test_row_that_the_pattern_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="sparsity 2:4: a row of 6 entries is not a multiple of 4"):
        magnitude(torch.ones(2, 6), Sparsity.parse("2:4"))
