"""Samples of each objective: by hand, nothing lost, repeated after a resume and different in another epoch."""

import dataclasses
import gzip
import itertools
import typing

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.sampling.batch_plan import BatchPlan, BatchSettings
from data.sampling.batches import TrainingBatches, evaluation_batches, held_out_batches, target_classes, target_tokens
from data.sampling.masking import Masking
from data.sampling.objectives.classification import ClassificationSamples, classes_of
from data.sampling.objectives.masked import MaskedSamples
from data.sampling.objectives.next_sentence import NextSentenceSamples
from data.sampling.objectives.pairs import PairSamples
from data.sampling.objectives.prefix import PrefixSamples
from data.sampling.objectives.span_corruption import SpanCorruptionSamples, lengths_of, text_length
from data.sampling.objectives.table import OBJECTIVES
from data.sampling.order import Blend
from data.sampling.packing import BestFitSamples, PackedSamples
from data.sampling.samples import IGNORED, padding_like
from data.sampling.settings import ObjectiveName, SamplingSettings
from data.sampling.sources import open_folders, open_held_out, open_sampling
from data.shards import Shard, ShardWriter, TokenStream
from data.tokenization.learning import train_sentencepiece
from model.config import ModelConfig
from model.transformer import Transformer
from tests.ranks import REPOSITORY

ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 25}
CLASS, MASK, START, SENTINEL, END = 60_000, 60_001, 60_002, 60_100, 60_400
IS_TEXT = np.arange(END + 1) < CLASS
SENTINELS = range(SENTINEL, SENTINEL + 200)
BEGINS, ENDS = np.arange(END + 1) % 3 == 0, np.arange(END + 1) < 0
SHARDS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), min_size=1, max_size=3)
PAIRS = st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=9), min_size=1, max_size=3)


def masking(rate=0.15, whole_words=False):
    return Masking(rate, CLASS, MASK, END, IS_TEXT, (BEGINS, ENDS) if whole_words else None)


def rows(samples, epoch=0):
    return [samples.sample(number, epoch) for number in range(samples.num_samples)]


def same(one, other):
    return all(np.array_equal(here, there) for here, there in zip(one, other, strict=True))


def told(sample):
    """Return the tokens of an encoder's sample, with the hidden ones restored."""
    return np.where(sample.targets == IGNORED, sample.tokens, sample.targets)


@pytest.fixture
def ended(stream, counted):
    """A stream of documents of these lengths, shard by shard, each followed by end of text."""

    def make(*shards):
        documents = iter(counted(*itertools.chain(*shards)))
        return stream(*[[[*next(documents), END] for _ in lengths] for lengths in shards])

    return make


@pytest.fixture
def pairs(tmp_path):
    """A stream of shards of pairs of lists of ids, each list followed by end of text."""

    def make(*shards, end=END):
        opened = []
        for number, shard in enumerate(shards):
            with ShardWriter(tmp_path / f"pairs{number}", np.dtype("<u2"), sequences_per_document=2) as writer:
                for pair in shard:
                    writer.add(np.array([*pair[0], end, *pair[1], end], "<u2"), [len(pair[0]) + 1, len(pair[1]) + 1])
            opened.append(Shard(tmp_path / f"pairs{number}"))
        return TokenStream(opened, 0)

    return make


def test_prefix_segments_are_negative_and_only_its_last_target_counts(stream, counted):
    samples = PrefixSamples(PackedSamples(stream(counted(3, 6, 3)), 12, END, document_mask=True, seed=4))
    causal = samples.sample(0, 0).tokens
    lengths = set()
    for epoch in range(60):
        tokens, segments, targets = samples.sample(0, epoch)[:3]
        assert np.array_equal(tokens, causal) and np.array_equal(abs(segments), [1] * 3 + [2] * 6 + [3] * 3)
        prefix = int((segments == -2).sum())
        assert segments[3:9].tolist() == [-2] * prefix + [2] * (6 - prefix)
        assert targets[3:9].tolist() == [IGNORED] * (prefix - 1) + list(range(3 + prefix - 1, 9))
        lengths.add(prefix)
    assert lengths == {1, 2, 3, 4, 5, 6}


