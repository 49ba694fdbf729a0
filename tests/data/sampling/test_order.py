"""The order of samples: a permutation an epoch, the same global batches at any world size."""

import math
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.sampling.order import Blend, permute, rank_share

SEEDS = st.integers(0, 2**32)


@given(st.integers(1, 3000), SEEDS, st.integers(0, 100))
def test_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@given(st.integers(1, 2**62), SEEDS, st.data())
def test_positions_of_a_huge_epoch_stay_in_range_and_differ(size, seed, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=20))
    places = permute(np.array(positions, dtype=np.int64), size, seed, epoch=0)
    assert len(set(places.tolist())) == len(positions)
    assert all(0 <= place < size for place in places)


def test_order_equals_recorded_order():
    """Recorded values: a run that is resumed with a newer version must read the samples that the older version would have read."""
    assert permute(np.arange(10), 10, seed=1, epoch=0).tolist() == [1, 5, 2, 9, 8, 7, 4, 0, 6, 3]
    assert permute(np.array([0, 2**61]), 2**62, seed=1, epoch=3).tolist() == [173165037345775332, 1660223906138117586]


def test_orders_are_uniform_over_seeds_and_epochs():
    """Each of the 6 orders of three samples comes 1,000 times in 6,000; five standard deviations are 144."""
    orders = [tuple(permute(np.arange(3), 3, seed, epoch)) for seed in range(60) for epoch in range(100)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and np.abs(counts - 1000).max() < 144


def test_neighbours_in_an_epoch_are_apart_in_the_text():
    places = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    correlation = np.corrcoef(np.arange(100_000), places)[0, 1]
    assert abs(correlation) < 5 / 100_000**0.5
    assert np.mean(np.abs(np.diff(places)) < 100) < 0.003  # by chance 200 of 100,000


def row(blend: Blend, count: int, first: int = 0) -> list[tuple[int, int, int]]:
    """Return (source, epoch, sample) of the first positions."""
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


def test_each_epoch_of_one_source_has_its_own_order():
    epochs = np.array(row(Blend([10], None, seed=1), 30)).reshape(3, 10, 3)
    for epoch, order in enumerate(epochs):
        assert (order[:, :2] == [0, epoch]).all()
        assert order[:, 2].tolist() == permute(np.arange(10), 10, 1, epoch).tolist()
    assert len({tuple(order[:, 2]) for order in epochs}) == 3


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
ROUND = st.one_of(st.integers(1, 50).map(float), st.decimals("0.001", "3", places=3).map(float))
UNEVEN = st.floats(1e-9, 1)
LONGEST_PERIOD, LEAST_DIFFERENCE = 2**16, Fraction(1, 2**44)


@st.composite
def blends(draw) -> tuple[Blend, list[Fraction]]:
    """A blend and its requested shares."""
    sizes = draw(SIZES)
    weights = draw(st.one_of([st.none(), *(st.lists(kind, min_size=len(sizes), max_size=len(sizes)) for kind in (ROUND, UNEVEN))]))
    asked = [Fraction(str(weight)) for weight in weights or sizes]
    return Blend(sizes, weights, draw(SEEDS)), [weight / sum(asked) for weight in asked]


def common_denominator(shares: list[Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares))


@given(blends())
@settings(max_examples=40, deadline=None)
def test_shares_equal_the_requested_shares(blend_and_shares):
    """Exactly where a period of at most 65,536 samples has them, else up to a 10**12th for two sources."""
    blend, shares = blend_and_shares
    period = common_denominator(shares)
    assert sum(blend.shares) == 1
    if period <= LONGEST_PERIOD:
        assert blend.shares == shares
        for periods in (1, 2, 10**9):
            assert blend.counts(periods * period).tolist() == [periods * period * share for share in shares]
    for share, asked, count in zip(blend.shares, shares, blend.counts(10**12).tolist(), strict=True):
        assert abs(share - asked) <= (len(shares) - 1) ** 2 * LEAST_DIFFERENCE
        assert abs(count - asked * 10**12) < most_behind(len(shares), 3) + 1


def most_ahead(sources: int, rows: int) -> Fraction:
    return 1 - Fraction(1, sources) + 2 * (rows - 1) if sources > 1 else Fraction(0)


def most_behind(sources: int, rows: int) -> Fraction:
    """1/2 + ... + 1/k, and of each row whose parts do not come out even twice that, with one source more."""
    behind = [sum((Fraction(1, n) for n in range(2, k + 1)), Fraction(0)) for k in (sources, sources + 1)]
    return behind[0] + 2 * (rows - 1) * behind[1]


@given(blends(), st.sampled_from([0, 65_300, 10**12]))
@settings(max_examples=40, deadline=None)
def test_at_every_position_each_source_is_close_to_its_share(blend_and_shares, first):
    """With an exact period, at most 1 - 1/k samples ahead of the share and 1/2 + ... + 1/k behind it: for two sources half a sample."""
    blend, shares = blend_and_shares
    k, rows = len(shares), 1 if common_denominator(shares) <= LONGEST_PERIOD else 3
    counts = blend.counts(first) + np.cumsum(blend.draw(np.arange(first, first + 500))[0][:, None] == np.arange(k), axis=0)
    for source, share in enumerate(blend.shares):
        lags = [position * share - count for position, count in enumerate(counts[:, source].tolist(), start=first + 1)]
        assert -most_ahead(k, rows) <= min(lags) and max(lags) <= most_behind(k, rows)
    assert all(blend.counts(first + number + 1).tolist() == counts[number].tolist() for number in range(0, 500, 7))


@given(st.lists(st.floats(0, 9).map(lambda power: int(10**power)), min_size=2, max_size=6))
@example([1, 100, 10_000, 316_227_766, 316_227_766])  # two samples of a large source are less than a float's last digits of an epoch
@settings(max_examples=25, deadline=None)
def test_without_weights_all_sources_finish_an_epoch_together(sizes):
    blend = Blend(sizes, None, seed=1)
    assert all(abs(count - size) <= 2 for count, size in zip(blend.counts(sum(sizes)).tolist(), sizes, strict=True))


def test_small_source_next_to_a_huge_one_is_read_as_often():
    """Rounded to parts of one period the first was read 1.9 times as often as the other, and the second could not be had."""
    assert Blend([3_000_001, 24], None, 1).epochs(3_000_025).tolist() == [1, 1]
    assert Blend([9_999_991, 1000, 77], None, 1).epochs(10 * 10_001_068).tolist() == [10, 10, 10]
    assert Blend([10**12, 1], None, 1).counts(10 * (10**12 + 1)).tolist() == [10**13, 10]


@given(blends())
@settings(max_examples=40, deadline=None)
def test_each_epoch_of_a_source_has_every_sample_once(blend_and_shares):
    blend, _ = blend_and_shares
    read = row(blend, 400)
    for source, size in enumerate(blend.sizes.tolist()):
        came = [(epoch, sample) for number, epoch, sample in read if number == source]
        assert [epoch for epoch, _ in came] == [number // size for number in range(len(came))]
        for epoch in range(len(came) // size):
            assert sorted(sample for _, sample in came[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert blend.epochs(400)[source] == len(came) / size


def test_samples_at_left_over_positions_are_read_once():
    """Six sources leave over a few of 65,536 positions, which no short row has."""
    sizes, count = [5000, 3000, 2000, 700, 41, 1], 3 * LONGEST_PERIOD + 1000
    blend = Blend(sizes, (0.31831, 0.27183, 0.14142, 0.1732, 0.0577215, 0.0377), seed=1)
    sources, epochs, samples = blend.draw(np.arange(count))
    for source, size in enumerate(sizes):
        epoch, sample = epochs[sources == source], samples[sources == source]
        assert epoch.tolist() == [number // size for number in range(len(epoch))]
        whole = len(sample) // size * size
        assert (np.sort(sample[:whole].reshape(-1, size), axis=1) == np.arange(size)).all()
        assert len(epoch) == blend.counts(count)[source] and abs(len(epoch) - count * blend.shares[source]) < 2


@given(blends(), st.integers(0, 10**12))
@settings(max_examples=40, deadline=None)
def test_position_drawn_alone_equals_position_in_the_row(blend_and_shares, first):
    blend, _ = blend_and_shares
    whole = row(blend, 20, first)
    assert [row(blend, 1, first + number)[0] for number in range(20)] == whole
    backwards = blend.draw(np.arange(first + 19, first - 1, -1))
    assert list(zip(*(column.tolist() for column in backwards), strict=True)) == whole[::-1]


def test_blend_equals_recorded_blend():
    """Recorded values: a run that is resumed with a newer version must read the samples that the older version would have read."""
    assert row(Blend([4, 3], (2, 1), seed=1), 8) == [(0, 0, 3), (1, 0, 0), (0, 0, 1), (0, 0, 0), (1, 0, 2), (0, 0, 2), (0, 1, 3), (1, 0, 1)]
    assert [source for source, _, _ in row(Blend([9, 9, 9], (0.5, 0.3, 0.2), seed=1), 10)] == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


def test_sources_of_equal_size_have_different_orders():
    read = np.array(row(Blend([50, 50], (1, 1), seed=3), 100))
    assert read[read[:, 0] == 0, 2].tolist() != read[read[:, 0] == 1, 2].tolist()


def test_weights_are_exact_decimals():
    """In float64 0.1 + 0.2 is not 0.3; in float32 a share of 1e-4 loses samples of a long run."""
    assert Blend([5, 5, 5], (0.1, 0.2, 0.3), 0).shares == [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)]
    extreme = Blend([10**9, 10**9], (1, 1e-4), 0)
    assert extreme.shares == [Fraction(10_000, 10_001), Fraction(1, 10_001)]
    assert extreme.counts(10_001 * 10**11).tolist() == [10_000 * 10**11, 10**11]
    assert Blend([5, 5], (1e300, 1e300), 0).shares == [Fraction(1, 2)] * 2


def test_blend_of_a_billion_samples_is_as_cheap_as_a_few():
    start = time.perf_counter()
    tracemalloc.start()
    blend = Blend([10**9, 10**9 + 7, 123], (0.6180339, 0.3819660, 0.01), seed=1)
    blend.draw(np.arange(10**15, 10**15 + 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert common_denominator(blend.shares) > LONGEST_PERIOD
    assert peak < 4 << 20
    assert time.perf_counter() - start < 5, "tracing slows it tenfold"


@pytest.mark.parametrize(
    ("sizes", "weights", "sentence"),
    [
        ([5, 5], (1,), "data.weights has 1 weights for 2 sources; give one for each folder of data.path."),
        ([5], (0,), "data.weights has 0; a weight is a finite number above 0 (remove a folder that should not be read)."),
        ([5, 5], (1, -2), "data.weights has -2; a weight is a finite number above 0 (remove a folder that should not be read)."),
        ([5, 5], (1, math.nan), "data.weights has nan; a weight is a finite number above 0 (remove a folder that should not be read)."),
        ([5, 5], (math.inf, 1), "data.weights has inf; a weight is a finite number above 0 (remove a folder that should not be read)."),
        ([5, 5], (2, 1e-20), "data.weights has 1e-20; with these other weights the smallest one that is not rounded to 0 is 1.2e-13."),
        (
            [10**17, 5],
            None,
            "Source 2 of data.path holds 5.0e-17 of all samples; the smallest share that is not rounded to 0 is 6e-14. "
            "Give data.weights, or prepare the folders as one.",
        ),
    ],
)
def test_invalid_and_too_small_weights_are_refused(sizes, weights, sentence):
    with pytest.raises(UserError) as refused:
        Blend(sizes, weights, seed=0)
    assert str(refused.value) == sentence


@pytest.mark.parametrize("others", [(2,), (2, 0.3), (0.7, 1 / 3, 0.11, 1e-5, 9)])
def test_smallest_weight_named_in_the_message_is_accepted(others):
    with pytest.raises(UserError) as refused:
        Blend([5] * (1 + len(others)), (1e-20, *others), 0)
    least = float(str(refused.value).split()[-1].rstrip("."))
    assert 0 < Blend([5] * (1 + len(others)), (least, *others), 0).shares[0] < 1e-11
