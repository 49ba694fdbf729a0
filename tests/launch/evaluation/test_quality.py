"""Tests of the sums over two models' predictions, by hand and with torch's and numpy's own functions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch.evaluation.quality import Comparison, compared
from model.loss import IGNORED


def test_quality_by_hand():
    """Two tokens and two targets that count: before, the odds are even; after, they are 3 to 1 for token 0."""
    before, after = torch.zeros(1, 3, 2), torch.tensor([[[math.log(3), 0.0]] * 3])
    quality = compared(before, after, torch.tensor([[0, 1, IGNORED]])).quality(bytes_per_token=2)
    assert quality.tokens == 2
    assert quality.perplexity_before.value == pytest.approx(2) and quality.perplexity_before.standard_error == pytest.approx(0)
    mean = (math.log(4 / 3) + math.log(4)) / 2
    assert quality.loss_after.value == pytest.approx(mean)
    # Two numbers a distance d apart have the sample variance d^2 / 2, and their mean that over 2.
    assert quality.loss_after.standard_error == pytest.approx(math.log(3) / 2)
    assert quality.ratio.value == pytest.approx(math.exp(mean) / 2)
    assert quality.ratio.standard_error == pytest.approx(math.exp(mean) / 2 * math.log(3) / 2)
    assert quality.bits_per_byte_after == pytest.approx(2 * mean / math.log(2) / 4)
    divergence = math.log(0.5 / 0.75) / 2 + math.log(0.5 / 0.25) / 2
    assert quality.divergence.value == pytest.approx(divergence) and quality.divergence_p99 == pytest.approx(divergence)
    assert quality.agreement.value == 1


def test_sums_over_chunks_and_batches_match_torch_and_numpy(monkeypatch):
    random = torch.Generator().manual_seed(0)
    before, noise = torch.randn(2, 400, 11, generator=random), torch.randn(2, 400, 11, generator=random)
    after = before + 0.3 * noise
    targets = torch.randint(0, 11, (2, 400), generator=random)
    targets[:, ::7] = IGNORED
    monkeypatch.setattr("launch.evaluation.quality._CHUNK_BYTES", {"cpu": 4 * 11 * 50})
    parts = [
        compared(before[:, start : start + 100], after[:, start : start + 100], targets[:, start : start + 100])
        for start in (0, 100, 200, 300)
    ]
    quality = sum(parts, Comparison()).quality()
    counted = targets != IGNORED
    old, new = (F.log_softmax(logits[counted].double(), dim=-1) for logits in (before, after))
    divergences = F.kl_div(new, old, reduction="none", log_target=True).sum(dim=-1).numpy()
    losses = [F.nll_loss(one, targets[counted], reduction="none").numpy() for one in (old, new)]
    error = lambda values: values.std(ddof=1) / len(values) ** 0.5  # noqa: E731
    assert quality.divergence.value == pytest.approx(divergences.mean(), rel=1e-5)
    assert quality.divergence.standard_error == pytest.approx(error(divergences), rel=1e-5)
    assert quality.divergence_p99 == pytest.approx(np.quantile(divergences, 0.99, method="inverted_cdf"), rel=1e-5)
    assert quality.loss_before.standard_error == pytest.approx(error(losses[0]), rel=1e-5)
    ratio = math.exp((losses[1] - losses[0]).mean())
    assert (quality.ratio.value, quality.ratio.standard_error) == pytest.approx((ratio, ratio * error(losses[1] - losses[0])), rel=1e-5)
    assert quality.agreement.value == pytest.approx((old.argmax(-1) == new.argmax(-1)).double().mean().item())
    assert quality.bits_per_byte_before is None


def test_a_model_has_no_difference_from_itself_in_bf16():
    logits = torch.randn(64, 9).bfloat16()
    quality = compared(logits, logits, torch.arange(64) % 9).quality()
    assert (quality.divergence.value, quality.divergence_p99, quality.agreement.value, quality.ratio.value) == (0, 0, 1, 1)
