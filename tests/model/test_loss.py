import math

import pytest
import torch
import torch.nn.functional as F

from model.loss import IGNORED, Labels, Teaching, token_losses, training_loss


def random_logits(batch: int, seq: int, vocab: int) -> torch.Tensor:
    return 3 * torch.randn(batch, seq, vocab, generator=torch.Generator().manual_seed(0))


def test_loss_of_four_equal_logits_is_log_four():
    logits, targets = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
    assert training_loss(logits, Labels(targets, torch.tensor(6.0))).item() == pytest.approx(math.log(4), rel=1e-6)
    torch.testing.assert_close(token_losses(logits, targets), torch.full((2, 3), math.log(4)))


@pytest.mark.parametrize(("batch", "seq", "vocab"), [(2, 5, 11), (1, 300, 9001)])  # the second is more than one chunk of rows
def test_loss_and_gradient_match_cross_entropy(batch, seq, vocab):
    targets = torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(1))
    targets[:, ::3] = IGNORED
    num_targets = (targets != IGNORED).sum()
    ours, theirs = (random_logits(batch, seq, vocab).requires_grad_() for _ in range(2))
    loss = training_loss(ours, Labels(targets, num_targets))
    reference = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6 / num_targets.item())
    assert (ours.grad[targets == IGNORED] == 0).all()


def test_gradient_matches_finite_differences():
    logits = random_logits(1, 3, 5)
    targets = torch.tensor([[4, IGNORED, 1]])
    value = lambda logits: training_loss(logits, Labels(targets, torch.tensor(2.0))).item()  # noqa: E731
    logits.requires_grad_()
    training_loss(logits, Labels(targets, torch.tensor(2.0))).backward()
    for place in range(logits.numel()):
        step = torch.zeros(logits.numel()).index_fill(0, torch.tensor([place]), 1e-2).view_as(logits)
        difference = (value(logits.detach() + step) - value(logits.detach() - step)) / 2e-2
        assert logits.grad.flatten()[place].item() == pytest.approx(difference, abs=1e-4)  # float32 differences hold no more


def test_loss_of_bf16_logits_is_summed_in_float32():
    logits = random_logits(2, 50, 31).bfloat16().requires_grad_()
    targets = torch.randint(31, (2, 50), generator=torch.Generator().manual_seed(1))
    loss = training_loss(logits, Labels(targets, torch.tensor(100.0)))
    exact = logits.detach().float().requires_grad_()
    reference = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    loss.backward()
    reference.backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=2**-6, atol=1e-7)  # two roundings to bf16's 8 bits


def test_mean_over_micro_batches_is_the_mean_over_tokens():
    logits = random_logits(4, 6, 11)
    targets = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    targets[0, 1:] = IGNORED  # one micro-batch has far fewer targets than the other
    targets[1] = IGNORED
    divisor = (targets != IGNORED).sum() / 2  # the global batch's targets over its two micro-batches
    micro_batches = [training_loss(logits[rows], Labels(targets[rows], divisor)) for rows in (slice(0, 2), slice(2, 4))]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(torch.stack(micro_batches).mean(), expected, rtol=1e-6, atol=0)


def test_loss_without_targets_is_zero():
    logits = random_logits(1, 3, 5).requires_grad_()
    loss = training_loss(logits, Labels(torch.full((1, 3), IGNORED), torch.tensor(7.0)))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_token_losses_are_zero_at_ignored_targets():
    targets = torch.tensor([[1, IGNORED, 2]])
    losses = token_losses(random_logits(1, 3, 5), targets)
    assert losses[0, 1] == 0 and (losses[0, ::2] > 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
def test_label_smoothing_and_z_loss_match_their_formulas(label_smoothing, z_loss):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    targets[1] = IGNORED
    ours = (4 * torch.randn(3, 5, 11, generator=generator)).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    loss = training_loss(ours, Labels(targets, torch.tensor(7.0)), label_smoothing, z_loss)
    by_torch = F.cross_entropy(
        plain.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    by_torch = (by_torch + z_loss * (plain.logsumexp(dim=2).square() * (targets != IGNORED)).sum()) / 7
    torch.testing.assert_close(loss, by_torch)
    loss.backward()
    by_torch.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_classes_add_their_own_loss():
    logits, class_logits = torch.zeros(2, 3, 4), torch.zeros(2, 5)
    targets = torch.tensor([[1, 2, IGNORED], [IGNORED] * 3])
    labels = Labels(targets, torch.tensor(2.0), torch.tensor([4, IGNORED]), torch.tensor(1.0))
    loss = training_loss((logits, class_logits), labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(4) + math.log(5))
    nothing = torch.full((2, 3), IGNORED)  # the token logits of a network without a token head have no meaning
    assert training_loss((torch.randn(2, 3, 8), class_logits), labels._replace(targets=nothing)).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(("seq", "vocab"), [(5, 11), (300, 9001)])  # the second is more than one chunk of rows
def test_distillation_loss_and_gradient_match_hintons_formula(seq, vocab):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, vocab, (1, seq), generator=generator)
    targets[:, ::3] = IGNORED
    ours, theirs = (3 * torch.randn(1, seq, vocab, generator=generator) for _ in range(2))
    ours, plain = (ours.clone().requires_grad_() for _ in range(2))
    loss = training_loss(ours, Labels(targets, torch.tensor(7.0)), 0.1, 0.02, Teaching(theirs, 0.7, 0.4, temperature=2.0))
    against_targets = training_loss(plain, Labels(targets, torch.tensor(7.0)), 0.1, 0.02)
    distributions = (plain / 2).log_softmax(dim=2)[targets != IGNORED], (theirs / 2).log_softmax(dim=2)[targets != IGNORED]
    by_torch = 0.4 * against_targets + 0.7 * 2**2 * F.kl_div(*distributions, reduction="sum", log_target=True) / 7
    torch.testing.assert_close(loss, by_torch)
    loss.backward()
    by_torch.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_distillation_loss_is_zero_when_student_equals_teacher():
    logits = random_logits(1, 6, 11).bfloat16().requires_grad_()
    labels = Labels(torch.randint(11, (1, 6), generator=torch.Generator().manual_seed(1)), torch.tensor(6.0))
    loss = training_loss(logits, labels, teaching=Teaching(logits.detach(), 1.0, 0.0, 3.0))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6
