"""Days, energy, price and checkpoints of a run."""

import dataclasses
import math

GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16384 / 419
"""GPU-hours for each interruption that was not planned: 419 in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4)."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a whole run takes."""

    days: float
    kilowatt_hours: float
    """Energy of the devices with their share of the data centre's."""
    gpu_hours: float
    price: float | None
    """In the unit of the price of a GPU-hour; None if no price was given."""


def run_cost(seconds: float, gpus: int, watts: float, power_share: float, pue: float, price: float | None) -> Cost:
    """Return the cost of `seconds` on `gpus` devices of `watts` each.

    Energy is watts x `power_share` x hours x `pue`, the power usage effectiveness of the data centre (Patterson et al. 2021, arXiv
    2104.10350, section 2.5). `price` is that of a GPU-hour.
    """
    hours = seconds / 3600 * gpus
    energy = hours * watts / 1000 * power_share * pue
    return Cost(seconds / 86400, energy, hours, None if price is None else hours * price)


def checkpoint_interval(write_seconds: float, gpus: int) -> float:
    """Return the seconds between checkpoints that lose the least time: sqrt(2 x write x time between failures).

    Young 1974 (doi 10.1145/361147.361115); Daly 2006 (doi 10.1016/j.future.2004.11.016) has more terms, which matter only if writing takes
    nearly as long as a failure is away.
    """
    return math.sqrt(2 * write_seconds * GPU_HOURS_BETWEEN_FAILURES * 3600 / gpus)