@given(
    shards=SHARDS, sequence_length=st.integers(1, 20), document_mask=st.booleans(), kind=st.sampled_from([PackedSamples, BestFitSamples])
)
@settings(**ONE_FIXTURE)
def test_every_segment_of_a_prefix_sample_has_a_target(ended, shards, sequence_length, document_mask, kind):
    causal = kind(ended(*shards), sequence_length, END, document_mask)
    for plain, sample in zip(rows(causal), rows(PrefixSamples(causal)), strict=True):
        assert np.array_equal(abs(sample.segments), plain.segments)
        for segment in range(1, plain.segments.max() + 1):
            mine = plain.segments == segment
            prefix, counted = sample.segments[mine] < 0, sample.targets[mine] != IGNORED
            assert prefix[0] and counted.sum() == len(prefix) - prefix.sum() + 1 and (np.diff(counted.astype(int)) >= 0).all()
            assert np.array_equal(sample.targets[mine][counted], plain.targets[mine][counted])


@given(
    shards=SHARDS,
    sequence_length=st.integers(3, 24),
    way=st.sampled_from([("packed", False), ("best_fit", False), ("best_fit", True)]),
    rate=st.sampled_from([0.15, 0.6, 0.99]),
    whole_words=st.booleans(),
)
@settings(**ONE_FIXTURE)
def test_masked_samples_frame_their_texts_and_lose_no_token(ended, shards, sequence_length, way, rate, whole_words):
    samples = MaskedSamples(ended(*shards), sequence_length, masking(rate, whole_words), *way, token_types=True, seed=2)
    read = []
    for number, sample in enumerate(rows(samples, epoch=1)):
        whole, used = told(sample), sample.segments > 0
        assert not used[used.sum() :].any() and not sample.token_types.any()
        assert whole[0] == CLASS and whole[used][-1] == END and sample.tokens[~used].tolist() == [0] * (~used).sum()
        texts = np.split(whole[used], np.flatnonzero(whole[used] == CLASS)[1:])
        assert len(texts) == (1 if way[0] == "packed" else len(samples.documents(number)))
        assert [set(numbers) for numbers in np.split(sample.segments[used], np.flatnonzero(whole[used] == CLASS)[1:])] == [
            {place} if way[1] else {1} for place in range(1, len(texts) + 1)
        ]
        assert (sample.targets < CLASS).all(), "marks are not asked for"
        text = whole[used & IS_TEXT[whole]]
        asked = int((sample.targets != IGNORED).sum())
        number = max(1, round(rate * len(text)))
        assert asked <= number or whole_words
        assert asked == (min(number, len(text)) if not whole_words else asked)
        read += text.tolist()
    assert sorted(read) == list(range(sum(map(sum, shards))))


def test_best_fit_masked_samples_cut_only_long_documents(ended):
    samples = MaskedSamples(ended([4, 13, 2]), 8, masking(), "best_fit", True)
    assert [told(sample).tolist() for sample in rows(samples)] == [
        [CLASS, 4, 5, 6, 7, 8, 9, END],
        [CLASS, 10, 11, 12, 13, 14, 15, END],
        [CLASS, 0, 1, 2, 3, END, 0, 0],
        [CLASS, 17, 18, END, CLASS, 16, END, 0],
    ]


def test_hidden_tokens_become_mask_random_or_stay_80_10_10(ended):
    sample = MaskedSamples(ended([50_000]), 50_002, masking(0.3)).sample(0, 0)
    asked = sample.targets != IGNORED
    assert asked.sum() == round(0.3 * 50_000)
    is_mask, is_kept = (sample.tokens == MASK)[asked].mean(), (sample.tokens == sample.targets)[asked].mean()
    assert is_mask == pytest.approx(0.8, abs=0.013) and is_kept == pytest.approx(0.1, abs=0.01), "four standard deviations of 15,000 draws"
    changed = sample.tokens[asked & (sample.tokens != MASK) & (sample.tokens != sample.targets)]
    assert changed.max() < CLASS and changed.min() >= 0 and len(np.unique(changed)) > 1400, "of the whole vocabulary, no special token"
    thirds = np.array_split(asked, 3)
    assert [part.mean() for part in thirds] == pytest.approx([0.3] * 3, abs=0.01), "everywhere alike"


@given(number=st.integers(0, 10**6), length=st.integers(4, 200), rate=st.sampled_from([0.1, 0.15, 0.5]))
@settings(**ONE_FIXTURE)
def test_whole_words_are_hidden_whole_up_to_the_rate(ended, number, length, rate):
    samples = MaskedSamples(ended([length]), length + 2, masking(rate, whole_words=True), seed=number)
    asked = samples.sample(0, 0).targets[1 : length + 1] != IGNORED
    words = [asked[first : first + 3] for first in range(0, length, 3)]
    assert all(word.all() or not word.any() for word in words)
    most = max(1, round(rate * length))
    shortest = min(map(len, words))
    assert asked.sum() == shortest > most or most - 2 <= asked.sum() <= most


