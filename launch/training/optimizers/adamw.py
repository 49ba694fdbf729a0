"""AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from launch.training.optimizers.base import split_by_decay
from launch.training.optimizers.beta2 import CHANGED, sum_with
from launch.training.optimizers.elementwise import Elementwise, adam_direction


class AdamW(Elementwise):
    """torch's fused AdamW with weight decay on matrices only. Its two states are the means of gradients and of squared gradients.

    With cautious decay, which torch does not have, the step is ours.
    """

    name = "adamw"
    states = {"exp_avg": 4, "exp_avg_sq": 4}
    has_adamw_rates = True
    resumes_from = ("lamb",)
    json_type = "AdamW"
    json_parameters = {"lr": ("learning_rate",), "betas": ("beta1", "beta2"), "eps": ("epsilon",), "weight_decay": ("weight_decay",)}

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer of the parameters of `model`, with learning rate 0."""
        if self.settings.cautious_decay:
            return super().build(model)
        return AdamWStep(split_by_decay(model, self.settings.decay_coefficient), lr=0.0, fused=True, **self.defaults())

    def defaults(self) -> dict[str, Any]:
        """Return the decay rates of the means, and epsilon."""
        return {"betas": (self.settings.beta1, self.settings.beta2), "eps": self.settings.epsilon}

    def direction(self, group: dict, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Return Adam's direction."""
        return adam_direction(state, gradient, group)


class AdamWStep(torch.optim.AdamW):
    """torch's AdamW, with the bias correction that belongs to a beta2 that has changed."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient.

        torch divides by root(v / (1 - beta2^step)) + epsilon. For another divisor of v, of which `ratio` is the multiple, the rate and
        epsilon are multiplied by the root of `ratio`, and the decay, which is multiplied by the rate, is divided by it.
        """
        changed = [(group, dict(group)) for group in self.param_groups if CHANGED in group]
        for group, _ in changed:
            step = 1 + max((float(self.state[tensor]["step"]) for tensor in group["params"] if self.state.get(tensor)), default=0.0)
            factor = math.sqrt(sum_with(group, step) / (1 - group["betas"][1] ** step))
            group.update(lr=group["lr"] * factor, eps=group["eps"] * factor, weight_decay=group["weight_decay"] / factor)
        super().step()
        for group, before in changed:
            group.update(before)
