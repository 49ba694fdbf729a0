"""Token losses."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that is no target."""

_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # float32 logits handled at a time: on a CPU about a core's share of cache


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats at each position, 0 where the target is IGNORED.  [b, s, vocab], [b, s] -> [b, s]"""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What another network says of the same tokens, and how much that counts beside their targets."""

    logits: Tensor
    """[batch, seq, vocab]"""
    kl_weight: float
    cross_entropy_weight: float
    """Of the loss against the targets, with its smoothing and z-loss."""
    temperature: float
    """That both networks' logits are divided by."""


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    labels: tuple[Tensor, ...],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teaching: Teaching | None = None,
) -> Tensor:
    """Summed token loss over a divisor, with, where there are classes, their summed loss over a divisor of its own.

    outputs are what the network says; labels (targets [batch, seq], divisor), behind them (classes [batch], divisor). A divisor is
    that of the whole global batch: its targets over its micro-batches. The mean over micro-batches, which data parallelism and
    accumulation take, is then the mean over the targets, however they are spread.

    With `label_smoothing` e the target distribution is 1 - e on the target and e spread over all of the vocabulary (Szegedy et al.
    2015, arXiv 1512.00567, section 7); `z_loss` times the squared log of the softmax's denominator is added (Chowdhery et al. 2022,
    arXiv 2204.02311, section 5). With `teaching`, at each target, T^2 KL(teacher || student) is added, of the two distributions at
    temperature T (Hinton et al. 2015, arXiv 1503.02531, section 2). None of these touches the classes.
    """
    logits, class_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    targets, divisor, *of_classes = labels
    loss = _SummedLoss.apply(logits.flatten(0, 1), targets.flatten(), label_smoothing, z_loss, teaching) / divisor
    if not of_classes:
        return loss
    assert class_logits is not None
    classes, class_divisor = of_classes
    return loss + F.cross_entropy(class_logits.float(), classes, ignore_index=IGNORED, reduction="sum") / class_divisor


class _SummedLoss(torch.autograd.Function):
    """Sum of -log softmax(logits)[target], smoothed, of the z-loss, and of a teacher's KL.  [tokens, vocab], [tokens] -> scalar float32

    The arithmetic is float32 whatever the logits are, a chunk of rows at a time; the gradient, softmax minus the target's
    distribution, is made in the same sweep and kept in the logits' type. What F.cross_entropy keeps instead is several float32
    copies of the logits.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        context, logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, teaching: Teaching | None
    ) -> Tensor:
        # Under fp16 the loss scale comes with `factor`, so what is small stays float32 until then.
        kept_as = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept_as) if context.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        divergence = torch.zeros_like(total)
        vocabulary = logits.shape[1]
        rows = max(1, _CHUNK_BYTES.get(logits.device.type, 4 << 20) // (4 * vocabulary))
        for start in range(0, len(logits), rows):
            chunk, wanted = logits[start : start + rows], targets[start : start + rows, None]
            is_target = (wanted != IGNORED).float()
            wanted = wanted.clamp(min=0)
            log_probabilities = F.log_softmax(chunk, dim=1, dtype=torch.float32)
            total -= (1 - label_smoothing) * (log_probabilities.gather(1, wanted) * is_target).sum()
            if label_smoothing:
                total -= label_smoothing * (log_probabilities.mean(dim=1, keepdim=True) * is_target).sum()
            if z_loss:  # the denominator's log is what log_softmax has taken from every logit
                denominators = chunk[:, :1].float() - log_probabilities[:, :1]
                total += z_loss * (denominators.square() * is_target).sum()
            if gradient is not None:
                probabilities = log_probabilities.exp_().mul_(is_target * (1 + 2 * z_loss * denominators) if z_loss else is_target)
                if label_smoothing:
                    probabilities -= is_target * (label_smoothing / vocabulary)
                slope = probabilities.scatter_add_(1, wanted, -(1 - label_smoothing) * is_target)
            if teaching is not None:
                of_rows, its_slope = _divergence(chunk, teaching.logits.flatten(0, 1)[start : start + rows], teaching.temperature)
                divergence += (of_rows * is_target).sum()
                if gradient is not None:
                    slope = slope.mul_(teaching.cross_entropy_weight).add_(its_slope.mul_(is_target), alpha=teaching.kl_weight)
            if gradient is not None:
                gradient[start : start + rows] = slope
        context.gradient, context.logits_dtype = gradient, logits.dtype
        return total if teaching is None else teaching.cross_entropy_weight * total + teaching.kl_weight * divergence

    @staticmethod
    def backward(context, factor: Tensor):  # type: ignore[override]
        # In place: the gradient is asked for once.
        return context.gradient.mul_(factor).to(context.logits_dtype), None, None, None, None


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(teacher || student) of each row [rows, 1], and its slope by the student's logits [rows, vocab].  2 x [rows, vocab]"""
    ours = F.log_softmax(student.float() / temperature, dim=1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=1)
    probabilities = theirs.exp()
    divergence = (probabilities * theirs.sub_(ours)).sum(dim=1, keepdim=True)
    return temperature**2 * divergence, ours.exp_().sub_(probabilities).mul_(temperature)