def test_word_begins_after_a_special_token_and_after_a_space(stream):
    inner, space = 1, 2  # neither begins a word of itself
    table = Masking(0.5, CLASS, MASK, END, IS_TEXT, (BEGINS, np.arange(END + 1) == space))
    samples = MaskedSamples(stream([[inner, inner, space, inner, inner, inner, END]]), 9, table)
    chosen = {tuple(np.flatnonzero(samples.sample(0, epoch).targets != IGNORED).tolist()) for epoch in range(200)}
    assert chosen == {(1, 2, 3), (4, 5, 6)}


def test_class_is_whether_the_second_part_is_from_another_document(ended):
    samples = NextSentenceSamples(ended([9, 25], [7]), 13, masking(), seed=1)
    assert [samples.documents(number)[0] for number in range(5)] == [(0, 0, 9), (1, 0, 10), (1, 10, 10), (1, 20, 5), (2, 0, 7)]
    of_document = np.repeat([0, 1, 2], [9, 25, 7])
    classes, cuts = [], set()
    for epoch, number in itertools.product(range(40), range(5)):
        sample = samples.sample(number, epoch)
        whole, used = told(sample), sample.segments == 1
        first, second = (whole[used & (sample.token_types == part)] for part in (0, 1))
        assert whole[0] == CLASS and first[-1] == second[-1] == END and len(first) >= 3 and len(second) >= 2
        before, after = first[1:-1], second[:-1]
        assert (np.diff(before) == 1).all() and (np.diff(after) == 1).all(), "each is a stretch of one document"
        follows = after[0] == before[-1] + 1 and of_document[after[0]] == of_document[before[-1]]
        assert follows == (sample.classes == 0)
        assert follows or of_document[after[0]] != of_document[before[0]]
        assert not sample.token_types[~used].any() and not sample.segments[used.sum() :].any()
        classes.append(int(sample.classes))
        cuts.add((number, len(before)))
    assert np.mean(classes) == pytest.approx(0.5, abs=0.14), "four standard deviations of 200 draws"
    assert len(cuts) == 8 + 9 + 9 + 4 + 6, "every place comes"


def test_piece_of_one_token_gets_another_document(ended):
    samples = NextSentenceSamples(ended([11, 3]), 13, masking())
    assert samples.documents(1) == [(0, 10, 1)]
    assert {int(samples.sample(1, epoch).classes) for epoch in range(20)} == {1}


def test_token_types_change_after_the_first_end_of_text(stream):
    samples = NextSentenceSamples(stream([[1, 2, END, 3, 4, END], [5, 6, END]]), 9, masking())
    for epoch in range(40):
        sample = samples.sample(0, epoch)
        second = np.flatnonzero(sample.token_types)
        assert len(second) and (sample.tokens[[second[0] - 1, second[-1]]] == END).all()


def test_next_sentence_with_one_document_is_refused(ended):
    with pytest.raises(UserError, match=r"another document, but .* has 1 with text; prepare at least 2"):
        NextSentenceSamples(ended([30, 0]), 13, masking())


@pytest.mark.parametrize(
    ("source", "rate", "span", "text", "target"),
    [(512, 0.15, 3.0, 568, 114), (1024, 0.15, 3.0, 1137, 229), (2, 0.15, 3.0, 1, 1)],
)
def test_text_and_target_lengths_equal_t5s(source, rate, span, text, target):
    assert text_length(source, rate, span) == text
    assert lengths_of(text, rate, span) == (source, target)


@given(
    shards=SHARDS,
    sequence_length=st.integers(2, 40),
    rate=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    span_length=st.sampled_from([1.0, 3.0, 8.0]),
)
@settings(**ONE_FIXTURE)
def test_source_and_target_of_span_corruption_make_the_text(ended, shards, sequence_length, rate, span_length):
    text = ended(*shards)
    samples = SpanCorruptionSamples(text, sequence_length, rate, span_length, SENTINELS, END, START, seed=3)
    read = []
    for number, sample in enumerate(rows(samples)):
        assert len(sample.source) == sequence_length and len(sample.tokens) == samples.target_length
        source, target = sample.source[sample.source_segments == 1], sample.targets[sample.segments == 1]
        assert (sample.targets[sample.segments == 0] == IGNORED).all()
        assert source[-1] == target[-1] == END
        assert sample.tokens[sample.segments == 1].tolist() == [START, *target[:-1].tolist()]
        sentinels = np.arange(SENTINEL, SENTINEL + np.isin(source, SENTINELS).sum())
        assert np.array_equal(target[np.isin(target, SENTINELS)], sentinels), "in order, in both"
        spans = {
            int(span[0]): span[1:].tolist() for span in np.split(target[:-1], np.flatnonzero(np.isin(target[:-1], SENTINELS))) if len(span)
        }
        assert all(spans.values()), "no span is empty"
        joined = [token for one in source[:-1].tolist() for token in spans.get(one, [one])]
        is_ended = len(joined) < sum(piece.num_tokens for piece in samples.documents(number))  # a document's end is the sample's
        read += joined + [END] * is_ended
        if number < samples.num_samples - 1 and span_length > 1 and rate < 0.9 and not is_ended:
            assert (sample.source_segments == 1).all() and (sample.segments == 1).all(), "no padding but in the last"
    assert read == text.read(0, len(text)).tolist()


