"""Allocation of zeros or bits over the blocks of a network."""

from torch import Tensor

from model.compression.statistics import InputStatistics


def outlier_ratio(weights: list[Tensor], statistics: list[InputStatistics], multiple: float = 5.0) -> float:
    """Share of a block's weights whose |weight| ||input|| is more than `multiple` times the block's mean.  weights: each [out, in]

    Yin et al. 2023, arXiv 2310.05175, equation 2.
    """
    scores = [weight.abs() * inputs.norms for weight, inputs in zip(weights, statistics, strict=True)]
    size = sum(score.numel() for score in scores)
    mean = sum(score.sum().item() for score in scores) / size
    return sum((score > multiple * mean).sum().item() for score in scores) / size


def owl_sparsities(outlier_ratios: list[float], sizes: list[int], sparsity: float, bound: float = 0.08) -> list[float]:
    """Return a sparsity per block: lower for blocks with more outliers, and `sparsity` on average over all weights.

    Yin et al. 2023, arXiv 2310.05175, section 3.3: two values differ by at most twice the bound. `sizes`: number of weights per block.
    """
    counted = [ratio for ratio, size in zip(outlier_ratios, sizes, strict=True) if size] or outlier_ratios
    low, high = min(counted), max(counted)
    bound = min(bound, sparsity / 2, (1 - sparsity) / 2)  # keeps every value between 0 and 1
    spared = [2 * bound * (ratio - low) / (high - low) if high > low else 0.0 for ratio in outlier_ratios]
    mean = sum(share * size for share, size in zip(spared, sizes, strict=True)) / sum(sizes)
    return [sparsity + mean - share for share in spared]


def choose(losses: list[dict[int, float]], sizes: list[dict[int, int]], budget_bytes: int) -> list[int]:
    """Choose one option (a number of bits) per block, with the least sum of losses that the budget allows.

    The result is exact. Of all partial choices, only those are kept for which no other has a smaller size and a smaller loss; they are few,
    because most blocks have the same size. Raises ValueError if nothing fits.
    """
    smallest = sum(min(options.values()) for options in sizes)
    if smallest > budget_bytes:
        raise ValueError(f"no choice of bits fits into {budget_bytes} bytes; the smallest takes {smallest}")
    kept: list[tuple[int, float, tuple]] = [(0, 0.0, ())]  # bytes, loss, (bits of the last block, (of the one before, ...))
    for loss_by_bits, bytes_by_bits in zip(losses, sizes, strict=True):
        reached = [
            (size + bytes_by_bits[bits], loss + loss_by_bits[bits], (bits, before)) for size, loss, before in kept for bits in loss_by_bits
        ]
        kept = []
        for option in sorted(reached, key=lambda option: option[:2]):
            if option[0] <= budget_bytes and (not kept or option[1] < kept[-1][1]):
                kept.append(option)
    chosen: list[int] = []
    chain = kept[-1][2]
    while chain:
        bits, chain = chain
        chosen.insert(0, bits)
    return chosen
