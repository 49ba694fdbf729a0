"""Samples into batches: every token is a target once at any world size, and padding is not counted."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.sampling.batches
import model.loss
from data.command_line import UserError
from data.sampling.batch_plan import BatchPlan, BatchSettings
from data.sampling.batches import IGNORED, TrainingBatches, evaluation_batches, target_tokens
from data.sampling.order import Blend, permute
from data.sampling.packing import BestFitSamples, PackedSamples

ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 40}
END = 60_000


def training_batches(sources, global_batch_size, micro_batch_size, seed=0, rank=0, world=1, weights=None):
    blend = Blend([source.num_samples for source in sources], weights, seed)
    return TrainingBatches(sources, blend, BatchPlan(BatchSettings(global_batch_size, micro_batch_size), 1), rank, world)


def kept_targets(batches):
    return [target for batch in batches for target in batch.targets[batch.targets != IGNORED].tolist()]


def test_data_and_model_ignore_the_same_target():
    assert data.sampling.batches.IGNORED == model.loss.IGNORED


def test_epoch_of_one_source_follows_the_permutation(stream, counted):
    samples = PackedSamples(stream(counted(5, 6)), 5, END)
    (batch,) = training_batches([samples], 3, 3, seed=7).step(1)
    order = permute(np.arange(3), 3, seed=7, epoch=1)
    assert batch.targets.tolist() == [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10] + [IGNORED] * 4][number] for number in order]
    assert batch.tokens.tolist() == [[[END, 0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]][number] for number in order]
    assert batch.segments.tolist() == [[[1] * 5, [1] * 5, [1, 0, 0, 0, 0]][number] for number in order]
    assert all(field.dtype == torch.int64 for field in (*batch.inputs, batch.targets))
    assert batch.inputs == (batch.tokens, batch.segments) and batch[3:] == (None, None, None, None)
    assert target_tokens([batch]) == 11


@pytest.mark.parametrize("world, micro_batch_size", [(1, 2), (2, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("kind", [PackedSamples, BestFitSamples])
def test_epoch_has_every_token_as_a_target_once(stream, counted, kind, world, micro_batch_size):
    text = stream(counted(27, 5), counted(28))  # tokens of the second shard begin at 0 again
    samples = kind(text, 8, END)
    assert samples.num_samples == 8
    targets = []
    for rank in range(world):
        batches = training_batches([samples], 4, micro_batch_size, seed=3, rank=rank, world=world)
        targets += kept_targets(batches.step(0) + batches.step(1))
    assert sorted(targets) == sorted(text.read(0, 60).tolist())


def test_all_ranks_together_read_the_samples_of_one_rank(stream, counted):
    samples = PackedSamples(stream(counted(100)), 4, END)
    alone = training_batches([samples], 8, 8, seed=1).step(5)[0].tokens
    shares = [training_batches([samples], 8, 2, seed=1, rank=rank, world=2).step(5) for rank in range(2)]
    in_turn = [batch.tokens for accumulated in zip(*shares, strict=True) for batch in accumulated]
    assert torch.equal(torch.cat(in_turn), alone)


def test_blend_reads_by_weight_and_names_the_source_of_each_row(stream, counted):
    sources = [PackedSamples(stream(counted(40)), 4, END), BestFitSamples(stream([[1000, 1001, 1002]] * 7), 4, END)]
    batches = training_batches(sources, 8, 2, weights=[0.75, 0.25])
    for step in range(6):
        rows = batches.step_samples(step)
        assert rows.shape == (4, 2, 3)
        assert (rows[..., 0] == 1).sum() == 2, "a quarter of eight"
        for batch, told in zip(batches.step(step), rows.tolist(), strict=True):
            for row, (source, epoch, number) in enumerate(told):
                expected = sources[source].sample(number, epoch)
                assert all(np.array_equal(field[row], wanted) for field, wanted in zip(batch[:3], expected[:3], strict=True))
    assert batches.step_samples(5)[..., 1].max() == 3, "samples 30 to 35 of the first, which has 10"


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    sequence_length=st.integers(1, 12),
    micro_batch_size=st.integers(1, 3),
    world=st.integers(1, 3),
    document_mask=st.booleans(),
)
@settings(**ONE_FIXTURE)
def test_evaluation_has_every_token_as_a_target_once(stream, counted, lengths, sequence_length, micro_batch_size, world, document_mask):
    text = stream(counted(*lengths))
    ranks = [
        list(evaluation_batches(text, sequence_length, micro_batch_size, END, rank, world, document_mask=document_mask))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "ranks must call the model together"
    assert sorted(target for batches in ranks for target in kept_targets(batches)) == list(range(sum(lengths)))
    starts = set(np.cumsum([0, *lengths])) if document_mask else {0}
    for batch in [batch for batches in ranks for batch in batches]:
        assert batch.tokens.shape == (micro_batch_size, sequence_length)
        assert torch.equal(batch.segments == 0, batch.targets == IGNORED), "padding is where nothing is a target"
        kept = batch.targets != IGNORED
        assert batch.tokens[kept].tolist() == [END if target in starts else target - 1 for target in batch.targets[kept].tolist()]


def test_evaluation_applies_the_document_mask(stream, counted):
    (batch,) = evaluation_batches(stream(counted(2, 2)), 5, 1, END, document_mask=True)
    assert batch.tokens.tolist() == [[END, 0, END, 2, 0]]
    assert batch.segments.tolist() == [[1, 1, 2, 2, 0]]
    assert batch.targets.tolist() == [[0, 1, 2, 3, IGNORED]]


@given(length=st.integers(1, 60), sequence_length=st.integers(1, 12), data=st.data())
@settings(**ONE_FIXTURE)
def test_overlapping_windows_count_each_token_once(stream, counted, length, sequence_length, data):
    stride = data.draw(st.integers(1, sequence_length))
    batches = list(evaluation_batches(stream(counted(length)), sequence_length, 1, END, stride=stride))
    assert kept_targets(batches) == list(range(length))
    for number, batch in enumerate(batches):
        count = int((batch.segments != 0).sum())
        assert batch.tokens[0, :count].tolist() == [END, *range(length)][number * stride : number * stride + count]
        assert count == sequence_length or number == len(batches) - 1


def test_limit_spreads_samples_over_the_whole_split(stream, counted):
    batches = list(evaluation_batches(stream(counted(100)), 10, 2, END, limit_samples=5))
    starts = [int(row[0]) for batch in batches for row in batch.targets if row[0] != IGNORED]
    assert starts == [0, 20, 40, 60, 80]


def test_evaluation_of_an_empty_split_is_refused(stream):
    with pytest.raises(UserError, match="has 0 tokens: no document was held out"):
        next(evaluation_batches(stream(), 5, 1, END))


def test_evaluation_of_one_token_works(stream):
    (batch,) = evaluation_batches(stream([[7]]), 3, 1, END)
    assert [field.tolist() for field in batch[:3]] == [[[END, 0, 0]], [[1, 0, 0]], [[7, IGNORED, IGNORED]]]


def test_indivisible_batch_is_refused_with_the_nearest_size(stream, counted):
    samples = PackedSamples(stream(counted(9)), 4, END)
    with pytest.raises(
        UserError, match=r"500 is not a multiple of batch\.micro_batch_size 4 x data_parallel_size 8 = 32\.\nNearest: 480 or 512"
    ):
        training_batches([samples], 500, 4, world=8)