def test_spans_have_the_requested_mean_length(ended):
    samples = SpanCorruptionSamples(ended([20_000]), 512, 0.15, 3.0, SENTINELS, END, START)
    spans = [np.diff(np.flatnonzero(np.isin(sample.targets, SENTINELS)), append=113) - 1 for sample in rows(samples)[:-1]]
    assert {len(lengths) for lengths in spans} == {28} and {int(lengths.sum()) for lengths in spans} == {85}
    assert np.std(np.concatenate(spans)) > 1 and np.concatenate(spans).min() == 1


def test_pairs_share_a_sample_by_hand(pairs):
    stream = pairs([([1, 2], [11]), ([3], [12, 13])])
    (sample,) = rows(PairSamples(stream, 6, 7, END, START))
    first, second = ([1, 2], [11]), ([3], [12, 13])
    if sample.source[0] == 3:
        first, second = second, first
    assert sample.source.tolist() == [*first[0], END, *second[0], END, 0]
    assert sample.source_segments.tolist() == [1] * (len(first[0]) + 1) + [2] * (len(second[0]) + 1) + [0]
    assert sample.targets.tolist() == [*first[1], END, *second[1], END, IGNORED, IGNORED]
    assert sample.tokens.tolist() == [START, *first[1], START, *second[1], 0, 0]
    assert sample.segments.tolist() == [1] * (len(first[1]) + 1) + [2] * (len(second[1]) + 1) + [0, 0]


@given(lengths=PAIRS, sequence_length=st.integers(2, 20), target_length=st.integers(2, 20))
@settings(**ONE_FIXTURE)
def test_each_pair_is_read_once_an_epoch_in_one_segment(pairs, lengths, sequence_length, target_length):
    """The tokens of a pair are its number."""
    sides = [list(side) for side in itertools.chain(*lengths)]
    numbers = iter(range(len(sides)))
    stream = pairs(
        *[[([number] * first, [number] * second) for (first, second), number in zip(shard, numbers, strict=False)] for shard in lengths]
    )
    samples = PairSamples(stream, sequence_length, target_length, END, START, seed=7)
    found, room = [], []
    for number, sample in enumerate(rows(samples)):
        documents = [piece.document for piece in samples.documents(number)]
        assert sample.source_segments.max() == sample.segments.max() == len(documents)
        for segment, document in enumerate(documents, start=1):
            source, target = sample.source[sample.source_segments == segment], sample.targets[sample.segments == segment]
            first, second = sides[document]
            assert samples.documents(number)[segment - 1].num_tokens == len(source) + len(target)
            assert source.tolist() == [document] * min(first, sequence_length - 1) + [END]
            assert target.tolist() == [document] * min(second, target_length - 1) + [END]
            assert sample.tokens[sample.segments == segment].tolist() == [START, *target[:-1].tolist()]
        found += documents
        room.append(((sample.source_segments == 0).sum(), (sample.segments == 0).sum()))
        if number:
            first, second = sides[documents[0]]
            assert min(first + 1, sequence_length) > room[-2][0] or min(second + 1, target_length) > room[-2][1], "it would have fitted"
    assert sorted(found) == list(range(len(sides)))
    assert samples.num_cut == sum(first >= sequence_length or second >= target_length for first, second in sides)
    assert samples.padding_share == pytest.approx(np.sum(room) / (len(room) * (sequence_length + target_length)))


def test_pairs_of_a_sample_are_drawn_by_the_seed(pairs):
    stream = pairs([([number], [number]) for number in range(400)])
    one, other = (PairSamples(stream, 40, 40, END, START, seed) for seed in (1, 2))
    together = [[piece.document for piece in one.documents(number)] for number in range(20)]
    assert together != [[piece.document for piece in other.documents(number)] for number in range(20)]
    assert np.mean([abs(a - b) == 1 for sample in together for a, b in itertools.pairwise(sample)]) < 0.05


