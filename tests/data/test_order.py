"""The order of samples: a permutation an epoch, the same global batches at any world size."""

import math
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.order import Blend, permute, rank_share

SEEDS = st.integers(0, 2**32)


@given(st.integers(1, 3000), SEEDS, st.integers(0, 100))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@given(st.integers(1, 2**62), SEEDS, st.data())
def test_positions_of_a_huge_epoch_stay_inside_and_apart(size, seed, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=20))
    places = permute(np.array(positions, dtype=np.int64), size, seed, epoch=0)
    assert len(set(places.tolist())) == len(positions)
    assert all(0 <= place < size for place in places)


def test_the_order_is_this_one():
    """Written down, because a run that goes on with a newer version must read what the older one would have read."""
    assert permute(np.arange(10), 10, seed=1, epoch=0).tolist() == [1, 5, 2, 9, 8, 7, 4, 0, 6, 3]
    assert permute(np.array([0, 2**61]), 2**62, seed=1, epoch=3).tolist() == [173165037345775332, 1660223906138117586]


def test_orders_are_evenly_spread_over_seeds_and_epochs():
    """Each of the 6 orders of three samples comes 1,000 times in 6,000; five standard deviations are 144."""
    orders = [tuple(permute(np.arange(3), 3, seed, epoch)) for seed in range(60) for epoch in range(100)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and np.abs(counts - 1000).max() < 144


def test_neighbours_in_an_epoch_are_not_neighbours_in_the_text():
    places = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    correlation = np.corrcoef(np.arange(100_000), places)[0, 1]
    assert abs(correlation) < 5 / 100_000**0.5
    assert np.mean(np.abs(np.diff(places)) < 100) < 0.003  # by chance 200 of 100,000


def row(blend: Blend, count: int, first: int = 0) -> list[tuple[int, int, int]]:
    """(source, epoch, sample) of so many positions."""
    return list(zip(*(column.tolist() for column in blend.draw(np.arange(first, first + count))), strict=True))


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), SEEDS)
@settings(max_examples=50)
def test_every_sample_is_read_once_an_epoch_at_any_world_size(num_samples, micro_batch_size, world, accumulation, seed):
    global_batch_size = micro_batch_size * world * accumulation
    blend, read = Blend([num_samples], None, seed), []
    for step in range(-(-2 * num_samples // global_batch_size)):
        positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        shares = [rank_share(positions, micro_batch_size, rank, world) for rank in range(world)]
        assert all(share.shape == (accumulation, micro_batch_size) for share in shares)
        assert np.concatenate(shares, axis=1).ravel().tolist() == positions.tolist()
        read.extend(blend.draw(positions)[2])
    assert sorted(read[:num_samples]) == sorted(read[num_samples : 2 * num_samples]) == list(range(num_samples))


def test_one_source_is_read_epoch_behind_epoch_each_in_its_own_order():
    epochs = np.array(row(Blend([10], None, seed=1), 30)).reshape(3, 10, 3)
    for epoch, order in enumerate(epochs):
        assert (order[:, :2] == [0, epoch]).all()
        assert order[:, 2].tolist() == permute(np.arange(10), 10, 1, epoch).tolist()
    assert len({tuple(order[:, 2]) for order in epochs}) == 3


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
WEIGHT = st.one_of(st.integers(1, 50).map(float), st.decimals("0.001", "3", places=3).map(float))


@st.composite
def blends(draw) -> tuple[Blend, list[Fraction]]:
    """A blend and the shares that were asked for."""
    sizes = draw(SIZES)
    weights = draw(st.none() | st.lists(WEIGHT, min_size=len(sizes), max_size=len(sizes)))
    asked = [Fraction(str(weight)) for weight in weights or sizes]
    return Blend(sizes, weights, draw(SEEDS)), [weight / sum(asked) for weight in asked]


@given(blends())
@settings(max_examples=60)
def test_a_period_has_exactly_the_parts_that_the_largest_remainder_gives(blend_and_shares):
    blend, shares = blend_and_shares
    period = int(blend.parts.sum())
    common = math.lcm(*(share.denominator for share in shares))
    assert period == min(common, 2**16)
    for part, share in zip(blend.parts.tolist(), shares, strict=True):
        assert part == share * period if period == common else abs(part - share * period) < 1
    left = [share * period - math.floor(share * period) for share in shares]
    rounded_up = [part > share * period for part, share in zip(blend.parts.tolist(), shares, strict=True)]
    assert min((rest for rest, up in zip(left, rounded_up, strict=True) if up), default=1) >= max(
        (rest for rest, up in zip(left, rounded_up, strict=True) if not up), default=0
    ), "no source was rounded up before one with a larger remainder"
    for periods in (1, 2, 10**9):
        assert blend.counts(periods * period).tolist() == (periods * blend.parts).tolist()


@given(blends())
@settings(max_examples=60)
def test_at_every_position_each_source_is_close_to_its_share(blend_and_shares):
    """At most 1 - 1/k samples ahead of its share and 1/2 + ... + 1/k behind: for two sources half a sample either way."""
    blend, _ = blend_and_shares
    k, period = len(blend.parts), int(blend.parts.sum())
    ahead, behind = 1 - Fraction(1, k), sum((Fraction(1, n) for n in range(2, k + 1)), Fraction(0))
    count = min(2 * period, 500)
    came = np.cumsum(blend.draw(np.arange(count))[0][:, None] == np.arange(k), axis=0)
    lag = np.arange(1, count + 1)[:, None] * blend.parts - period * came  # times the period
    assert -ahead * period <= lag.min() and lag.max() <= behind * period
    assert all(blend.counts(number + 1).tolist() == came[number].tolist() for number in range(0, count, 7))


@given(blends())
@settings(max_examples=60)
def test_every_sample_of_a_source_comes_once_in_each_epoch_of_it(blend_and_shares):
    blend, _ = blend_and_shares
    read = row(blend, 400)
    for source, size in enumerate(blend.sizes.tolist()):
        came = [(epoch, sample) for number, epoch, sample in read if number == source]
        assert [epoch for epoch, _ in came] == [number // size for number in range(len(came))]
        for epoch in range(len(came) // size):
            assert sorted(sample for _, sample in came[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert blend.epochs(400)[source] == len(came) / size


@given(blends(), st.integers(0, 10**12))
@settings(max_examples=60)
def test_a_position_says_the_same_alone_as_in_the_row(blend_and_shares, first):
    blend, _ = blend_and_shares
    whole = row(blend, 20, first)
    assert [row(blend, 1, first + number)[0] for number in range(20)] == whole
    backwards = blend.draw(np.arange(first + 19, first - 1, -1))
    assert list(zip(*(column.tolist() for column in backwards), strict=True)) == whole[::-1]


def test_the_blend_is_this_one():
    """Written down, because a run that goes on with a newer version must read what the older one would have read."""
    assert row(Blend([4, 3], (2, 1), seed=1), 8) == [(0, 0, 3), (1, 0, 0), (0, 0, 1), (0, 0, 0), (1, 0, 2), (0, 0, 2), (0, 1, 3), (1, 0, 1)]
    assert [source for source, _, _ in row(Blend([9, 9, 9], (0.5, 0.3, 0.2), seed=1), 10)] == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


def test_sources_of_one_size_have_orders_of_their_own():
    read = np.array(row(Blend([50, 50], (1, 1), seed=3), 100))
    assert read[read[:, 0] == 0, 2].tolist() != read[read[:, 0] == 1, 2].tolist()


def test_weights_are_the_decimals_that_were_written():
    """In float64 0.1 + 0.2 is not 0.3; in float32 a share of 1e-4 loses samples of a long run."""
    assert Blend([5, 5, 5], (0.1, 0.2, 0.3), 0).parts.tolist() == [1, 2, 3]
    extreme = Blend([10**9, 10**9], (1, 1e-4), 0)
    assert extreme.parts.tolist() == [10_000, 1]
    assert extreme.counts(10_001 * 10**11).tolist() == [10_000 * 10**11, 10**11]
    assert Blend([5, 5], (1e300, 1e300), 0).parts.tolist() == [1, 1]


def test_a_billion_samples_take_no_more_time_and_memory_than_a_few():
    start = time.perf_counter()
    tracemalloc.start()
    blend = Blend([10**9, 10**9 + 7, 123], (0.6180339, 0.3819660, 0.01), seed=1)
    blend.draw(np.arange(10**15, 10**15 + 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(blend.parts) == 3 and blend.parts.sum() == 2**16
    assert peak < 4 << 20
    assert time.perf_counter() - start < 5, "tracing slows it tenfold"


@pytest.mark.parametrize(
    ("sizes", "weights", "sentence"),
    [
        ([5, 5], (1,), "data.weights has 1 weights for 2 sources; give one for each folder of data.path."),
        ([5], (0,), "data.weights has 0; a weight is a finite number above 0 (leave out a folder that shall not be read)."),
        ([5, 5], (1, -2), "data.weights has -2; a weight is a finite number above 0 (leave out a folder that shall not be read)."),
        ([5, 5], (1, math.nan), "data.weights has nan; a weight is a finite number above 0 (leave out a folder that shall not be read)."),
        ([5, 5], (math.inf, 1), "data.weights has inf; a weight is a finite number above 0 (leave out a folder that shall not be read)."),
        ([5, 5], (2, 1e-9), "data.weights has 1e-09; beside the others the least that is told apart from 0 is 3.1e-05."),
        (
            [10**9, 5],
            None,
            "Source 2 of data.path holds 5.0e-09 of all samples; below 1/65536 = 1.5e-05 a share is not told apart from 0. "
            "Give data.weights, or prepare the folders as one.",
        ),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(sizes, weights, sentence):
    with pytest.raises(UserError) as refused:
        Blend(sizes, weights, seed=0)
    assert str(refused.value) == sentence


def test_the_least_weight_that_is_named_is_taken():
    assert Blend([5, 5], (2, 3.1e-05), 0).parts.tolist() == [65_535, 1]
