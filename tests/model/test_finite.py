"""The check that weights are finite."""

import pytest
import torch

from model.finite import first_not_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_nan_and_infinite_values_are_found_in_every_float_type(dtype):
    assert is_finite(torch.ones(1000).to(dtype))
    for wrong in (float("nan"), float("inf"), -float("inf"))[: 1 if dtype == torch.float8_e4m3fn else 3]:  # e4m3fn has no infinity
        values = torch.ones(1000)
        values[-1] = wrong
        assert not is_finite(values.to(dtype))


def test_values_that_overflow_only_in_a_smaller_type_are_found():
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    assert is_finite(largest) and is_finite(torch.tensor([-65504.0]), torch.float16)
    assert not is_finite(largest, torch.bfloat16)
    assert not is_finite(torch.tensor([-70000.0]), torch.float16)


def test_integers_and_empty_tensors_are_finite():
    assert is_finite(torch.arange(3)) and is_finite(torch.empty(0))


def test_first_weight_that_is_not_finite_is_named():
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert first_not_finite({"a": good, "b": bad, "c": bad}) == "b"
    assert first_not_finite({"a": good}) is None
