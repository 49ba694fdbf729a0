"""Newton-Schulz gives the bits of torch.optim.Muon in bf16, and in float32 singular values near 1 at any scale."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from launch.training.optimizers.newton_schulz import newton_schulz

SHAPES = [(32, 32), (32, 96), (96, 32), (48, 80), (256, 64), (1, 7), (7, 1)]


def random_matrices(rows: int, columns: int, number: int = 3) -> torch.Tensor:
    return torch.randn(number, rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_result_has_the_bits_of_torchs_muon(shape):
    matrices = random_matrices(*shape)
    theirs = [_zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7) for matrix in matrices]
    assert torch.equal(newton_schulz(matrices.bfloat16()), torch.stack(theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_result_is_the_polynomial_of_the_singular_values(shape):
    matrices = random_matrices(*shape).double()
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert float(values.max()) < 1.3 and 0.6 < float(values.median()) < 1.2
    expected = (left * values[:, None]) @ right
    assert float((newton_schulz(matrices.float()) - expected).abs().max()) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_of_a_matrix_does_not_matter(shape, dtype):
    matrices = random_matrices(*shape).to(dtype)
    scaled = torch.stack([matrices[0] * 2.0**-100, matrices[1] * 2.0**100, matrices[2]])
    assert torch.equal(newton_schulz(scaled), newton_schulz(matrices))
    if dtype == torch.float32:  # not a power of two, so entries are rounded
        assert float((newton_schulz(matrices * 1e-12) - newton_schulz(matrices)).abs().max()) < 1e-5


def test_matrices_do_not_affect_each_other_and_zero_stays_zero():
    matrices = random_matrices(32, 96)
    matrices[1] = 0
    assert not newton_schulz(matrices)[1].any()
    assert all(torch.equal(newton_schulz(matrices[i : i + 1])[0], newton_schulz(matrices)[i]) for i in range(3))
