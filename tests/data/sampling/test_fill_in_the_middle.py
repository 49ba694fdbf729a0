"""Fill-in-the-middle: nothing is lost, the draws repeat, and samples have room for the special tokens."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.sampling.fill_in_the_middle import FillInTheMiddle
from data.sampling.order import sample_generator
from data.sampling.packing import BestFitSamples, PackedSamples
from data.sampling.samples import IGNORED
from data.sampling.settings import SamplingSettings
from data.sampling.sources import open_folders, open_sampling
from data.tokenization.learning import train_sentencepiece

ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 40}
END, PREFIX, SUFFIX, MIDDLE = 60_000, 60_001, 60_002, 60_003
MARKS = {PREFIX, SUFFIX, MIDDLE}
KINDS = pytest.mark.parametrize("kind", [PackedSamples, BestFitSamples])


def fill(rate=1.0):
    return FillInTheMiddle(rate, PREFIX, SUFFIX, MIDDLE)


def put_back(tokens):
    """Return the text in its original order, from either of the two orders."""
    tokens = tokens.tolist()
    end = [tokens.pop()] if tokens[-1] == END else []
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert tokens[0] == PREFIX
    return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle] + end


@given(length=st.integers(1, 30), ends=st.booleans(), seed=st.integers(0, 1000))
@settings(**ONE_FIXTURE)
def test_transformed_piece_can_be_restored(length, ends, seed):
    piece = np.arange(1, length + 1)
    if ends:
        piece[-1] = END
    told = fill().transform(piece, END, np.random.default_rng(seed))
    assert len(told) == length + 3
    assert put_back(told) == piece.tolist()


def test_prefix_first_and_suffix_first_are_equally_frequent():
    generator = np.random.default_rng(0)
    suffix_first = [fill().transform(np.arange(100), END, generator)[1] == SUFFIX for _ in range(2000)]
    # The prefix is empty in one of a hundred, which reads the same in both orders; the sampling error is 0.011.
    assert 0.46 < np.mean(suffix_first) < 0.55


def test_both_orders_are_those_of_the_paper():
    class Drawn:
        """Cuts behind the second and the fourth token."""

        def __init__(self, order):
            self.order = order

        def integers(self, above, size):
            assert above == 6 and size == 2
            return np.array([4, 2])

        def random(self):
            return self.order

    piece = np.array([1, 2, 3, 4, 5, END])
    assert fill().transform(piece, END, Drawn(0.1)).tolist() == [PREFIX, 1, 2, SUFFIX, 5, MIDDLE, 3, 4, END]
    assert fill().transform(piece, END, Drawn(0.9)).tolist() == [PREFIX, SUFFIX, 5, MIDDLE, 1, 2, 3, 4, END]


def test_draws_depend_on_seed_epoch_sample_and_source():
    draws = {
        (seed, epoch, sample, source): sample_generator(seed, epoch, sample, source).random(4).tobytes()
        for seed in (-1, 0, 1)
        for epoch in (0, 1)
        for sample in (0, 1, 2**40)
        for source in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    assert sample_generator(1, 0, 2**40).random(4).tobytes() == draws[1, 0, 2**40, 0]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    sequence_length=st.integers(12, 40),
    document_mask=st.booleans(),
    rate=st.sampled_from([0.3, 1.0]),
    kind=st.sampled_from([PackedSamples, BestFitSamples]),
)
@settings(**ONE_FIXTURE)
def test_every_token_and_special_token_is_a_target_once(stream, counted, lengths, sequence_length, document_mask, rate, kind):
    text = stream(counted(*lengths))
    samples = kind(text, sequence_length, END, document_mask, fill(rate), seed=5)
    rows = [samples.sample(number, 1)[:3] for number in range(samples.num_samples)]
    targets = np.concatenate([targets[targets != IGNORED] for _, _, targets in rows])
    assert sorted(targets[targets < END]) == list(range(sum(lengths)))
    for mark in MARKS:
        assert (targets == mark).sum() == (targets == PREFIX).sum()
    assert samples.content >= 0.75 * sequence_length
    for number, (tokens, segments, targets) in enumerate(rows):
        starts = np.flatnonzero(targets == PREFIX)
        assert (tokens[starts] == END).all(), "a piece told out of order stands behind end-of-text"
        assert len(targets) == len(tokens) == len(segments) == sequence_length
        again = samples.sample(number, 1)
        assert all(np.array_equal(one, other) for one, other in zip(again[:3], (tokens, segments, targets), strict=True))


def test_rate_one_transforms_all_and_epochs_cut_differently(stream, counted):
    samples = PackedSamples(stream(counted(*[37] * 50)), 200, END, fill=fill(), seed=1)
    first, second = (samples.sample(3, epoch)[2] for epoch in (0, 1))
    pieces = samples.documents(3)
    assert (first == PREFIX).sum() == (second == PREFIX).sum() == len(pieces) <= 7
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, PackedSamples(samples.stream, 200, END, fill=fill(), seed=2).sample(3, 0)[2])


def mixed_lengths(name):
    generator = np.random.default_rng(0)
    return {
        "lognormal": generator.lognormal(5, 1.5, 2000).astype(int) + 1,
        "short and long": np.array([30] * 1500 + [30_000] * 30),
        "short and long, mixed": generator.permutation([30] * 1500 + [30_000] * 30),
        "equal": np.full(2000, 50),
        "tiny": np.full(6000, 8),
    }[name]


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("name", ["lognormal", "short and long", "short and long, mixed", "equal", "tiny"])
@KINDS
def test_rate_is_the_share_of_pieces_of_any_length(stream, kind, name, rate):
    samples = kind(stream([[1] * (length - 1) + [END] for length in mixed_lengths(name)]), 512, END, fill=fill(rate))
    filled = sum((samples.sample(number, 0)[2] == PREFIX).sum() for number in range(samples.num_samples))
    pieces = sum(len(samples.documents(number)) for number in range(samples.num_samples))
    # Three standard deviations of 2,300 pieces, the fewest here, at the rate 0.5.
    assert filled / pieces == pytest.approx(samples.filled_share, abs=0.03)
    if (name, rate) == ("tiny", 1.0):
        assert samples.content == 512 - 3 * 42 and samples.filled_share < 0.9, "a quarter is not enough for 48 pieces"
    else:
        assert filled / pieces == pytest.approx(rate, abs=0.03)


def test_scarce_room_is_given_to_long_and_short_pieces_equally(stream, counted):
    samples = BestFitSamples(stream(counted(12, 8, 6, 4, 3, 2, 1)), 48, END, document_mask=True, fill=fill())
    pieces = samples.documents(0)
    assert samples.num_samples == 1 and [piece.num_tokens for piece in pieces] == [12, 8, 6, 4, 3, 2, 1]
    times = np.zeros(len(pieces))
    for epoch in range(800):
        _, segments, targets = samples.sample(0, epoch)[:3]
        first = np.searchsorted(segments[targets != IGNORED], np.arange(1, 8))
        times += targets[first] == PREFIX
    assert times.sum() == 800 * 4
    # The standard deviation of 800 draws is 0.0175.
    assert times / 800 == pytest.approx(np.full(7, 4 / 7), abs=0.06)
    assert samples.filled_share == pytest.approx(4 / 7)


def test_without_fill_in_the_middle_nothing_is_transformed(stream, counted):
    assert PackedSamples(stream(counted(5, 9, 4)), 8, END).filled_share == 0.0


def test_room_suffices_for_98_percent_of_the_chosen_pieces():
    assert fill(1.0).spare(1000, np.array([3, 3, 3])) == 3
    assert fill(1.0).spare(1000, np.array([1] * 90 + [10])) == 8  # 98 of 100: 8 of the 10
    assert fill(1.0).spare(120, np.array([40])) == 10  # a quarter of the sample
    assert fill(1e-9).spare(120, np.array([1])) == 1 and fill(1e-9).filled_share(1, np.array([1])) == 1e-9
    assert fill(1.0).filled_share(10, np.array([40])) == 0.25
    assert fill(1.0).filled_share(50, np.array([40])) == 1.0
    spare = fill(0.5).spare(10**6, np.full(200, 100))
    # Five of 100 draws in standard deviation; 2 % of 50 are missed where room ends 0.54 of them above the mean: 5 x 0.2 = 1.
    assert 52 <= spare <= 53
    # Of two pieces both are chosen one time in four, and then one finds no room: 0.125 a piece; sampling error 0.002.
    assert fill(0.5).filled_share(1, np.full(200, 2)) == pytest.approx(0.375, abs=0.01)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders of the same text, whose tokenizer has the special tokens."""
    root = tmp_path_factory.mktemp("fill")
    (root / "text").mkdir()
    dice = random.Random(3)
    texts = [f"story {number}: " + " ".join(dice.choices(["sun", "moon", "earth", "water", "fire"], k=40)) for number in range(30)]
    for number, text in enumerate(texts):
        (root / "text" / f"{number:02d}.txt").write_text(text)
    train_sentencepiece(texts, root / "tokenizer.model", 380, special_tokens=SamplingSettings.fim_tokens)
    for name in ("one", "two"):
        prepare(
            PrepareSettings(
                input=(str(root / "text"),),
                tokenizer=str(root / "tokenizer.model"),
                output=str(root / name),
                held_out=0.0,
                workers=1,
            )
        )
    return open_folders([str(root / "one"), str(root / "two")])