def test_a_million_pairs_are_packed_quickly():
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 40, (10**6, 2))

    class Lengths:
        num_documents = len(lengths)
        sequence_lengths = lengths

    samples = PairSamples(Lengths(), 256, 256, END, START)
    assert samples.padding_share < 0.13


@pytest.mark.parametrize("positions", ["sinusoidal", "relative"])
def test_packed_pair_has_the_logits_of_the_pair_alone(pairs, positions):
    config = ModelConfig(
        vocab_size=64,
        sequence_length=24,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        positions=positions,
        architecture="encoder_decoder",
        initializer_range=0.3,
    )
    model, generator = Transformer(config, seed=1).eval(), np.random.default_rng(0)
    some = [tuple(generator.integers(1, 64, length).tolist() for length in lengths) for lengths in ((5, 3), (2, 7), (8, 8))]
    stream = pairs(some, end=0)
    together, alone = PairSamples(stream, 24, 24, 0, 0), PairSamples(stream, 9, 9, 0, 0)
    assert (together.num_samples, alone.num_samples) == (1, 3)

    def logits(samples, number):
        batch = list(held_out_batches(samples, 1))[number]
        with torch.no_grad():
            found = model(*batch.inputs)[0]
        pieces = samples.documents(number)
        return {piece.document: found[batch.segments[0] == place] for place, piece in enumerate(pieces, start=1)}

    apart = logits(alone, 0) | logits(alone, 1) | logits(alone, 2)
    for document, found in logits(together, 0).items():
        # Float32 sums of another shape, in another order; logits are of order 10.
        torch.testing.assert_close(found, apart[document], atol=1e-4, rtol=1e-5)


def test_multi30k_needs_little_padding(pairs):
    folder = REPOSITORY.parent / "shared/corpora/multi30k-en-de"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    texts = [gzip.decompress((folder / f"train.{language}.gz").read_bytes()).decode().splitlines() for language in ("en", "de")]
    words = [[[1] * len(text.split()) for text in side] for side in texts]  # of both languages about as many a sentence
    samples = PairSamples(pairs(list(zip(*words, strict=True))), 128, 128, END, START)
    assert samples.num_cut == 0 and samples.padding_share < 0.12


def test_class_is_the_index_of_the_label(pairs):
    stream = pairs([([1, 2, 3], [7, 7]), ([4], [8])], [([5, 6, 9, 9, 9], [7])])
    classes = classes_of(stream, [[8], [7, 7], [9]])
    assert classes.tolist() == [1, 0, -1]
    samples = ClassificationSamples(stream, 6, classes, CLASS, END, token_types=True)
    assert [sample.tokens.tolist() for sample in rows(samples)] == [
        [CLASS, 1, 2, 3, END, 0],
        [CLASS, 4, END, 0, 0, 0],
        [CLASS, 5, 6, 9, 9, END],
    ]
    assert [sample.segments.tolist() for sample in rows(samples)] == [[1] * 5 + [0], [1] * 3 + [0] * 3, [1] * 6]
    assert all((sample.targets == IGNORED).all() and not sample.token_types.any() for sample in rows(samples))
    assert [int(sample.classes) for sample in rows(samples)] == [1, 0, -1]
    assert samples.num_cut == 1 and samples.padding_share == 1 - (4 + 2 + 5) / 18


def kinds(ended, pairs):
    """Return samples of each kind, with enough text for their draws to differ."""
    text = ended([40, 60, 35], [80])
    some = pairs([([1, 2, 3], [4]), ([5], [6, 7])])
    return {
        "causal": PackedSamples(text, 16, END),
        "prefix": PrefixSamples(PackedSamples(text, 16, END, True)),
        "masked": MaskedSamples(text, 16, masking()),
        "next_sentence": NextSentenceSamples(text, 16, masking()),
        "span_corruption": SpanCorruptionSamples(text, 16, 0.3, 2.0, SENTINELS, END, START),
        "pairs": PairSamples(some, 4, 5, END, START),
        "classification": ClassificationSamples(some, 6, np.array([0, 1]), CLASS, END),
    }


