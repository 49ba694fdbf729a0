"""AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101."""

import torch
from torch import nn

from launch.training.optimizers.base import Optimizer, split_by_decay


class AdamW(Optimizer):
    """torch's fused AdamW with weight decay on matrices only. Its two states are the means of gradients and of squared gradients."""

    name = "adamw"
    states = {"exp_avg": 4, "exp_avg_sq": 4}
    has_adamw_rates = True
    json_type = "AdamW"
    json_parameters = {"lr": ("learning_rate",), "betas": ("beta1", "beta2"), "eps": ("epsilon",), "weight_decay": ("weight_decay",)}

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """Return the torch optimizer of the parameters of `model`, with learning rate 0."""
        numbers = self.settings
        groups = split_by_decay(model, numbers.weight_decay)
        return torch.optim.AdamW(groups, lr=0.0, betas=(numbers.beta1, numbers.beta2), eps=numbers.epsilon, fused=True)
