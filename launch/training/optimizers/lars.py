"""LARS: You et al. 2017, arXiv 1708.03888."""

from typing import Any

import torch
from torch import nn

from launch.training.optimizers.base import Optimizer, Update, split_by_decay
from launch.training.optimizers.elementwise import decaying
from launch.training.optimizers.pieces import Pieces
from launch.training.optimizers.trust_ratio import Norms, norms_of_matrices

TRUST_COEFFICIENT = 0.001
"""Share of a matrix's norm that a step may change at learning rate 1 (the paper's eta, section 4)."""


class Lars(Optimizer):
    """Gradient descent with momentum, in which each matrix has a rate of its own: algorithm 1 of the paper. Vectors have the common rate.

    The learning rate is inside the momentum, as in the paper: a new rate applies to new gradients.
    """

    name = "lars"
    states = {"momentum": 4}
    json_type = "Lars"
    json_parameters = {"lr": ("learning_rate",), "momentum": ("momentum",), "weight_decay": ("weight_decay",)}
    needs_pieces = True

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer of the parameters of `model`, with learning rate 0."""
        return _LarsStep(self, split_by_decay(model, self.settings.decay_coefficient))

    def report(self, built: Any) -> dict[str, Update]:
        """Return the trust ratio of each matrix in the last step."""
        decay = built.param_groups[0]["weight_decay"]
        return {name: Update(trust_ratio=trust_ratio(weight, gradient, decay)) for name, (weight, gradient) in built.norms.items()}


def trust_ratio(weight_norm: float, gradient_norm: float, weight_decay: float) -> float:
    """Return the factor of the learning rate of a parameter: 1 if one of the norms is 0."""
    if min(weight_norm, gradient_norm) == 0:
        return 1.0
    return TRUST_COEFFICIENT * weight_norm / (gradient_norm + weight_decay * weight_norm)


class _LarsStep(torch.optim.Optimizer):
    """The torch optimizer. DeepSpeed gives a call of `step` all tensors that the optimizer updates, or a part of them."""

    pieces: Pieces
    """Where the parameters are in these tensors. Must be set before the first step."""

    def __init__(self, optimizer: Optimizer, groups: list[dict]):
        super().__init__(groups, {"lr": 0.0, "momentum": optimizer.settings.momentum})
        self._optimizer = optimizer
        self.norms: Norms = {}
        """Norms of weights and gradient of each matrix in the last step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient."""
        given = [(group, tensor) for group in self.param_groups for tensor in group["params"] if tensor.grad is not None]
        norms = norms_of_matrices(self.pieces, [tensor for _, tensor in given], [tensor.grad for _, tensor in given])
        for group, tensor in given:
            state = self._optimizer.state_of(self, tensor)
            state["step"] += 1
            state["momentum"].mul_(group["momentum"])
            for piece in self.pieces.of(tensor):
                weight, gradient, momentum = (one.view(-1)[piece.values] for one in (tensor, tensor.grad, state["momentum"]))
                weight_norm, gradient_norm = norms.get(piece.shard_slice.name, (0.0, 0.0))
                rate = group["lr"] * trust_ratio(weight_norm, gradient_norm, group["weight_decay"])
                momentum.add_(gradient, alpha=rate)
                momentum.add_(decaying(weight, momentum, self._optimizer.settings.cautious_decay), alpha=rate * group["weight_decay"])
                weight.sub_(momentum)
        self.norms |= norms
