"""The learning rate as a function of the step."""

import math


def learning_rate(
    step: int, steps: int, peak: float, kind: str = "cosine", warmup_steps: int = 0, minimum: float = 0.0, decay_fraction: float = 0.2
) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: rises linearly over `warmup_steps`, then follows `kind`.

    cosine: Loshchilov and Hutter 2016, arXiv 1608.03983, one period.  linear: a straight line down.  constant: stays at the peak.
    wsd: stays, then a straight line down over the last `decay_fraction` of all steps (Hu et al. 2024, arXiv 2404.06395).
    The step behind the last one would have the rate `minimum`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak
    start = max(warmup_steps, steps - round(decay_fraction * steps)) if kind == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining
