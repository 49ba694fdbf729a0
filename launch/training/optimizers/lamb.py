"""LAMB: You et al. 2019, arXiv 1904.00962."""

from typing import Any

import torch
from torch import Tensor, nn

from launch.training.optimizers.base import Optimizer, Update, split_by_decay
from launch.training.optimizers.elementwise import adam_direction, decaying
from launch.training.optimizers.pieces import Pieces
from launch.training.optimizers.trust_ratio import Norms, norms_of_matrices


class Lamb(Optimizer):
    """Adam whose update of a matrix, decay included, is scaled to the norm of the matrix: algorithm 2 of the paper.

    The means are bias-corrected and the ratio of the norms is not bounded. The states are Adam's.
    """

    name = "lamb"
    states = {"exp_avg": 4, "exp_avg_sq": 4}
    json_type = "Lamb"
    json_parameters = {"lr": ("learning_rate",), "betas": ("beta1", "beta2"), "eps": ("epsilon",), "weight_decay": ("weight_decay",)}
    resumes_from = ("adamw",)
    needs_pieces = True

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer of the parameters of `model`, with learning rate 0."""
        return _LambStep(self, split_by_decay(model, self.settings.decay_coefficient))

    def report(self, built: Any) -> dict[str, Update]:
        """Return norms and trust ratio of each matrix in the last step."""
        rate, updates = built.param_groups[0]["lr"], {}
        for name, (weight, direction) in built.norms.items():
            ratio = trust_ratio(weight, direction)
            updates[name] = Update(weight, rate * ratio * direction, ratio)
        return updates


def trust_ratio(weight_norm: float, direction_norm: float) -> float:
    """Return the factor of the learning rate of a parameter: 1 if one of the norms is 0."""
    return weight_norm / direction_norm if min(weight_norm, direction_norm) > 0 else 1.0


class _LambStep(torch.optim.Optimizer):
    """The torch optimizer. DeepSpeed gives a call of `step` all tensors that the optimizer updates, or a part of them."""

    pieces: Pieces
    """Where the parameters are in these tensors. Must be set before the first step."""

    def __init__(self, optimizer: Optimizer, groups: list[dict]):
        settings = optimizer.settings
        super().__init__(groups, {"lr": 0.0, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon})
        self._optimizer = optimizer
        self.norms: Norms = {}
        """Norms of the weights and of the direction of each matrix in the last step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient."""
        given = [(group, tensor) for group in self.param_groups for tensor in group["params"] if tensor.grad is not None]
        directions = [self._direction(group, tensor) for group, tensor in given]
        norms = norms_of_matrices(self.pieces, [tensor for _, tensor in given], directions)
        for (group, tensor), direction in zip(given, directions, strict=True):
            for piece in self.pieces.of(tensor):
                ratio = trust_ratio(*norms.get(piece.shard_slice.name, (0.0, 0.0)))
                tensor.view(-1)[piece.values].sub_(direction.view(-1)[piece.values], alpha=group["lr"] * ratio)
        self.norms |= norms

    def _direction(self, group: dict, tensor: Tensor) -> Tensor:
        """Return Adam's direction plus the decay."""
        assert tensor.grad is not None
        state = self._optimizer.state_of(self, tensor)
        state["step"] += 1
        direction = adam_direction(state, tensor.grad, group)
        return direction.add_(decaying(tensor, direction, self._optimizer.settings.cautious_decay), alpha=group["weight_decay"])
