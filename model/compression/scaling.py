"""Scales that divide the inputs of a layer and multiply the columns of its weight, so that rounding has a smaller error."""

import torch
from torch import Tensor

from model.compression.grids import Grid, round_to
from model.compression.statistics import InputStatistics

_EXPONENTS = 20
_ROWS = 256


def smoothquant_scales(weights: list[Tensor], statistics: InputStatistics, strength: float = 0.5) -> Tensor:
    """Return max |input|^strength / max |weight|^(1 - strength) of each input, which moves outliers into the weights.  -> [in]

    Xiao et al. 2022, arXiv 2211.10438, equation 4. `weights`: all weights that read the input, each [out, in].
    """
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    return _usable(statistics.largest**strength / columns ** (1 - strength))


def awq_scales(weights: list[Tensor], statistics: InputStatistics, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (mean |input|)^exponent with the exponent, 0 to 0.95, that has the smallest output error after rounding.  -> [in]

    Lin et al. 2023, arXiv 2306.00978, equations 4 and 5. `weights`: all weights that read the input, each [out, in]. The error is computed
    with the second moment of the inputs, on about 256 rows of each weight.
    """
    rows = torch.cat([weight[:: max(1, len(weight) // _ROWS)] for weight in weights])
    best, least = torch.ones_like(statistics.magnitude), float("inf")
    for exponent in range(_EXPONENTS):
        scales = _usable(statistics.magnitude ** (exponent / _EXPONENTS))
        scales = _usable(scales / (scales.max() * scales.min()).sqrt())
        change = round_to(rows * scales, grid, scale_dtype).weight() / scales - rows
        error = ((change @ statistics.second_moment) * change).sum(dtype=torch.float64).item()
        if error < least:
            best, least = scales, error
    return best


def _usable(scales: Tensor) -> Tensor:
    """Replace scales that cannot divide or multiply, such as that of an input that is always zero, by 1."""
    return torch.where(scales.isfinite() & (scales > 0), scales, 1.0)
