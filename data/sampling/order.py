"""Which sample comes when: pure arithmetic, so that the state of the reader is one integer, the step."""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

_PERIODS = (1 << 16, 1 << 14, 1 << 14)
"""The longest period of each level of a row. Each level is for the parts that the one above left over, at most one fewer than there
are sources: of k sources a share is kept to within (k-1)**2 * 2**-44."""


class Blend:
    """Which sample of which source comes at each position of one endless row: a pure function, in memory that no size changes.

    `weights` are shares of samples, and so of tokens, for all samples are equally long; None takes the sizes.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)
        self.seed = seed
        asked = _shares(sizes, weights)
        self._row = _Row(asked)
        self.shares: list[Fraction] = self._row.shares
        """Of all samples, as they are read: what was asked for, exactly or as near as _PERIODS tell them apart."""
        if 0 in self.shares:
            _refuse_too_small(asked, self.shares.index(Fraction(0)), weights)

    def draw(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Source, epoch of that source, and sample of it, at each position.  [n] -> [n], [n], [n]

        An epoch of a source has each of its samples once, in an order of its own; the next begins where it ends.
        """
        sources, draws = self._row.locate(positions)
        epochs, samples = np.divmod(draws, self.sizes[sources])
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
            chosen = (sources == source) & (epochs == epoch)
            samples[chosen] = permute(samples[chosen], int(self.sizes[source]), self.seed, epoch, source)
        return sources, epochs, samples

    def counts(self, positions: int) -> NDArray[np.int64]:
        """Samples that the first so many positions take from each source.  -> [sources]"""
        end = np.array([positions], dtype=np.int64)
        return np.concatenate([self._row.count(source, end) for source in range(len(self.sizes))])

    def epochs(self, positions: int) -> NDArray[np.float64]:
        """How often the first so many positions read each source.  -> [sources]"""
        return self.counts(positions) / self.sizes


class _Row:
    """Sources in an endless row, each at its share.

    The row has a period, of which each source has a whole number of parts. Inside it the source comes that lags most behind its
    share, so that of k sources none is ever more than 1 - 1/k places ahead, nor more than 1/2 + 1/3 + ... + 1/k behind (Adler et
    al. 2003, "A proportionate fair scheduling rule with good worst-case performance"): for two sources half a place.

    Where no period that is short enough holds the shares exactly they are rounded down. The parts left over, fewer than there are
    sources, go round as one source more, and whose turn each of them is says a row of its own, by what is still owed to each.
    So a source's lag is its own, plus its share of what is owed times the lag of the parts left over, plus its lag in their row:
    each row adds less than 2 places ahead, and less than 2 * (1/2 + ... + 1/(k+1)) behind, and nothing grows with the position.
    Only the last level's largest remainders (Hamilton's method) do not come out even.
    """

    def __init__(self, shares: list[Fraction], longest: Sequence[int] = _PERIODS) -> None:
        period = min(math.lcm(*(share.denominator for share in shares)), longest[0])
        parts = [math.floor(share * period) for share in shares]
        owed = [share * period - part for share, part in zip(shares, parts, strict=True)]
        left = period - sum(parts)
        self._left_over: _Row | None = None
        self.shares: list[Fraction]
        if left and len(longest) > 1:
            self._left_over = _Row([one / left for one in owed], longest[1:])
            self.shares = [(part + left * more) / period for part, more in zip(parts, self._left_over.shares, strict=True)]
            parts.append(left)
        else:
            for source in sorted(range(len(shares)), key=lambda source: -owed[source])[:left]:
                parts[source] += 1
            self.shares = [Fraction(part, period) for part in parts]
        self._parts = np.array(parts, dtype=np.int64)
        self._order = _by_largest_lag(self._parts)
        self._places = np.split(np.argsort(self._order, kind="stable"), np.cumsum(self._parts)[:-1])
        """Of each source in the period, ascending; behind them those of the parts left over."""

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source at each position, and how often it came before.  [n] -> [n], [n]"""
        sources = self._sources(positions)
        draws = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            draws[sources == source] = self.count(source, positions[sources == source])
        return sources, draws

    def count(self, source: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often a source comes before each position.  [n] -> [n]"""
        count = self._own_count(source, positions)
        return count if self._left_over is None else count + self._left_over.count(source, self._own_count(-1, positions))

    def _sources(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        sources = self._order[positions % len(self._order)]
        if self._left_over is not None:
            open_places = sources == len(self._parts) - 1
            sources[open_places] = self._left_over._sources(self._own_count(-1, positions[open_places]))
        return sources

    def _own_count(self, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Without what a source has of the parts left over; -1: of those parts.  [n] -> [n]"""
        periods, places = np.divmod(positions, len(self._order))
        return periods * self._parts[number] + np.searchsorted(self._places[number], places)


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


def sample_generator(seed: int, epoch: int, sample: int, source: int = 0) -> np.random.Generator:
    """The draws of one sample of a source: the same on any rank and after any resume, others in the next epoch."""
    # The two low words of the counter are left to the draws.
    key, counter = [seed % 2**64, epoch], [0, 0, sample, source]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))


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


def _refuse_too_small(shares: list[Fraction], source: int, weights: Sequence[float] | None) -> NoReturn:
    least = (len(shares) - 1) ** (len(_PERIODS) - 1) / math.prod(_PERIODS) * 1.05  # so that two digits are not below it
    if weights is None:
        raise UserError(
            f"Source {source + 1} of data.path holds {float(shares[source]):.1e} of all samples; the least share that is told apart "
            f"from 0 is {least:.2g}. Give data.weights, or prepare the folders as one."
        )
    least *= sum(map(float, weights))
    raise UserError(f"data.weights has {weights[source]:g}; beside the others the least that is told apart from 0 is {least:.2g}.")


def _by_largest_lag(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sources of a period in their order; of those that lag equally the first.  [sources] -> [period]"""
    order = np.empty(int(parts.sum()), dtype=np.int64)
    lag = np.zeros_like(parts)  # share of the row so far minus what came, times the period
    for place in range(len(order)):
        lag += parts
        order[place] = source = lag.argmax()
        lag[source] -= len(order)
    return order


def _feistel(numbers: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A round a key: the halves change places, one of them masked with a hash of the other.  [n] -> [n]"""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half_bits) | right


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every bit of the input moves every bit of the output (Steele et al. 2014).  [n] -> [n]"""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
