"""The range of a setting, which stands next to its field: `rate: Annotated[float, Gt(0), Le(1)]`."""

import dataclasses
import math
import operator
import typing

from annotated_types import Ge, Gt, Le, Lt

LARGEST_INTEGER = 2**63 - 1
"""Largest whole number of any setting: numpy and torch compute with 64 bits."""
_COMPARISONS = {Gt: (operator.gt, "above"), Ge: (operator.ge, "at least"), Lt: (operator.lt, "below"), Le: (operator.le, "at most")}


def violated_range(kind: object, value: object) -> str | None:
    """Return the range that a value must be in and is not, such as "above 0 and at most 1"; None for a value that is in it.

    `kind` is the field's annotation. The bounds hold for each item of a tuple; None is always allowed. A float must also be finite, and
    a whole number must fit into 64 bits.
    """
    numbers = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, int | float)]
    bounds = [(*_COMPARISONS[type(bound)], *dataclasses.astuple(bound)) for bound in _bounds(kind)]
    if any(isinstance(number, int) and abs(number) > LARGEST_INTEGER for number in numbers):
        has_least, has_most = (
            any(compare in kinds for compare, *_ in bounds) for kinds in ((operator.gt, operator.ge), (operator.lt, operator.le))
        )
        bounds += [] if has_least else [(operator.ge, "at least", -LARGEST_INTEGER)]
        bounds += [] if has_most else [(operator.le, "at most", LARGEST_INTEGER)]
    elif not all(map(math.isfinite, numbers)):
        return "a finite number"
    if all(compare(number, limit) for compare, _, limit in bounds for number in numbers):
        return None
    return " and ".join(f"{word} {limit}" for _, word, limit in bounds)


def range_complaints(settings: object, prefix: str = "") -> list[str]:
    """Return a message for each field of a settings object, also of its sections, that is outside its range."""
    complaints = []
    for name, kind in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            complaints += range_complaints(value, f"{prefix}{name}.")
        elif allowed := violated_range(kind, value):
            complaints.append(f"{prefix}{name} is {value}; it must be {allowed}.")
    return complaints


def _bounds(kind: object) -> list:
    """Return the bounds of an annotation, also inside `X | None` and tuples."""
    own = [bound for bound in getattr(kind, "__metadata__", ()) if type(bound) in _COMPARISONS]
    return own + [bound for part in typing.get_args(kind) for bound in _bounds(part)]