def test_draws_repeat_and_differ_by_epoch_and_source(ended, pairs):
    text = ended([200])
    for make in (
        lambda source: PrefixSamples(PackedSamples(text, 64, END, seed=1, source=source)),
        lambda source: MaskedSamples(text, 64, masking(), seed=1, source=source),
        lambda source: NextSentenceSamples(ended([200, 90]), 64, masking(), 1, source),
        lambda source: SpanCorruptionSamples(text, 64, 0.15, 3.0, SENTINELS, END, START, 1, source),
    ):
        samples = make(0)
        before = samples.sample(0, 3)
        samples.sample(0, 4), samples.sample(1, 3)
        assert same(before, samples.sample(0, 3)) and same(before, make(0).sample(0, 3))
        assert not same(before, samples.sample(0, 4)) and not same(before, make(1).sample(0, 3))


def test_every_objective_makes_batches_of_one_shape(ended, pairs):
    fields = {
        "causal": ("tokens", "segments"),
        "masked": ("tokens", "segments"),
        "next_sentence": ("tokens", "segments", "token_types"),
        "pairs": ("source", "source_segments", "tokens", "segments"),
        "span_corruption": ("source", "source_segments", "tokens", "segments"),
    }
    for name, samples in kinds(ended, pairs).items():
        plan = BatchPlan(BatchSettings(3, 3), samples.sequence_length)
        (batch,) = TrainingBatches([samples], Blend([samples.num_samples], None, 1), plan).step(0)
        assert batch.source is None if samples.target_length is None else batch.source.shape == (3, samples.sequence_length)
        assert batch.tokens.shape == batch.targets.shape == (3, samples.target_length or samples.sequence_length)
        if name in fields:
            assert all(one is getattr(batch, field) for one, field in zip(batch.inputs, fields[name], strict=True))
        assert all(field.dtype == torch.int64 for field in batch if field is not None)
        assert (batch.classes is not None) == (name in ("next_sentence", "classification"))
        assert target_classes([batch, batch]) == (0 if batch.classes is None else 6)
        halved = batch.map(lambda field: field[:1])
        assert [None if field is None else len(field) for field in halved] == [None if field is None else 1 for field in batch]


