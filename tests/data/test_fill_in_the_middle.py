"""Fill-in-the-middle: nothing is lost, the draws repeat, and the room for the marks is there."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.fill_in_the_middle import FillInTheMiddle, sample_generator
from data.packing import IGNORED, BestFitSamples, PackedSamples

ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 40}
END, PREFIX, SUFFIX, MIDDLE = 60_000, 60_001, 60_002, 60_003
MARKS = {PREFIX, SUFFIX, MIDDLE}


def fill(rate=1.0):
    return FillInTheMiddle(rate, PREFIX, SUFFIX, MIDDLE)


def put_back(tokens):
    """The text in its order again: of both orders the prefix is what precedes the suffix mark, or begins what follows the middle's."""
    tokens = tokens.tolist()
    end = [tokens.pop()] if tokens[-1] == END else []
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert tokens[0] == PREFIX
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle] + end


@given(length=st.integers(1, 30), ends=st.booleans(), seed=st.integers(0, 1000))
@settings(**ONE_FIXTURE)
def test_a_transformed_fragment_is_three_marks_longer_and_can_be_put_back(length, ends, seed):
    fragment = np.arange(1, length + 1)
    if ends:
        fragment[-1] = END
    told = fill().transform(fragment, END, np.random.default_rng(seed))
    assert len(told) == length + 3
    assert put_back(told) == fragment.tolist()


def test_prefix_first_and_suffix_first_come_equally_often():
    generator = np.random.default_rng(0)
    suffix_first = [fill().transform(np.arange(100), END, generator)[1] == SUFFIX for _ in range(2000)]
    # The prefix is empty in one of a hundred, which reads the same in both orders; the sampling error is 0.011.
    assert 0.46 < np.mean(suffix_first) < 0.55


def test_the_two_orders_are_those_of_the_paper():
    class Drawn:
        """Cuts behind the second and the fourth token."""

        def __init__(self, order):
            self.order = order

        def integers(self, above, size):
            assert above == 6 and size == 2
            return np.array([4, 2])

        def random(self):
            return self.order

    fragment = np.array([1, 2, 3, 4, 5, END])
    assert fill().transform(fragment, END, Drawn(0.1)).tolist() == [PREFIX, 1, 2, SUFFIX, 5, MIDDLE, 3, 4, END]
    assert fill().transform(fragment, END, Drawn(0.9)).tolist() == [PREFIX, SUFFIX, 5, MIDDLE, 1, 2, 3, 4, END]


def test_draws_belong_to_seed_epoch_and_sample():
    draws = {
        (seed, epoch, sample): sample_generator(seed, epoch, sample).random(4).tobytes()
        for seed in (-1, 0, 1)
        for epoch in (0, 1)
        for sample in (0, 1, 2**40)
    }
    assert len(set(draws.values())) == len(draws)
    assert sample_generator(1, 0, 2**40).random(4).tobytes() == draws[1, 0, 2**40]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    sequence_length=st.integers(12, 40),
    document_mask=st.booleans(),
    rate=st.sampled_from([0.3, 1.0]),
    kind=st.sampled_from([PackedSamples, BestFitSamples]),
)
@settings(**ONE_FIXTURE)
def test_every_token_stays_a_target_once_and_the_marks_are_targets_too(
    stream, counted, lengths, sequence_length, document_mask, rate, kind
):
    text = stream(counted(*lengths))
    samples = kind(text, sequence_length, END, document_mask, fill(rate), seed=5)
    rows = [samples.sample(number, 1) for number in range(samples.num_samples)]
    targets = np.concatenate([targets[targets != IGNORED] for _, _, targets in rows])
    assert sorted(targets[targets < END]) == list(range(sum(lengths)))
    for mark in MARKS:
        assert (targets == mark).sum() == (targets == PREFIX).sum()
    assert samples.content >= 0.75 * sequence_length
    for number, (tokens, segments, targets) in enumerate(rows):
        starts = np.flatnonzero(targets == PREFIX)
        assert (tokens[starts] == END).all(), "a fragment told out of order stands behind end-of-text"
        assert len(targets) == len(tokens) == len(segments) == sequence_length
        again = samples.sample(number, 1)
        assert all(np.array_equal(one, other) for one, other in zip(again, (tokens, segments, targets), strict=True))


def test_all_are_chosen_at_rate_one_and_the_next_epoch_cuts_elsewhere(stream, counted):
    samples = PackedSamples(stream(counted(*[40] * 50)), 200, END, fill=fill(), seed=1)
    first, second = (samples.sample(3, epoch)[2] for epoch in (0, 1))
    pieces = samples.documents(3, 0)
    assert (first == PREFIX).sum() == (second == PREFIX).sum() == len(pieces) <= 7
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, PackedSamples(samples.stream, 200, END, fill=fill(), seed=2).sample(3, 0)[2])


def test_a_rate_is_the_share_of_fragments(stream, counted):
    samples = PackedSamples(stream(counted(*[20] * 2000)), 400, END, fill=fill(0.5))
    marks = sum((samples.sample(number, 0)[2] == PREFIX).sum() for number in range(samples.num_samples))
    fragments = sum(len(samples.documents(number, 0)) for number in range(samples.num_samples))
    # Sampling error of about 2100 draws: 0.011; and a sample that draws more than it has room for keeps the others as they are.
    assert 0.42 < marks / fragments < 0.53


def test_the_rate_zero_is_no_fill_in_the_middle(stream, counted):
    text = stream(counted(5, 9, 4))
    plain, zero = PackedSamples(text, 8, END), PackedSamples(text, 8, END, fill=fill(0.0))
    assert zero.num_samples == plain.num_samples
    assert all(np.array_equal(*rows) for rows in zip(zero.sample(1, 0), plain.sample(1, 0), strict=True))


def test_the_room_for_marks_is_what_is_likely_to_be_chosen():
    assert fill(0.5).spare(1000, 100) == 7  # half of 11, rounded up, and one more
    assert fill(1.0).spare(120, 1) == 10  # a quarter of the sample
    assert fill(0.0).spare(5, 1) == 0


def test_what_cannot_be_is_refused():
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=f"rate of fill-in-the-middle is {rate}; it must be at least 0 and at most 1"):
            fill(rate)
    with pytest.raises(UserError, match=r"sequence_length 11 is too short for fill-in-the-middle.*Least: 12"):
        fill(0.1).spare(11, 100)
