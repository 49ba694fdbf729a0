"""Samples into batches: every token a target once, padding and other documents none."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.batches
import model.loss
from data.batches import IGNORED, CausalBatches, evaluation_batches, target_tokens
from data.command_line import UserError

ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 40}


def counted(*lengths):
    """Documents of these lengths; each token is its own place in the stream."""
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


def test_data_and_model_ignore_the_same_target():
    assert data.batches.IGNORED == model.loss.IGNORED


def test_neighbouring_samples_share_one_token(stream):
    batches = CausalBatches(stream(counted(5, 6)), 5, global_batch_size=2, micro_batch_size=2, seed=0)
    (batch,) = batches.step(0)
    assert batches.num_samples == 2
    order = batch.tokens[:, 0].argsort()
    assert batch.tokens[order].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert batch.targets[order].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert batch.segments.tolist() == [[1] * 5] * 2
    assert all(field.dtype == torch.int64 for field in batch)
    assert target_tokens([batch]) == 10


@pytest.mark.parametrize("world, micro_batch_size", [(1, 2), (2, 2), (2, 1), (4, 1)])
def test_an_epoch_reads_every_token_as_a_target_once(stream, world, micro_batch_size):
    text = stream(counted(30, 7), counted(28))  # tokens of the second shard begin at 0 again
    targets = []
    for rank in range(world):
        batches = CausalBatches(text, 8, 4, micro_batch_size, seed=3, rank=rank, world=world)
        targets += [target for step in range(2) for batch in batches.step(step) for target in batch.targets.flatten().tolist()]
    assert sorted(targets) == sorted(text.read(1, 64).tolist())


def test_ranks_together_read_what_one_rank_reads(stream):
    text = stream(counted(100))
    alone = CausalBatches(text, 4, 8, 8, seed=1).step(5)[0].tokens
    shares = [CausalBatches(text, 4, 8, 2, seed=1, rank=rank, world=2).step(5) for rank in range(2)]
    in_turn = [batch.tokens for accumulated in zip(*shares, strict=True) for batch in accumulated]
    assert torch.equal(torch.cat(in_turn), alone)


def test_a_document_mask_numbers_documents_and_drops_their_first_tokens(stream):
    (batch,) = CausalBatches(stream(counted(3, 4, 2)), 8, 1, 1, seed=0, document_mask=True).step(0)
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]
    assert batch.targets.tolist() == [[1, 2, IGNORED, 4, 5, 6, IGNORED, 8]]
    assert target_tokens([batch]) == 6


def test_a_shards_end_is_a_documents_end(stream):
    (batch,) = CausalBatches(stream(counted(3), counted(3)), 5, 1, 1, seed=0, document_mask=True).step(0)
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2]]
    assert batch.targets.tolist() == [[1, 2, IGNORED, 1, 2]]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 1),
    sequence_length=st.integers(1, 12),
    micro_batch_size=st.integers(1, 3),
    world=st.integers(1, 3),
)
@settings(**ONE_FIXTURE)
def test_evaluation_has_every_token_but_the_first_as_a_target_once(stream, lengths, sequence_length, micro_batch_size, world):
    text = stream(counted(*lengths))
    ranks = [list(evaluation_batches(text, sequence_length, micro_batch_size, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks must call the model together"
    targets = torch.cat([batch.targets.flatten() for batches in ranks for batch in batches])
    assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, sum(lengths)))
    for batch in [batch for batches in ranks for batch in batches]:
        assert batch.tokens.shape == (micro_batch_size, sequence_length)
        assert torch.equal(batch.segments == 0, batch.targets == IGNORED), "padding is where nothing is a target"
        kept = batch.targets != IGNORED
        assert torch.equal(batch.tokens[kept] + 1, batch.targets[kept])


def test_evaluation_keeps_documents_apart_too(stream):
    (batch,) = evaluation_batches(stream(counted(2, 2)), 5, 1, document_mask=True)
    assert batch.segments.tolist() == [[1, 1, 2, 0, 0]]
    assert batch.targets.tolist() == [[1, IGNORED, 3, IGNORED, IGNORED]]


def test_a_limit_takes_samples_from_the_whole_split(stream):
    batches = list(evaluation_batches(stream(counted(101)), 10, 2, limit_samples=5))
    starts = [int(row[0]) for batch in batches for row, segments in zip(batch.tokens, batch.segments, strict=True) if segments.any()]
    assert starts == [0, 20, 40, 60, 80]


def test_what_does_not_fill_a_sample_is_refused(stream):
    with pytest.raises(UserError, match="5 tokens to train on do not fill one sample of sequence_length 5, which reads 6"):
        CausalBatches(stream(counted(5)), 5, 1, 1, seed=0)
    with pytest.raises(UserError, match="no document was held out"):
        next(evaluation_batches(stream(), 5, 1))


def test_a_batch_that_cannot_be_dealt_out_is_refused_with_the_nearest_that_can(stream):
    with pytest.raises(UserError, match=r"500 is not a multiple of micro_batch_size 4 x data_parallel_size 8 = 32\. Nearest: 480 or 512"):
        CausalBatches(stream(counted(9)), 4, 500, 4, seed=0, world=8)
