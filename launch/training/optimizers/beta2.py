"""Changes of beta2 during a run, and the bias correction that then belongs to Adam's running mean of squares.

The mean of squares is divided by the sum of the weights that it has given to gradients. After t steps with one beta2 the sum is
1 - beta2^t, which optimizers compute from their step. After steps with several values it is 1 minus their product: after 300 steps with
0.99975 it is 0.072, where 1 - 0.999^300 would be 0.26 and steps would be 1.9 times too large. Such a sum is kept in the groups of the
torch optimizer.
"""

from collections.abc import Callable

import torch

CHANGED = "sum_of_weights"
"""Key of a group: the sum after the last step. Groups have it only if beta2 has changed since the first step."""


def beta2_of(built: torch.optim.Optimizer) -> float | None:
    """Return the beta2 of the last step, or of the first one if none was taken; None for an optimizer without beta2."""
    return next((group["betas"][1] for group in built.param_groups if "betas" in group), None)


def sum_of(built: torch.optim.Optimizer) -> float | None:
    """Return the sum after the last step; None if beta2 has not changed."""
    return next((group[CHANGED] for group in built.param_groups if CHANGED in group), None)


def change_beta2(built: torch.optim.Optimizer, beta2: float | None, steps: Callable[[], int]) -> None:
    """Let the next steps have `beta2`; `steps` returns the number of steps so far. None, or an optimizer without beta2: no change."""
    former = beta2_of(built)
    if beta2 is None or former is None or beta2 == former:
        return
    taken = steps()
    for group in built.param_groups:
        if taken:
            group.setdefault(CHANGED, 1 - former**taken)
        group["betas"] = group["betas"][0], beta2


def sum_with(group: dict, step: float) -> float:
    """Return the sum with the gradient of step `step`, counted from 1."""
    beta2 = group["betas"][1]
    return beta2 * group[CHANGED] + 1 - beta2 if CHANGED in group else 1 - beta2**step


def count_step(built: torch.optim.Optimizer) -> None:
    """Note that all tensors have taken a step."""
    for group in built.param_groups:
        if CHANGED in group:
            group[CHANGED] = sum_with(group, 0)


def restore(built: torch.optim.Optimizer, beta2: float | None, sum_of_weights: float | None) -> None:
    """Continue after a step with `beta2` (None: that of the settings) with a sum that `sum_of` returned."""
    change_beta2(built, beta2, lambda: 0)
    for group in built.param_groups:
        if sum_of_weights is not None:
            group[CHANGED] = sum_of_weights
