"""Documents into samples: every token is a target once an epoch, after the token before it, and documents do not see one another."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.sampling.best_fit import best_fit_decreasing
from data.sampling.packing import BestFitSamples, PackedSamples
from data.sampling.samples import IGNORED
from model.config import ModelConfig
from model.transformer import Transformer

ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 60}
END = 60_000
KINDS = pytest.mark.parametrize("kind", [PackedSamples, BestFitSamples])
SHARDS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), min_size=1, max_size=3)


def rows(samples, epoch=0):
    """Tokens, segments and targets of each sample."""
    return [samples.sample(number, epoch)[:3] for number in range(samples.num_samples)]


def split_into_shards(documents, lengths_of_shards):
    documents = iter(documents)
    return [[next(documents) for _ in lengths] for lengths in lengths_of_shards]


def textbook_best_fit_decreasing(pieces, size):
    """Put each piece into the fullest bin with room.  -> room left in each bin"""
    rooms = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else size) - piece)
    return rooms


def test_packed_samples_cut_the_stream_evenly(stream, counted):
    samples = PackedSamples(stream(counted(5, 6)), 4, END)
    assert samples.num_samples == 3
    tokens, segments, targets = (np.stack(field) for field in zip(*rows(samples), strict=True))
    assert tokens.tolist() == [[END, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 0]]
    assert targets.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, IGNORED]]
    assert segments.tolist() == [[1] * 4, [1] * 4, [1, 1, 1, 0]]
    assert tokens.dtype == segments.dtype == targets.dtype == np.int64


def test_document_mask_starts_each_document_with_end_of_text(stream, counted):
    samples = PackedSamples(stream(counted(3, 4, 2)), 8, END, document_mask=True)
    tokens, segments, targets = (np.stack(field) for field in zip(*rows(samples), strict=True))
    assert tokens.tolist() == [[END, 0, 1, END, 3, 4, 5, END], [7, 0, 0, 0, 0, 0, 0, 0]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert targets.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8] + [IGNORED] * 7]


def test_end_of_a_shard_is_the_end_of_a_document(stream, counted):
    (row,) = rows(PackedSamples(stream(counted(3), counted(3)), 6, END, document_mask=True))
    assert [field.tolist() for field in row] == [[END, 0, 1, END, 0, 1], [1, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 2]]


def test_best_fit_never_cuts_a_document_that_fits(stream, counted):
    samples = BestFitSamples(stream(counted(3, 11, 5, 2)), 8, END, document_mask=True)
    tokens, segments, targets = (np.stack(field) for field in zip(*rows(samples), strict=True))
    assert targets.tolist() == [[3, 4, 5, 6, 7, 8, 9, 10], [14, 15, 16, 17, 18, 0, 1, 2], [11, 12, 13, 19, 20] + [IGNORED] * 3]
    assert tokens.tolist() == [[END, 3, 4, 5, 6, 7, 8, 9], [END, 14, 15, 16, 17, END, 0, 1], [10, 11, 12, END, 19, 0, 0, 0]]
    assert segments.tolist() == [[1] * 8, [1] * 5 + [2] * 3, [1, 1, 1, 2, 2, 0, 0, 0]]
    assert samples.padding_share == 3 / 24


@given(
    shards=SHARDS, sequence_length=st.integers(1, 24), document_mask=st.booleans(), kind=st.sampled_from([PackedSamples, BestFitSamples])
)
@settings(**ONE_FIXTURE)
def test_every_token_is_a_target_after_the_token_before_it(stream, counted, shards, sequence_length, document_mask, kind):
    documents = counted(*[length for shard in shards for length in shard])
    before = {document[0]: END for document in documents if document}
    before |= {token: token - 1 for document in documents for token in document[1:]}
    of_document = {token: number for number, document in enumerate(documents) for token in document}
    samples = kind(stream(*split_into_shards(documents, shards)), sequence_length, END, document_mask)
    read = []
    for number, (tokens, segments, targets) in enumerate(rows(samples)):
        kept = targets != IGNORED
        pieces = samples.documents(number)
        assert samples.num_pieces(number) == len(pieces)
        told = [documents[piece.document][piece.first : piece.first + piece.num_tokens] for piece in pieces]
        assert targets[kept].tolist() == [token for piece in told for token in piece], "documents() returns what sample() has"
        assert all(told) and len({piece.document for piece in pieces}) == len(pieces)
        assert (segments[~kept] == 0).all() and not kept[kept.sum() :].any(), "padding is at the end"
        assert tokens[~kept].tolist() == [0] * (sequence_length - kept.sum())
        if document_mask:
            assert tokens[kept].tolist() == [before[token] for token in targets[kept]]
            assert segments[kept].tolist() == [place for place, piece in enumerate(told, start=1) for _ in piece]
        else:
            assert set(segments[kept]) == {1}
            inner = [token for token, previous in zip(targets[kept], tokens[kept], strict=True) if previous == token - 1]
            assert {token for token in targets[kept] if before[token] != END} <= set(inner)
        if kind is BestFitSamples:
            whole = [len(piece) == len(documents[of_document[piece[0]]]) for piece in told]
            assert all(whole) or any(len(documents[of_document[piece[0]]]) > sequence_length for piece in told)
        read += targets[kept].tolist()
    assert sorted(read) == list(range(sum(map(len, documents))))
    assert samples.padding_share == pytest.approx(1 - len(read) / (samples.num_samples * sequence_length))


@given(counts=st.lists(st.integers(0, 12), min_size=2, max_size=40))
@settings(deadline=None)
def test_best_fit_decreasing_equals_the_textbook_algorithm(counts):
    size = len(counts)
    pieces = [length for length, count in enumerate(counts) for _ in range(count) if length]
    groups = best_fit_decreasing(np.array(counts))
    rooms = [size - sum(length * count for length, count in inside) for bins, inside in groups for _ in range(bins)]
    assert sorted(rooms) == sorted(textbook_best_fit_decreasing(pieces, size))
    packed = [length for bins, inside in groups for length, count in inside for _ in range(bins * count)]
    assert sorted(packed) == sorted(pieces)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), sequence_length=st.integers(1, 20))
@settings(**ONE_FIXTURE)
def test_best_fit_has_as_many_samples_as_textbook_bins(stream, counted, lengths, sequence_length):
    pieces = [min(sequence_length, length - first) for length in lengths for first in range(0, length, sequence_length)]
    samples = BestFitSamples(stream(counted(*lengths)), sequence_length, END)
    assert samples.num_samples == len(textbook_best_fit_decreasing(pieces, sequence_length))


def test_best_fit_time_depends_on_lengths_not_on_pieces():
    lengths = np.random.default_rng(0).geometric(1 / 600, 10**7)
    groups = best_fit_decreasing(np.bincount(lengths % 2048, minlength=2048))
    assert sum(bins for bins, _ in groups) > 10**6
    assert len(groups) < 3 * 2048
    assert max(len(inside) for _, inside in groups) <= 11, "the room halves with every length: 2**11 = 2048"


def test_full_samples_are_found_among_many_documents(stream, counted):
    lengths = [(7 * number) % 45 for number in range(300)]
    samples = BestFitSamples(stream(counted(*lengths)), 10, END)
    read = [token for _, _, targets in rows(samples) for token in targets[targets != IGNORED].tolist()]
    assert sorted(read) == list(range(sum(lengths)))
    full = [targets.tolist() for _, _, targets in rows(samples)[: sum(length // 10 for length in lengths)]]
    assert full == sorted(full), "in the order of the documents"
    assert all(IGNORED not in targets for targets in full)


@KINDS
def test_empty_training_split_is_refused(stream, kind):
    with pytest.raises(UserError, match="no tokens to train on"):
        kind(stream(), 8, END)


@KINDS
def test_one_token_makes_a_sample(stream, kind):
    (row,) = rows(kind(stream([[7]]), 4, END))
    assert [field.tolist() for field in row] == [[END, 0, 0, 0], [1, 0, 0, 0], [7, IGNORED, IGNORED, IGNORED]]


@pytest.fixture(params=["learned", "rotary"])
def model(request):
    """Tiny, its weights far larger than fresh ones, so that what leaks is seen."""
    config = ModelConfig(
        vocab_size=64,
        sequence_length=24,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        positions=request.param,
        document_mask=True,
        initializer_range=0.3,
    )
    return Transformer(config, seed=1).eval()


def logits_of_documents(model, samples):
    """Document number -> the logits of its targets, piece by piece.  [tokens, vocab]"""
    found = {}
    for number in range(samples.num_samples):
        tokens, segments = (torch.from_numpy(field)[None] for field in samples.sample(number, 0)[:2])
        with torch.no_grad():
            (logits,) = model(tokens, segments)
        for segment, piece in enumerate(samples.documents(number), start=1):
            found[piece.document] = torch.cat([found.get(piece.document, logits[:0]), logits[segments[0] == segment]])
    return found


@KINDS
def test_masked_document_does_not_affect_its_neighbours(stream, model, kind):
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 64, length).tolist() for length in (5, 9, 4, 7, 30, 6, 3)]  # not one ends with end-of-text
    before = logits_of_documents(model, kind(stream(documents), 24, 0, document_mask=True))
    for changed in range(len(documents)):
        others = [document if number != changed else [token % 63 + 1 for token in document] for number, document in enumerate(documents)]
        after = logits_of_documents(model, kind(stream(others), 24, 0, document_mask=True))
        for number in range(len(documents)):
            assert torch.equal(before[number], after[number]) == (number != changed)


@KINDS
def test_packed_document_has_the_logits_of_the_document_alone(stream, model, kind):
    generator = np.random.default_rng(1)
    documents = [generator.integers(1, 64, length).tolist() for length in (5, 9, 4, 3, 8, 10)]
    samples = kind(stream(documents), 24, 0, document_mask=True)
    together = logits_of_documents(model, samples)
    whole = [piece.document for number in range(samples.num_samples) for piece in samples.documents(number)]
    for number, document in enumerate(documents):
        if whole.count(number) == 1:
            tokens = torch.tensor([[0, *document[:-1]]])
            with torch.no_grad():
                (alone,) = model(tokens, torch.ones_like(tokens))
            # Float32 sums of another shape, in another order; logits are of order 10.
            torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=1e-5)
    assert len(set(whole)) == len(documents)
