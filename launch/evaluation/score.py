"""Scores of a model on evaluation samples: sums that add up over batches, ranks and sources, and what they mean."""

import dataclasses
import math

import torch
from torch import Tensor

from data.sampling.batches import Batch, target_classes, target_tokens
from model.loss import token_losses


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over samples. Losses are plain cross-entropies, without the label smoothing and z-loss of training."""

    token_loss: float = 0.0
    """Loss summed over all target tokens, nats."""
    tokens: int = 0
    """Number of target tokens."""
    class_loss: float = 0.0
    """Loss summed over all samples that have a class, nats."""
    classes: int = 0
    """Number of samples that have a class."""
    right: int = 0
    """Number of samples whose most likely class is their class."""

    def __add__(self, other: "Score") -> "Score":
        return Score(*(one + another for one, another in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """Mean loss per target token, nats; with classes, plus the mean loss per class. NaN without any."""
        means = [total / count for total, count in ((self.token_loss, self.tokens), (self.class_loss, self.classes)) if count]
        return sum(means) if means else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of samples with a class whose most likely class is right; None without classes."""
        return self.right / self.classes if self.classes else None


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats, or infinity where it is too large for a float."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return bits per byte for a mean loss in nats per token."""
    return loss / math.log(2) / bytes_per_token


def token_logits(outputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the token logits of a model's outputs, which may be followed by class logits.  -> [batch, seq, vocab]"""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def sums_of(outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return token loss, class loss and number of right classes, summed over a batch, from a model's outputs.  -> [3], float64"""
    logits, class_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    sums = torch.zeros(3, dtype=torch.float64, device=targets.device)
    sums[0] = token_losses(logits, targets).double().sum()
    if class_logits is not None and classes is not None:
        sums[1] = token_losses(class_logits[:, None], classes[:, None]).double().sum()
        sums[2] = (class_logits.argmax(dim=-1) == classes).sum()  # never equal where the class is IGNORED
    return sums


def score_of(sums: Tensor, batches: list[Batch]) -> Score:
    """Return the score for the sums over some batches, as sums_of gives them, with the numbers of targets in the batches.  [3]"""
    token_loss, class_loss, right = sums.tolist()
    return Score(token_loss, target_tokens(batches), class_loss, target_classes(batches), round(right))
