"""Where a network's zeros, or its bits, are best spent: one answer for each block."""

from torch import Tensor

from model.compression.statistics import InputStatistics


def outlier_ratio(weights: list[Tensor], statistics: list[InputStatistics], multiple: float = 5.0) -> float:
    """Share of a block's weights whose |weight| ||input|| is more than so many times the block's mean.  each weight [out, in]

    Yin et al. 2023, arXiv 2310.05175, equation 2.
    """
    scores = [weight.abs() * of.norms for weight, of in zip(weights, statistics, strict=True)]
    size = sum(score.numel() for score in scores)
    mean = sum(score.sum().item() for score in scores) / size
    return sum((score > multiple * mean).sum().item() for score in scores) / size


def owl_sparsities(outlier_ratios: list[float], sizes: list[int], sparsity: float, bound: float = 0.08) -> list[float]:
    """One for each block, the lower the more outliers it has; over all weights they are `sparsity`.

    Yin et al. 2023, arXiv 2310.05175, section 3.3: no two are further apart than twice the bound. sizes: weights in each block.
    """
    some = [ratio for ratio, size in zip(outlier_ratios, sizes, strict=True) if size] or outlier_ratios
    low, high = min(some), max(some)
    bound = min(bound, sparsity / 2, (1 - sparsity) / 2)  # so that none falls below 0 or rises above 1
    spared = [2 * bound * (ratio - low) / (high - low) if high > low else 0.0 for ratio in outlier_ratios]
    mean = sum(share * size for share, size in zip(spared, sizes, strict=True)) / sum(sizes)
    return [sparsity + mean - share for share in spared]


def choose(losses: list[dict[int, float]], sizes: list[dict[int, int]], budget_bytes: int) -> list[int]:
    """For each block one of its options (bits), so that the sum of losses is the least that the budget allows.

    Exact: of all sums of the blocks so far, those are kept that no other undercuts in both size and loss. They are few, because blocks
    are mostly of one size. Raises ValueError where nothing fits.
    """
    smallest = sum(min(options.values()) for options in sizes)
    if smallest > budget_bytes:
        raise ValueError(f"no choice of bits fits into {budget_bytes} bytes; the smallest takes {smallest}")
    kept: list[tuple[int, float, tuple]] = [(0, 0.0, ())]  # bytes, loss, (bits of the last block, (of the one before, ...))
    for of_bits, bytes_of_bits in zip(losses, sizes, strict=True):
        reached = [(size + bytes_of_bits[bits], loss + of_bits[bits], (bits, before)) for size, loss, before in kept for bits in of_bits]
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
