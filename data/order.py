"""Which sample comes when: pure arithmetic, so that the state of the reader is one integer, the step."""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

_MOST_PARTS = 1 << 16
"""Parts of a blend's period: shares that differ by less than one of them are not told apart."""


class Blend:
    """Which sample of which source comes at each position of one endless row: a pure function, in memory that no size changes.

    `weights` are shares of samples, and so of tokens, for all samples are equally long; None takes the sizes. They become whole
    parts of a period by the largest remainder (Hamilton's method). Inside it the source comes that lags most behind its share, so
    that of k sources none is ever more than 1 - 1/k samples ahead, nor more than 1/2 + 1/3 + ... + 1/k behind (Adler et al. 2003,
    "A proportionate fair scheduling rule with good worst-case performance").
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)
        self.seed = seed
        self.shares = _shares(sizes, weights)
        """Of all samples, as asked for."""
        self.parts = _whole_parts(self.shares, weights)
        """Samples of each source in a period.  [sources]"""
        self._order = _by_largest_lag(self.parts)
        self._before = np.empty_like(self._order)  # how often the source of a place came in the period before it
        for source, part in enumerate(self.parts):
            self._before[self._order == source] = np.arange(part)

    def draw(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Source, epoch of that source, and sample of it, at each position.  [n] -> [n], [n], [n]

        An epoch of a source has each of its samples once, in an order of its own; the next begins where it ends.
        """
        periods, places = np.divmod(positions, len(self._order))
        sources = self._order[places]
        epochs, samples = np.divmod(periods * self.parts[sources] + self._before[places], self.sizes[sources])
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
            chosen = (sources == source) & (epochs == epoch)
            samples[chosen] = permute(samples[chosen], int(self.sizes[source]), self.seed, epoch, source)
        return sources, epochs, samples

    def counts(self, positions: int) -> NDArray[np.int64]:
        """Samples that the first so many positions take from each source.  -> [sources]"""
        periods, places = divmod(positions, len(self._order))
        return periods * self.parts + np.bincount(self._order[:places], minlength=len(self.parts))

    def epochs(self, positions: int) -> NDArray[np.float64]:
        """How often the first so many positions read each source.  -> [sources]"""
        return self.counts(positions) / self.sizes


def rank_share(samples: NDArray[np.int64], micro_batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """The part of a global batch that a rank computes.  [global_batch_size] -> [accumulation, micro_batch_size]

    The batch is dealt out a micro-batch at a time, to rank 0, 1, ... of the first accumulation step, then of the second.
    """
    assert len(samples) % (micro_batch_size * world) == 0, (len(samples), micro_batch_size, world)
    return samples.reshape(-1, world, micro_batch_size)[:, rank]


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int, source: int = 0) -> NDArray[np.int64]:
    """Where each of the positions of [0, size) goes in the shuffle that (seed, epoch, source) picks; size up to 2**62.  [n] -> [n]

    A Feistel network on the next power of four, walked until it is back inside (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"): a permutation of any size in constant memory.
    """
    name = f"{seed} {epoch} {source}" if source else f"{seed} {epoch}"
    keys = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=64).digest(), dtype="<u8")
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    shuffled = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := shuffled >= size).any():
        shuffled[outside] = _feistel(shuffled[outside], half_bits, keys)
    return shuffled.astype(np.int64)


def _shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[Fraction]:
    """What each source is of the whole: exactly the decimals that were written."""
    assert len(sizes) and all(size > 0 for size in sizes), sizes
    if weights is None:
        return [Fraction(int(size), int(sum(sizes))) for size in sizes]
    if len(weights) != len(sizes):
        raise UserError(f"data.weights has {len(weights)} weights for {len(sizes)} sources; give one for each folder of data.path.")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise UserError(f"data.weights has {wrong[0]:g}; a weight is a finite number above 0 (leave out a folder that shall not be read).")
    written = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(written) for weight in written]


def _whole_parts(shares: list[Fraction], weights: Sequence[float] | None) -> NDArray[np.int64]:
    """The shares as parts of a period: exact where a period of at most _MOST_PARTS allows, else by the largest remainder."""
    period = math.lcm(*(share.denominator for share in shares))
    period = min(period, _MOST_PARTS)
    parts = [math.floor(share * period) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: parts[source] - shares[source] * period)
    for source in by_remainder[: period - sum(parts)]:
        parts[source] += 1
    if 0 in parts:
        source = parts.index(0)
        if weights is None:
            raise UserError(
                f"Source {source + 1} of data.path holds {float(shares[source]):.1e} of all samples; below 1/{_MOST_PARTS} = "
                f"{1 / _MOST_PARTS:.1e} a share is not told apart from 0. Give data.weights, or prepare the folders as one."
            )
        least = sum(map(float, weights)) / _MOST_PARTS
        raise UserError(f"data.weights has {weights[source]:g}; beside the others the least that is told apart from 0 is {least:.2g}.")
    return np.array(parts, dtype=np.int64)


def _by_largest_lag(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sources of a period in their order; of those that lag equally the first.  [sources] -> [period]"""
    order = np.empty(int(parts.sum()), dtype=np.int64)
    lag = np.zeros_like(parts)  # share of the row so far minus what came, times the period
    for place in range(len(order)):
        lag += parts
        order[place] = lag.argmax()
        lag[order[place]] -= len(order)
    return order


def _feistel(numbers: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A round a key: the halves change places, one of them masked with a hash of the other.  [n] -> [n]"""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every bit of the input moves every bit of the output (Steele et al. 2014).  [n] -> [n]"""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