def test_two_sources_of_a_blend_are_cut_differently(folders):
    sampling = open_sampling(folders, SamplingSettings(fim_rate=1.0), 64, False, seed=1)
    one, two = sampling.samples
    assert one.num_samples == two.num_samples and one.documents(2) == two.documents(2)
    assert not np.array_equal(one.sample(2, 0)[2], two.sample(2, 0)[2])
    alone = PackedSamples(one.stream, 64, one.end_of_text, fill=sampling.objective.fill, seed=1)
    assert np.array_equal(one.sample(2, 0)[2], alone.sample(2, 0)[2]), "the first source draws as one alone does"


def test_rate_zero_needs_no_special_tokens(folders):
    sampling = open_sampling(folders, SamplingSettings(fim_rate=0.0, fim_tokens=("<|nowhere|>",)), 8, False, seed=1)
    assert sampling.objective.fill is None and all(samples.content == 8 and samples.filled_share == 0.0 for samples in sampling.samples)


def test_equal_special_tokens_are_refused(folders):
    prefix, suffix, middle = SamplingSettings.fim_tokens
    for tokens in ((prefix, suffix, suffix), (prefix, prefix, middle), (prefix, suffix, "<|endoftext|>")):
        with pytest.raises(UserError) as refused:
            open_sampling(folders, SamplingSettings(fim_rate=0.1, fim_tokens=tokens), 64, False, seed=1)
        end = next(iter(folders.values())).end_of_text
        assert str(refused.value) == (
            f"data.fim_tokens is {' '.join(tokens)}; it must be three different tokens, none of them the one that ends a document "
            f"(number {end})."
        )


def test_invalid_rate_and_short_samples_are_refused():
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=f"rate of fill-in-the-middle is {rate}; it must be at least 0 and at most 1"):
            fill(rate)
    with pytest.raises(UserError, match=r"sequence_length 11 is too short for fill-in-the-middle.*Use 12 or more"):
        fill(0.1).spare(11, np.array([1]))
