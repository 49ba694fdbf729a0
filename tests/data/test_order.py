"""The order of samples: a permutation an epoch, the same global batches at any world size."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import permute, rank_share, sample_numbers

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


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), SEEDS)
@settings(max_examples=50)
def test_every_sample_is_read_once_an_epoch_at_any_world_size(num_samples, micro_batch_size, world, accumulation, seed):
    global_batch_size = micro_batch_size * world * accumulation
    read = []
    for step in range(-(-2 * num_samples // global_batch_size)):
        samples = sample_numbers(step, global_batch_size, num_samples, seed)
        shares = [rank_share(samples, micro_batch_size, rank, world) for rank in range(world)]
        assert all(share.shape == (accumulation, micro_batch_size) for share in shares)
        assert sorted(np.concatenate(shares, axis=None)) == sorted(samples)
        read.extend(samples)
    assert sorted(read[:num_samples]) == sorted(read[num_samples : 2 * num_samples]) == list(range(num_samples))


@given(st.integers(0, 10**6), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 1), (12, 1)]))
def test_a_global_batch_does_not_depend_on_the_world_size(step, layout):
    world, micro_batch_size = layout
    samples = sample_numbers(step, 12, num_samples=1000, seed=7)
    shares = [rank_share(samples, micro_batch_size, rank, world) for rank in range(world)]
    assert np.concatenate(shares, axis=1).ravel().tolist() == samples.tolist()


def test_epochs_differ_and_a_step_may_straddle_them():
    step = sample_numbers(0, global_batch_size=30, num_samples=10, seed=0)
    epochs = step.reshape(3, 10).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