@pytest.mark.parametrize("world", [1, 2])
def test_held_out_batches_have_each_sample_once_in_order(ended, pairs, world):
    for name, samples in kinds(ended, pairs).items():
        ranks = [list(held_out_batches(samples, 2, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1, "ranks must call the model together"
        batches = [batch for accumulated in zip(*ranks, strict=True) for batch in accumulated]
        in_turn = [batch.map(lambda field, row=row: field[row]) for batch in batches for row in range(2)]
        expected = rows(samples)
        padding = in_turn[len(expected) :]
        assert all(same(read[:3], sample[:3]) for read, sample in zip(in_turn, expected, strict=False)), name
        assert all(same(read[:3], padding_like(expected[0])[:3]) for read in padding)
        assert target_tokens(batches) == sum(int((sample.targets != IGNORED).sum()) for sample in expected)
        assert target_classes(batches) == (len(expected) if expected[0].classes is not None else 0)


def test_causal_held_out_batches_equal_evaluation_batches(ended):
    text = ended([40, 60, 35], [80])
    samples = PackedSamples(text, 16, END, document_mask=True)
    for limit, rank in itertools.product((None, 5), (0, 1)):
        held_out = held_out_batches(samples, 2, rank, 2, limit)
        evaluation = evaluation_batches(text, 16, 2, END, rank, 2, limit, document_mask=True)
        assert all(same(one[:3], other[:3]) for one, other in zip(held_out, evaluation, strict=True))


SPECIAL = ("[CLS]", "[MASK]", *(f"<extra_id_{number}>" for number in range(4)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, str]:
    """Folders with one tokenizer: single texts, and texts with labels."""
    root = tmp_path_factory.mktemp("objectives")
    texts = [f"the {colour} fish number {number} swims in the sea" for number in range(60) for colour in ("red", "blue")]
    train_sentencepiece(texts, root / "tokenizer.model", 385, special_tokens=SPECIAL)
    (root / "texts.txt").write_text("\n".join(texts))
    (root / "labels.tsv").write_text("text\tlabel\n" + "\n".join(f"{text}\t{text.split()[1]}" for text in texts))
    for name, options in {"texts.txt": {"separator": "line"}, "labels.tsv": {"pair_field": "label"}}.items():
        output = str(root / name.partition(".")[0])
        prepare(
            PrepareSettings(
                input=(str(root / name),), tokenizer=str(root / "tokenizer.model"), output=output, held_out=0.2, workers=1, **options
            )
        )
    return {"texts": str(root / "texts"), "labels": str(root / "labels")}


def opened(folder, architecture="decoder", sequence_length=24, document_mask=False, token_types=0, **options):
    return open_sampling(open_folders([folder]), SamplingSettings(**options), sequence_length, document_mask, 1, architecture, token_types)


def test_default_objective_follows_the_architecture(prepared):
    for architecture, objective in {"decoder": "causal", "encoder": "masked", "encoder_decoder": "span_corruption"}.items():
        sampling = opened(prepared["texts"], architecture, 14)
        assert sampling.objective.name == objective
        assert (sampling.bytes_per_token is not None) == (objective == "causal")
        assert (sampling.target_length is not None) == (architecture == "encoder_decoder")


def test_table_has_every_objective_of_the_settings():
    assert sorted(OBJECTIVES) == sorted(typing.get_args(ObjectiveName))
    assert all(objective.name == name for name, objective in OBJECTIVES.items())
    names = {field.name for field in dataclasses.fields(SamplingSettings)}
    assert all(names.issuperset(objective.own_settings) for objective in OBJECTIVES.values())


def test_labels_become_classes_in_both_splits(prepared):
    options = {"objective": "classification", "labels": ("blue", "red")}
    sampling = opened(prepared["labels"], "encoder", **options)
    held_out = open_held_out(sampling.folders, SamplingSettings(**options), 24, False, "encoder")
    for samples in (*sampling.samples, *held_out.values()):
        assert samples.num_samples > 5
        for sample in rows(samples):
            text = sampling.tokenizer.decode(sample.tokens[sample.segments == 1].tolist())
            assert text.split()[1] == ("blue", "red")[int(sample.classes)]


@pytest.mark.parametrize("objective", ["pairs", "span_corruption"])
def test_decoder_reads_the_given_start_token_first(prepared, objective):
    folder, options = prepared["labels" if objective == "pairs" else "texts"], {"objective": objective, "start_token": "[CLS]"}
    sampling = opened(folder, "encoder_decoder", 14, **options)
    (held_out,) = open_held_out(sampling.folders, SamplingSettings(**options), 14, False, "encoder_decoder").values()
    assert sampling.start_token == sampling.tokenizer.special_tokens["[CLS]"] != sampling.end_of_text
    for start, samples in (
        (sampling.start_token, sampling.samples[0]),
        (sampling.start_token, held_out),
        (sampling.end_of_text, opened(folder, "encoder_decoder", 14, objective=objective).samples[0]),
    ):
        sample = samples.sample(0, 0)
        first = np.flatnonzero(np.diff(sample.segments, prepend=0) > 0)
        assert (sample.tokens[first] == start).all() and sample.targets[sample.segments > 0][-1] == sampling.end_of_text


FITTING = {
    "causal": ("texts", "decoder", {}),
    "prefix": ("texts", "decoder", {}),
    "masked": ("texts", "encoder", {}),
    "next_sentence": ("texts", "encoder", {"objective": "masked", "next_sentence": True, "token_types": 2}),
    "classification": ("labels", "encoder", {"labels": ("blue", "red")}),
    "span_corruption": ("texts", "encoder_decoder", {}),
    "pairs": ("labels", "encoder_decoder", {}),
}
"""For each objective the records that it learns, the architecture, and its settings."""


@pytest.mark.parametrize("records", ["texts", "labels"])
@pytest.mark.parametrize("objective", [*OBJECTIVES, "next_sentence"])
def test_objectives_refuse_records_that_do_not_fit(prepared, objective, records):
    fitting, architecture, options = FITTING[objective]
    options = {"objective": objective, "sequence_length": 14} | options
    if records == fitting:
        assert opened(prepared[records], architecture, **options).samples[0].num_samples
        return
    needs = "holds single texts; data.objective .* needs pairs" if fitting == "labels" else "holds pairs of texts .*; data.objective "
    with pytest.raises(UserError, match=needs) as refused:
        opened(prepared[records], architecture, **options)
    assert fitting == "labels" or (
        "Use data.objective classification (model.architecture encoder) or pairs (model.architecture encoder_decoder). To learn both as "
        "one text, write them into one field and prepare it without --pair_field."
    ) in str(refused.value)
    of_model = {name: options.pop(name) for name in ("sequence_length", "token_types") if name in options}
    with pytest.raises(UserError, match=needs):
        sampling = SamplingSettings(**options)
        open_held_out(
            open_folders([prepared[records]]), sampling, of_model["sequence_length"], False, architecture, of_model.get("token_types", 0)
        )


def test_labels_with_the_same_tokens_are_refused(tmp_path):
    words = {word: number for number, word in enumerate(("[UNK]", "[SEP]", "[CLS]", "text", "good"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[SEP]", "[CLS]"])
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "labels.tsv").write_text("text\tlabel\n" + "text\tbad\ntext\tgood\n" * 9)
    prepare(
        PrepareSettings(
            input=(str(tmp_path / "labels.tsv"),),
            tokenizer=str(tmp_path / "words.json"),
            output=str(tmp_path / "prepared"),
            pair_field="label",
            workers=1,
        )
    )
    with pytest.raises(UserError, match=r"data.labels bad, worse have the same tokens in .*, so they cannot be distinguished"):
        opened(str(tmp_path / "prepared"), "encoder", objective="classification", labels=("bad", "good", "worse"))


def test_held_out_masks_are_fixed_and_cover_the_split(prepared):
    folders = open_folders([prepared["texts"]])
    (samples,) = open_held_out(folders, SamplingSettings(mask_rate=0.3), 24, False, "encoder").values()
    assert samples.num_samples == -(-len(folders["texts"].splits["validation"]) // 22)
    assert same(
        samples.sample(0, 0),
        next(iter(open_held_out(folders, SamplingSettings(mask_rate=0.3), 24, False, "encoder").values())).sample(0, 0),
    )


WRONG = {
    "data.objective is masked; a model.architecture decoder learns causal or prefix": {"objective": "masked"},
    "data.objective is causal; a model.architecture encoder learns masked or class": {"objective": "causal", "architecture": "encoder"},
    "data.fim_rate is 0.5; it is for data.objective causal, and this is prefix": {"objective": "prefix", "fim_rate": 0.5},
    "data.whole_words is true; it is for data.objective masked, and this is causal": {"whole_words": True},
    "data.target_length is 9; it is for data.objective pairs": {"target_length": 9, "architecture": "encoder_decoder"},
    "data.labels is a b; it is for data.objective classification": {"labels": ("a", "b")},
    "data.packing is best_fit; it is for": {"objective": "span_corruption", "packing": "best_fit", "architecture": "encoder_decoder"},
    "data.mask_rate is 1.0; it must be above 0 and below 1": {"mask_rate": 1.0, "architecture": "encoder"},
    "data.span_length is 0.5; it must be at least 1": {"span_length": 0.5, "architecture": "encoder_decoder"},
    "Set data.packing best_fit, or model.document_mask false": {"architecture": "encoder", "document_mask": True},
    "model.token_types is 0; data.next_sentence needs 2": {"architecture": "encoder", "next_sentence": True},
    "a sample of data.objective span_corruption is one text": {"architecture": "encoder_decoder", "document_mask": True},
    "data.objective pairs needs pairs: prepare it with --pair_field": {"objective": "pairs", "architecture": "encoder_decoder"},
    r'has no special token "\[CLSS\]". Did you mean': {"architecture": "encoder", "class_token": "[CLSS]"},
    "data.mask_token is <mask>; it is for data.objective masked, and this is causal": {"mask_token": "<mask>"},
    "data.start_token is <s>; it is for data.objective span_corruption or pairs": {"architecture": "encoder", "start_token": "<s>"},
    r'has no special token "<extra_id_9>"': {"architecture": "encoder_decoder", "start_token": "<extra_id_9>"},
    "data.target_length is 0; data.objective pairs needs room": {
        "objective": "pairs",
        "architecture": "encoder_decoder",
        "target_length": 0,
        "folder": "labels",
    },
    "data.target_length is 25; it must be at most model.sequence_length 24": {
        "objective": "pairs",
        "architecture": "encoder_decoder",
        "target_length": 25,
        "sequence_length": 24,
        "folder": "labels",
    },
    "must be two different tokens, neither of them the one that ends": {"architecture": "encoder", "class_token": "[MASK]"},
    r"needs 5 sentinels for model.sequence_length 96, <extra_id_0> to <extra_id_4>; .* has 4 of them": {
        "architecture": "encoder_decoder",
        "sequence_length": 96,
    },
    "model.sequence_length is 2; data.objective masked needs room for": {"architecture": "encoder", "sequence_length": 2},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_unfit_settings_are_refused_with_their_own_message(prepared, sentence):
    options = {"folder": "texts"} | WRONG[sentence]
    with pytest.raises(UserError, match=sentence):
        opened(prepared[options.pop("folder")], **options)


def test_unknown_and_missing_labels_are_refused(prepared):
    with pytest.raises(UserError, match=r'labels.tsv, byte \d+: the label "blue" is not in data.labels \(red, green\); \d+ documents'):
        opened(prepared["labels"], "encoder", objective="classification", labels=("red", "green"))
    with pytest.raises(UserError, match=r"needs data.labels, each label once; the first documents of .* have: blue, red"):
        opened(prepared["labels"], "encoder", objective="classification")
