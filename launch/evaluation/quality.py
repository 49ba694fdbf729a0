"""What two models say of the same targets: sums that add up over batches and ranks, and what they mean."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.evaluation.score import perplexity
from model.loss import IGNORED

_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # float32 log-probabilities of a model at a time: on a CPU what its cache holds


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over tokens, or what follows from it."""

    value: float
    standard_error: float
    """As if tokens were drawn one by one; those of a text hang together, so that this is the least that it can be."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model before and after it was changed, on the same targets."""

    tokens: int
    """Targets."""
    loss_before: Estimate
    """Nats a token."""
    loss_after: Estimate
    perplexity_before: Estimate
    """A token."""
    perplexity_after: Estimate
    ratio: Estimate
    """Perplexity after / before. Its standard error is that of the differences token by token: far below those of the two."""
    bits_per_byte_before: float | None
    """Of the text, UTF-8; None where the model is not asked for all of it."""
    bits_per_byte_after: float | None
    divergence: Estimate
    """Kullback and Leibler's, of what the model says after from what it said before: nats a token."""
    divergence_p99: float
    """Of 99 of 100 tokens it is at most this."""
    agreement: Estimate
    """Share of the tokens for which both find the same one likeliest."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sums over targets; losses in nats."""

    tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    squared_before: float = 0.0
    squared_after: float = 0.0
    squared_difference: float = 0.0
    """Of a token's two losses."""
    agreements: int = 0
    divergences: tuple[Tensor, ...] = ()
    """Of every target, in pieces: float32 on the CPU."""

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(*(getattr(self, one.name) + getattr(other, one.name) for one in dataclasses.fields(self)))

    def quality(self, bytes_per_token: float | None = None) -> Quality:
        """Means; `bytes_per_token` is the text's, where all of its tokens were asked for. Needs one target."""
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
    """Two models' logits of the same positions.  [.., vocab], [.., vocab], [..] -> sums over the targets that are not IGNORED

    The arithmetic is float32 whatever the logits are, so many rows at a time that it needs no copy of them.
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
        divergence = (old.exp() * (old - new)).sum(dim=1).clamp_(min=0)  # below 0 by rounding alone
        *losses, agreements = sums.tolist()
        total += Comparison(len(rows), *losses, round(agreements), (divergence.cpu(),))  # type: ignore[call-arg]
    return total


def _exponential(mean: Estimate) -> Estimate:
    """The standard error to first order."""
    value = perplexity(mean.value)
    return Estimate(value, value * mean.standard_error)
