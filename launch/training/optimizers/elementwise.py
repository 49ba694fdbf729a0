"""Optimizers that update each value by itself: whole parameters and slices of them are updated alike."""

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from launch.training.optimizers.base import Optimizer, split_by_decay
from launch.training.optimizers.beta2 import sum_with


def adam_direction(state: Mapping[str, Tensor], gradient: Tensor, group: dict) -> Tensor:
    """Advance Adam's running means by one step and return mean / (root of mean square + epsilon), both corrected for their start at 0.

    `state` has exp_avg and exp_avg_sq, which are changed in place, and step, the number of steps with this one (Kingma and Ba 2014,
    arXiv 1412.6980). `group` has betas and eps.
    """
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
    mean_square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    divisor = mean_square.sqrt().div_(math.sqrt(sum_with(group, step))).add_(group["eps"])
    return torch.div(mean, divisor, out=divisor).div_(1 - beta1**step)


def decaying(weight: Tensor, update: Tensor, cautious: bool) -> Tensor:
    """Return the weights that decay. If `cautious`, those whose update has the opposite sign do not: they are 0 in the result."""
    return weight * (update * weight >= 0) if cautious else weight


def apply_update(weight: Tensor, update: Tensor, rate: float, decay: float, *, cautious: bool = False, scale: float = 1.0) -> None:
    """Decay a weight by rate x decay of itself, then subtract rate x scale x update, in place.

    If `cautious`, a weight whose update has the opposite sign does not decay (Chen et al. 2025, arXiv 2510.12402).
    """
    if decay and cautious:
        weight.sub_(decaying(weight, update, cautious), alpha=rate * decay)
    elif decay:
        weight.mul_(1 - rate * decay)
    weight.add_(update, alpha=-(rate * scale))


class Elementwise(Optimizer):
    """An optimizer whose update of a value depends on the gradient and the states of this value alone."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer of the parameters of `model`, with learning rate 0."""
        groups = split_by_decay(model, self.settings.decay_coefficient)
        return ElementwiseStep(self, groups, {"lr": 0.0, "cautious": self.settings.cautious_decay} | self.defaults())

    @abc.abstractmethod
    def defaults(self) -> dict[str, Any]:
        """Return what the groups of the torch optimizer hold besides learning rate and decay."""

    @abc.abstractmethod
    def direction(self, group: dict, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Advance the states by one step and return the update, without rate and decay. The number of steps counts this one already."""


class ElementwiseStep(torch.optim.Optimizer):
    """The torch optimizer of an Elementwise."""

    def __init__(self, optimizer: Elementwise, groups: list[dict], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        self._optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    state = self._optimizer.state_of(self, tensor)
                    state["step"] += 1
                    update = self._optimizer.direction(group, state, tensor.grad)
                    apply_update(tensor, update, group["lr"], group["weight_decay"], cautious=group["cautious"])
