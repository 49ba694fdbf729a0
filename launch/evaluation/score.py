"""How well a model does on held-out samples: sums that add up over batches, ranks and sources, and what they mean."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data.sampling.batches import Batch


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over samples. Losses are plain cross-entropies, without the label smoothing and z-loss of training."""

    token_loss: float = 0.0
    """Nats, over all target tokens."""
    tokens: int = 0
    """Targets that count."""
    class_loss: float = 0.0
    """Nats, over all samples that have a class."""
    classes: int = 0
    """Samples that have one."""
    right: int = 0
    """Of them, those whose likeliest class is theirs."""

    def __add__(self, other: "Score") -> "Score":
        return Score(*(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """Mean nats a target token, and beside it, where there are classes, mean nats a class."""
        means = [total / count for total, count in ((self.token_loss, self.tokens), (self.class_loss, self.classes)) if count]
        return sum(means) if means else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of the classes that are right; None without classes."""
        return self.right / self.classes if self.classes else None


def perplexity(loss: float) -> float:
    """exp(nats), or infinity."""
    return math.inf if loss >= 700 else math.exp(loss)


def sums_of(outputs: "Tensor | tuple[Tensor, Tensor]", targets: "Tensor", classes: "Tensor | None" = None) -> "Tensor":
    """Token loss, class loss and right classes, summed over a batch; outputs as the model gives them.  -> [3], float64"""
    import torch  # which a door that only answers --help does not need

    from model.loss import token_losses

    logits, class_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    sums = torch.zeros(3, dtype=torch.float64, device=targets.device)
    sums[0] = token_losses(logits, targets).double().sum()
    if class_logits is not None and classes is not None:
        sums[1] = token_losses(class_logits[:, None], classes[:, None]).double().sum()
        sums[2] = (class_logits.argmax(dim=-1) == classes).sum()  # IGNORED is no class
    return sums


def scored(sums: "Tensor", batches: "list[Batch]") -> Score:
    """From what sums_of says of some batches, and what these ask for.  [3]"""
    from data.sampling.batches import target_classes, target_tokens

    token_loss, class_loss, right = sums.tolist()
    return Score(token_loss, target_tokens(batches), class_loss, target_classes(batches), round(right))


def measure(network: Callable, batches: "Iterable[Batch]", device: "torch.device | str") -> Score:
    """Of a network over batches, which it is asked for one at a time."""
    import torch

    total = Score()
    with torch.no_grad():
        for batch in batches:
            there = batch.map(lambda tensor: tensor.to(device))
            total += scored(sums_of(network(*there.inputs), there.targets, there.classes), [batch])
    return total
