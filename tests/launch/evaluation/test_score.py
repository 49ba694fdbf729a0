"""Tests of the sums of evaluation, by hand."""

import math

import pytest
import torch

from launch.evaluation.score import Score, sums_of
from model.loss import IGNORED


def test_sums_by_hand():
    """Four tokens with equal logits and three targets that count; classes with odds of 3 to 1."""
    logits = torch.zeros(2, 3, 4)
    targets = torch.tensor([[0, 3, IGNORED], [IGNORED, 2, IGNORED]])
    assert sums_of(logits, targets).tolist() == pytest.approx([3 * math.log(4), 0, 0])
    classes = torch.tensor([1, IGNORED, 1, 0])
    odds = torch.tensor([[0.0, math.log(3)]] * 4)
    sums = sums_of((logits, odds), targets, classes)
    assert sums.tolist() == pytest.approx([3 * math.log(4), 2 * math.log(4 / 3) + math.log(4), 2])


def test_sample_without_a_class_is_not_counted_as_right():
    assert sums_of((torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0]])), torch.tensor([[0]]), torch.tensor([IGNORED]))[2] == 0


def test_scores_add_up_weighted_by_token_and_by_class():
    score = Score(6.0, 3, 1.0, 2, 1) + Score(1.0, 1, 3.0, 6, 5)
    assert score == Score(7.0, 4, 4.0, 8, 6)
    assert score.loss == 7 / 4 + 4 / 8 and score.accuracy == 6 / 8
    assert Score(7.0, 4).loss == 7 / 4 and Score(7.0, 4).accuracy is None
    assert math.isnan(Score().loss)
