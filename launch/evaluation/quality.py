"""Quality of a changed model compared with the original: sums over the same targets that add up over batches and ranks."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.evaluation.score import perplexity
from model.loss import IGNORED

_CHUNK_BYTES = {
    "cpu": 4 << 20,
    "cuda": 256 << 20,
}  # float32 log-probabilities of one model in memory at a time; on a CPU they fit its cache


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over tokens, or a value computed from it, with its standard error."""

    value: float
    standard_error: float
    """Standard error if tokens were independent. Tokens of one text are not, so this is a lower bound."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """Measurements of a model before and after it was changed, on the same targets."""

    tokens: int
    """Number of targets."""
    loss_before: Estimate
    """Loss per token, nats."""
    loss_after: Estimate
    perplexity_before: Estimate
    """Perplexity per token."""
    perplexity_after: Estimate
    ratio: Estimate
    """Perplexity after / before. Its standard error comes from the differences token by token, and is far below those of the two."""
    bits_per_byte_before: float | None
    """Bits per UTF-8 byte of the text; None if the model does not predict all of it."""
    bits_per_byte_after: float | None
    divergence: Estimate
    """Kullback-Leibler divergence KL(before || after) of the predicted distributions, nats per token."""
    divergence_p99: float
    """99th percentile of the divergence over tokens."""
    agreement: Estimate
    """Share of targets for which both models find the same token most likely."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sums over targets; losses in nats."""

    tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    squared_before: float = 0.0
    squared_after: float = 0.0
    squared_difference: float = 0.0
    """Sum of the squared differences between the two losses of a token."""
    agreements: int = 0
    divergences: tuple[Tensor, ...] = ()
    """Divergence of every target, in several tensors: float32 on the CPU."""

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(*(getattr(self, one.name) + getattr(other, one.name) for one in dataclasses.fields(self)))

    def quality(self, bytes_per_token: float | None = None) -> Quality:
        """Return the means. `bytes_per_token` is the text's, if all of its tokens are targets. There must be at least one target."""
        before = self._mean(self.loss_before, self.squared_before)
        after = self._mean(self.loss_after, self.squared_after)
        divergences = torch.cat(self.divergences).double()
        bits_per_nat = None if bytes_per_token is None else 1 / (math.log(2) * bytes_per_token)
        return Quality(
            tokens=self.tokens,
            loss_before=before,
            loss_after=after,
            perplexity_before=_exponential(before),
            perplexity_after=_exponential(after),
            ratio=_exponential(self._mean(self.loss_after - self.loss_before, self.squared_difference)),
            bits_per_byte_before=None if bits_per_nat is None else before.value * bits_per_nat,
            bits_per_byte_after=None if bits_per_nat is None else after.value * bits_per_nat,
            divergence=self._mean(divergences.sum().item(), divergences.square().sum().item()),
            divergence_p99=divergences.kthvalue(math.ceil(0.99 * self.tokens)).values.item(),
            agreement=self._mean(self.agreements, self.agreements),
        )

    def _mean(self, total: float, squared: float) -> Estimate:
        mean = total / self.tokens
        variance = max(0.0, squared / self.tokens - mean**2)
        return Estimate(mean, math.sqrt(variance / max(1, self.tokens - 1)))


def compared(before: Tensor, after: Tensor, targets: Tensor) -> Comparison:
    """Return the sums for two models' logits of the same positions.  [.., vocab], [.., vocab], [..] -> sums over targets not IGNORED

    The arithmetic is in float32 for any type of logits, a limited number of rows at a time, so that no whole copy is needed.
    """
    before, after, targets = before.flatten(0, -2), after.flatten(0, -2), targets.flatten()
    counted = (targets != IGNORED).nonzero().squeeze(1)
    total = Comparison()
    for rows in counted.split(max(1, _CHUNK_BYTES.get(before.device.type, 4 << 20) // (4 * before.shape[1]))):
        old, new = (F.log_softmax(logits[rows].float(), dim=1) for logits in (before, after))
        old_loss, new_loss = (-chosen.gather(1, targets[rows, None]).squeeze(1).double() for chosen in (old, new))
        agree = old.argmax(dim=1) == new.argmax(dim=1)
        squares = [loss.square() for loss in (old_loss, new_loss, new_loss - old_loss)]
        sums = torch.stack([one.sum(dtype=torch.float64) for one in (old_loss, new_loss, *squares, agree)])
        divergence = (old.exp() * (old - new)).sum(dim=1).clamp_(min=0)  # only rounding makes it negative
        *losses, agreements = sums.tolist()
        total += Comparison(len(rows), *losses, round(agreements), (divergence.cpu(),))  # type: ignore[call-arg]
    return total


def _exponential(mean: Estimate) -> Estimate:
    """Return exp(mean); its standard error is a first-order approximation."""
    value = perplexity(mean.value)
    return Estimate(value, value * mean.standard_error)
