"""The training loss and token losses."""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that is not a target."""

_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # float32 logits in one chunk; on a CPU about one core's share of the cache


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats at each position, 0 where the target is IGNORED.  [b, s, vocab], [b, s] -> [b, s]"""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)


class Labels(NamedTuple):
    """Targets and classes that the outputs for a micro-batch are compared with.

    A divisor is the number of targets in the whole global batch over its number of micro-batches. The mean over micro-batches, which
    data parallelism and gradient accumulation take, is then the mean over all targets, however they are distributed.
    """

    targets: Tensor
    """[batch, seq], IGNORED where a position is not a target"""
    divisor: Tensor
    """[]"""
    classes: Tensor | None = None
    """[batch], IGNORED where a sample has no class"""
    class_divisor: Tensor | None = None
    """[]"""

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are not None, in their order."""
        return tuple(tensor for tensor in self if tensor is not None)


@dataclasses.dataclass(frozen=True)
class Teaching:
    """A teacher's logits for the same tokens, and the weights of the two parts of the distillation loss."""

    logits: Tensor
    """[batch, seq, vocab]"""
    kl_weight: float
    """Weight of the divergence between teacher and student."""
    cross_entropy_weight: float
    """Weight of the loss against the targets, including label smoothing and z-loss."""
    temperature: float
    """Softmax temperature applied to teacher and student."""


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    labels: Labels,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teaching: Teaching | None = None,
) -> Tensor:
    """Return the sum of the token losses over its divisor, plus, with classes, the sum of the class losses over their divisor.

    `outputs` are the network's: token logits, with classes the pair of them and class logits.

    With `label_smoothing` e the target distribution is 1 - e on the target and e spread over the whole vocabulary (Szegedy et al.
    2015, arXiv 1512.00567, section 7). `z_loss` times the squared log of the softmax's denominator is added (Chowdhery et al. 2022,
    arXiv 2204.02311, section 5). With `teaching`, T^2 KL(teacher || student) of the distributions at temperature T is added at each
    target (Hinton et al. 2015, arXiv 1503.02531, section 2). None of these changes the loss of the classes.
    """
    logits, class_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    loss = _SummedLoss.apply(logits.flatten(0, 1), labels.targets.flatten(), label_smoothing, z_loss, teaching) / labels.divisor
    if labels.classes is None:
        return loss
    assert class_logits is not None and labels.class_divisor is not None
    return loss + F.cross_entropy(class_logits.float(), labels.classes, ignore_index=IGNORED, reduction="sum") / labels.class_divisor


class _SummedLoss(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] with smoothing, z-loss and a teacher's KL.  [tokens, vocab], [tokens] -> scalar float32

    The arithmetic is float32 for logits of any type, one chunk of rows at a time. The gradient, softmax minus the target
    distribution, is computed in the same pass and kept in the logits' type; F.cross_entropy would keep several float32 copies of the
    logits instead.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        context, logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, teaching: Teaching | None
    ) -> Tensor:
        """Return the sum; the gradient is computed here and kept for backward."""
        # Under fp16 the loss scale is in backward's `factor`; until then small gradients need float32.
        gradient_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=gradient_dtype) if context.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        divergence = torch.zeros_like(total)
        vocabulary = logits.shape[1]
        rows = max(1, _CHUNK_BYTES.get(logits.device.type, 4 << 20) // (4 * vocabulary))
        for start in range(0, len(logits), rows):
            chunk, target = logits[start : start + rows], targets[start : start + rows, None]
            is_target = (target != IGNORED).float()
            target = target.clamp(min=0)
            log_probabilities = F.log_softmax(chunk, dim=1, dtype=torch.float32)
            total -= (1 - label_smoothing) * (log_probabilities.gather(1, target) * is_target).sum()
            if label_smoothing:
                total -= label_smoothing * (log_probabilities.mean(dim=1, keepdim=True) * is_target).sum()
            if z_loss:  # the log of the denominator is the difference between a logit and its log-probability
                denominators = chunk[:, :1].float() - log_probabilities[:, :1]
                total += z_loss * (denominators.square() * is_target).sum()
            if gradient is not None:
                probabilities = log_probabilities.exp_().mul_(is_target * (1 + 2 * z_loss * denominators) if z_loss else is_target)
                if label_smoothing:
                    probabilities -= is_target * (label_smoothing / vocabulary)
                slope = probabilities.scatter_add_(1, target, -(1 - label_smoothing) * is_target)
            if teaching is not None:
                row_divergence, divergence_slope = _divergence(
                    chunk, teaching.logits.flatten(0, 1)[start : start + rows], teaching.temperature
                )
                divergence += (row_divergence * is_target).sum()
                if gradient is not None:
                    slope = slope.mul_(teaching.cross_entropy_weight).add_(divergence_slope.mul_(is_target), alpha=teaching.kl_weight)
            if gradient is not None:
                gradient[start : start + rows] = slope
        context.gradient, context.logits_dtype = gradient, logits.dtype
        return total if teaching is None else teaching.cross_entropy_weight * total + teaching.kl_weight * divergence

    @staticmethod
    def backward(context, factor: Tensor):  # type: ignore[override]
        """Return the kept gradient times `factor`."""
        # In place, because the gradient is used only once.
        return context.gradient.mul_(factor).to(context.logits_dtype), None, None, None, None


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return T^2 KL(teacher || student) of each row [rows, 1] and its gradient by the student's logits [rows, vocab].  2 x [rows, vocab]"""
    student_log = F.log_softmax(student.float() / temperature, dim=1)
    teacher_log = F.log_softmax(teacher.float() / temperature, dim=1)
    probabilities = teacher_log.exp()
    divergence = (probabilities * teacher_log.sub_(student_log)).sum(dim=1, keepdim=True)
    return temperature**2 * divergence, student_log.exp_().sub_(probabilities).mul_(temperature)
