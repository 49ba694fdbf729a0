"""Learning rate as a function of the step."""

import math

from data.sampling.batch_plan import BatchPlan


def learning_rate(
    step: int,
    plan: BatchPlan,
    peak: float,
    kind: str = "cosine",
    warmup_steps: int = 0,
    minimum: float = 0.0,
    decay_fraction: float = 0.2,
) -> float:
    """Return the rate of optimizer step `step`, counted from 0: it rises linearly over `warmup_steps`, then follows `kind`.

    cosine: one half period down (Loshchilov and Hutter 2016, arXiv 1608.03983).  linear: a straight line down.  constant: `peak`.
    wsd: constant, then a straight line down over the last `decay_fraction` of the run (Hu et al. 2024, arXiv 2404.06395).
    Progress after warm-up is counted in positions of the batch plan. A step after the last one would have the rate `minimum`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak
    start, end = plan.position(warmup_steps), plan.position(plan.steps)
    if kind == "wsd":
        size = plan.size(plan.steps)
        start = max(start, end - round(decay_fraction * (end / size)) * size)  # whole steps of the size that the run ends with
    progress = min(1.0, max(0.0, (plan.position(step) - start) / max(1, end - start)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining
