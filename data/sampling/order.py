"""The order of samples: pure arithmetic, so that the state of the reader is one integer, the step."""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

_PERIODS = (1 << 16, 1 << 14, 1 << 14)
"""The longest period of each level of a row. A level orders the parts that the level above left over; there are fewer of them than
sources. The shares of k sources are kept to within (k-1)**2 * 2**-44."""


class Blend:
    """The source, epoch and sample at each position of one endless row: a pure function, in constant memory.

    `weights` are shares of samples, and so of tokens, because all samples are equally long. None makes each share proportional to
    the size of its source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)
        self.seed = seed
        asked = _shares(sizes, weights)
        self._row = _Row(asked)
        self.shares: list[Fraction] = self._row.shares
        """Share of each source in the samples that are read: the requested share, exactly or as near as _PERIODS allow."""
        if 0 in self.shares:
            _refuse_too_small(asked, self.shares.index(Fraction(0)), weights)

    def draw(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the source, the epoch of that source and its sample at each position.  [n] -> [n], [n], [n]

        An epoch of a source has each of its samples once, in its own order; the next epoch begins where it ends.
        """
        sources, draws = self._row.locate(positions)
        epochs, samples = np.divmod(draws, self.sizes[sources])
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
            chosen = (sources == source) & (epochs == epoch)
            samples[chosen] = permute(samples[chosen], int(self.sizes[source]), self.seed, epoch, source)
        return sources, epochs, samples

    def counts(self, positions: int) -> NDArray[np.int64]:
        """Return how many samples the first `positions` positions take from each source.  -> [sources]"""
        end = np.array([positions], dtype=np.int64)
        return np.concatenate([self._row.count(source, end) for source in range(len(self.sizes))])

    def epochs(self, positions: int) -> NDArray[np.float64]:
        """Return how often the first `positions` positions read each source.  -> [sources]"""
        return self.counts(positions) / self.sizes


