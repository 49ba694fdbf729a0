"""Newton-Schulz iteration: the orthogonal matrix near a given one, from matrix products alone.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Iterations and coefficients are those of torch.optim.Muon. On a CPU,
the results in bf16 have the same bits, except for products of 16 x 16 x 16 or less, for which torch uses another kernel in a batch.
"""

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LEAST_NORM = 1e-7
"""Divisor of a matrix that is 0. Any other has a norm of at least 0.5 once it is scaled."""


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return U S' V^T for each matrix U S V^T, computed in the type of `matrices`: S' has values near 1.  [n, rows, columns] -> same

    The result does not depend on the scale of a matrix, however small. A matrix that is 0 stays 0.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices
    x = x * _power_of_two(x)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > columns else x


def _power_of_two(matrices: Tensor) -> Tensor:
    """Return for each matrix the power of two that brings its largest entry into [0.5, 1).  [n, rows, columns] -> [n, 1, 1]

    Multiplying by it is exact. Without it the squares of gradients below 1e-19 would be 0 in float32, and _LEAST_NORM would shrink the
    update of those below it.
    """
    largest = torch.amax(matrices.abs(), dim=(-2, -1), keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.frexp(largest).mantissa / largest).to(matrices.dtype)
