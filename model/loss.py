"""Token losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that is no target."""

_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # float32 logits handled at a time: on a CPU about a core's share of cache


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats at each position, 0 where the target is IGNORED.  [b, s, vocab], [b, s] -> [b, s]"""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)


def training_loss(logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    """Summed token loss over `labels[1]`; labels is (targets [batch, seq], the number to divide by).

    The divisor is that of the whole global batch: its target tokens over its micro-batches. The mean over micro-batches, which
    data parallelism and accumulation take, is then the mean over the tokens, however they are spread.
    """
    targets, divisor = labels
    return _SummedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten()) / divisor


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target].  [tokens, vocab], [tokens] -> scalar float32

    The arithmetic is float32 whatever the logits are, a chunk of rows at a time; the gradient, softmax minus one-hot, is made in
    the same sweep and kept in the logits' type. What F.cross_entropy keeps instead is several float32 copies of the logits.
    """

    @staticmethod
    def forward(context, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        # Under fp16 the loss scale comes with `factor`, so what is small stays float32 until then.
        kept_as = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept_as) if context.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, _CHUNK_BYTES.get(logits.device.type, 4 << 20) // (4 * logits.shape[1]))
        for start in range(0, len(logits), rows):
            wanted = targets[start : start + rows, None]
            is_target = (wanted != IGNORED).float()
            wanted = wanted.clamp(min=0)
            log_probabilities = F.log_softmax(logits[start : start + rows], dim=1, dtype=torch.float32)
            total -= (log_probabilities.gather(1, wanted) * is_target).sum()
            if gradient is not None:
                probabilities = log_probabilities.exp_().mul_(is_target)
                gradient[start : start + rows] = probabilities.scatter_add_(1, wanted, -is_target)
        context.gradient, context.logits_dtype = gradient, logits.dtype
        return total

    @staticmethod
    def backward(context, factor: Tensor):  # type: ignore[override]
        return context.gradient.mul_(factor).to(context.logits_dtype), None  # in place: the gradient is asked for once
