"""Gradient descent with momentum: Polyak 1964, in the form of torch.optim.SGD (Sutskever et al. 2013)."""

from typing import Any

from torch import Tensor

from launch.training.optimizers.elementwise import Elementwise


class SGD(Elementwise):
    """torch's SGD, except that decay acts on the weights and not through the momentum: algorithm 1 of arXiv 1711.05101."""

    name = "sgd"
    states = {"momentum": 4}
    json_type = "SGD"
    json_parameters = {"lr": ("learning_rate",), "momentum": ("momentum",), "weight_decay": ("weight_decay",)}

    def defaults(self) -> dict[str, Any]:
        """Return the momentum."""
        return {"momentum": self.settings.momentum}

    def direction(self, group: dict, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Return the running sum of gradients, which is a state and must not be changed."""
        return state["momentum"].mul_(group["momentum"]).add_(gradient)