class _Row:
    """An endless row of sources, each at its share.

    The row has a period in which each source has a whole number of positions. The next position always goes to the source that lags
    most behind its share. So with k sources none is ever more than 1 - 1/k positions ahead of its share, or more than
    1/2 + 1/3 + ... + 1/k behind it (Adler et al. 2003, "A proportionate fair scheduling rule with good worst-case performance"); with
    two sources this is half a position.

    If no period that is short enough holds the shares exactly, they are rounded down. The positions left over, fewer than there are
    sources, are treated as one more source. A row of its own assigns them to the sources, by the remainder that is still due to each.
    So the lag of a source is its own lag, plus its part of the remainder times the lag of the positions left over, plus its lag in
    their row: each row adds less than 2 positions ahead and less than 2 * (1/2 + ... + 1/(k+1)) behind, and nothing grows with the
    position. Only the last level rounds, by largest remainders (Hamilton's method).
    """

    def __init__(self, shares: list[Fraction], longest: Sequence[int] = _PERIODS) -> None:
        period = min(math.lcm(*(share.denominator for share in shares)), longest[0])
        parts = [math.floor(share * period) for share in shares]
        due = [share * period - part for share, part in zip(shares, parts, strict=True)]
        left = period - sum(parts)
        self._left_over: _Row | None = None
        self.shares: list[Fraction]
        if left and len(longest) > 1:
            self._left_over = _Row([one / left for one in due], longest[1:])
            self.shares = [(part + left * more) / period for part, more in zip(parts, self._left_over.shares, strict=True)]
            parts.append(left)
        else:
            for source in sorted(range(len(shares)), key=lambda source: -due[source])[:left]:
                parts[source] += 1
            self.shares = [Fraction(part, period) for part in parts]
        self._parts = np.array(parts, dtype=np.int64)
        self._order = _by_largest_lag(self._parts)
        self._positions = np.split(np.argsort(self._order, kind="stable"), np.cumsum(self._parts)[:-1])
        """Positions of each source in the period, ascending; the last array holds those of the positions left over."""

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source at each position, and how often it occurs before that position.  [n] -> [n], [n]"""
        sources = self._sources(positions)
        draws = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            draws[sources == source] = self.count(source, positions[sources == source])
        return sources, draws

    def count(self, source: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how often a source occurs before each position.  [n] -> [n]"""
        count = self._own_count(source, positions)
        return count if self._left_over is None else count + self._left_over.count(source, self._own_count(-1, positions))

    def _sources(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        sources = self._order[positions % len(self._order)]
        if self._left_over is not None:
            is_left_over = sources == len(self._parts) - 1
            sources[is_left_over] = self._left_over._sources(self._own_count(-1, positions[is_left_over]))
        return sources

    def _own_count(self, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the count of a source without the positions left over; -1: the count of those.  [n] -> [n]"""
        periods, inside = np.divmod(positions, len(self._order))
        return periods * self._parts[number] + np.searchsorted(self._positions[number], inside)


def rank_share(samples: NDArray[np.int64], micro_batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """Return the part of a global batch that a rank computes.  [global_batch_size] -> [accumulation, micro_batch_size]

    The batch is dealt out one micro-batch at a time: to rank 0, 1, ... of the first accumulation step, then of the second.
    """
    assert len(samples) % (micro_batch_size * world) == 0, (len(samples), micro_batch_size, world)
    return samples.reshape(-1, world, micro_batch_size)[:, rank]


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int, source: int = 0) -> NDArray[np.int64]:
    """Return where the shuffle of (seed, epoch, source) puts each position of [0, size); size is at most 2**62.  [n] -> [n]

    A Feistel network on the next power of four, repeated until the result is below size (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"): a permutation of any size in constant memory.
    """
    name = f"{seed} {epoch} {source}" if source else f"{seed} {epoch}"
    keys = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=64).digest(), dtype="<u8")
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    shuffled = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := shuffled >= size).any():
        shuffled[outside] = _feistel(shuffled[outside], half_bits, keys)
    return shuffled.astype(np.int64)


def sample_generator(seed: int, epoch: int, sample: int, source: int = 0) -> np.random.Generator:
    """Return the random generator of one sample: the same on any rank and after any resume, another one in the next epoch."""
    # The draws themselves count up the two low words of the counter.
    key, counter = [seed % 2**64, epoch], [0, 0, sample, source]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))


def _shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[Fraction]:
    """Return each source's share of the whole, exactly as the decimals of the weights give it."""
    assert len(sizes) and all(size > 0 for size in sizes), sizes
    if weights is None:
        return [Fraction(int(size), int(sum(sizes))) for size in sizes]
    if len(weights) != len(sizes):
        raise UserError(f"data.weights has {len(weights)} weights for {len(sizes)} sources; give one for each folder of data.path.")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise UserError(f"data.weights has {wrong[0]:g}; a weight is a finite number above 0 (remove a folder that should not be read).")
    written = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(written) for weight in written]


def _refuse_too_small(shares: list[Fraction], source: int, weights: Sequence[float] | None) -> NoReturn:
    least = (
        (len(shares) - 1) ** (len(_PERIODS) - 1) / math.prod(_PERIODS) * 1.05
    )  # rounded up, so that its two printed digits are not below it
    if weights is None:
        raise UserError(
            f"Source {source + 1} of data.path holds {float(shares[source]):.1e} of all samples; the smallest share that is not rounded "
            f"to 0 is {least:.2g}. Give data.weights, or prepare the folders as one."
        )
    least *= sum(map(float, weights))
    raise UserError(
        f"data.weights has {weights[source]:g}; with these other weights the smallest one that is not rounded to 0 is {least:.2g}."
    )


def _by_largest_lag(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the source at each position of a period; among those that lag equally, the first.  [sources] -> [period]"""
    order = np.empty(int(parts.sum()), dtype=np.int64)
    lag = np.zeros_like(parts)  # (share of the row so far - positions so far) x period
    for position in range(len(order)):
        lag += parts
        order[position] = source = lag.argmax()
        lag[source] -= len(order)
    return order


def _feistel(numbers: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply one round per key: swap the halves and XOR one of them with a hash of the other.  [n] -> [n]"""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half_bits) | right


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64: every input bit affects every output bit (Steele et al. 2014).  [n] -> [n]"""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
