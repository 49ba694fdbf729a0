"""Learning rate as a function of the step, and the batch ramp that replaces its decay."""

import dataclasses
import math

from data.sampling.batch_plan import BatchPlan, segments_from


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
    Progress is counted in positions of the batch plan. A step after the last one would have the rate `minimum`. Where the batch has
    another size, `peak` is the rate that belongs to that size.
    """
    if step < warmup_steps:
        size = plan.size(warmup_steps)  # with one size, positions / size are steps
        return peak * (plan.position(step + 1) / size) / (plan.position(warmup_steps + 1) / size)
    if kind == "constant":
        return peak
    start, end = plan.position(warmup_steps), plan.position(plan.steps)
    if kind == "wsd":
        size = plan.size(plan.steps - 1)
        start = max(start, end - max(1, round(decay_fraction * (end / size))) * size)  # whole steps of the size that the run ends with
    progress = min(1.0, max(0.0, (plan.position(step) - start) / max(1, end - start)))
    remaining = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining


def seesaw(plan: BatchPlan, kind: str, warmup_steps: int, minimum: float, peak: float, decay_fraction: float) -> BatchPlan:
    """Return a plan whose batch grows where the schedule lowers the learning rate (Meterez et al. 2025, arXiv 2510.14717).

    `plan` has one size, `batch` its sizes with the ramp. Where the rate has fallen to 1 / a of the peak, the batch becomes a times its
    first size. With the rate times the root of the size, the rate is then divided by the root of a alone.
    """
    first_size, *sizes = plan.batch.seesaw_sizes
    starts, first = [(0, first_size)], warmup_steps
    for size in sizes:
        low, high = first, plan.steps  # the rate never rises after warm-up: the first step with a rate so low by bisection
        while low < high:
            middle = (low + high) // 2
            rate = learning_rate(middle, plan, peak, kind, warmup_steps, minimum, decay_fraction)
            low, high = (low, middle) if rate <= peak * first_size / size else (middle + 1, high)
        if low == plan.steps:
            break
        first = low
        starts.append((plan.position(low), size))
    return dataclasses.replace(plan, segments=segments_from(starts))
