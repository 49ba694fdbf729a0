"""AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101."""

from typing import Any

import torch
from torch import Tensor, nn

from launch.training.optimizers.base import split_by_decay
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
        return torch.optim.AdamW(split_by_decay(model, self.settings.decay_coefficient), lr=0.0, fused=True, **self.defaults())

    def defaults(self) -> dict[str, Any]:
        """Return the decay rates of the means, and epsilon."""
        return {"betas": (self.settings.beta1, self.settings.beta2), "eps": self.settings.epsilon}

    def direction(self, group: dict, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Return Adam's direction."""
        beta1, beta2 = group["betas"]
        return adam_direction(state, gradient, beta1, beta2, group["eps"])
