"""Lion: Chen et al. 2023, arXiv 2302.06675."""

from typing import Any

from torch import Tensor

from launch.training.optimizers.elementwise import Elementwise


class Lion(Elementwise):
    """The sign of a running mean of gradients, with one state. A step is larger than AdamW's: use a rate 3 to 10 times lower."""

    name = "lion"
    states = {"exp_avg": 4}
    json_type = "Lion"
    json_parameters = {"lr": ("learning_rate",), "betas": ("beta1", "beta2"), "weight_decay": ("weight_decay",)}

    def defaults(self) -> dict[str, Any]:
        """Return the decay rates of the means."""
        return {"betas": (self.settings.beta1, self.settings.beta2)}

    def direction(self, group: dict, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Return the sign of the mean with beta1; the mean that is kept has beta2."""
        beta1, beta2 = group["betas"]
        update = state["exp_avg"].lerp(gradient, 1 - beta1).sign_()
        state["exp_avg"].lerp_(gradient, 1 - beta2)
        return update
