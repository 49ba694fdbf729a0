"""The range of a setting, which stands next to its field: `rate: Annotated[float, Gt(0), Le(1)]`."""

import dataclasses
import math
import operator
import typing

from annotated_types import Ge, Gt, Le, Lt

_COMPARISONS = {Gt: (operator.gt, "above"), Ge: (operator.ge, "at least"), Lt: (operator.lt, "below"), Le: (operator.le, "at most")}


def violated_range(kind: object, value: object) -> str | None:
    """Return the range that a value must be in and is not, such as "above 0 and at most 1"; None for a value that is in it.

    `kind` is the field's annotation. The bounds hold for each item of a tuple; None is always allowed. A float must also be finite.
    """
    numbers = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, int | float)]
    if not all(map(math.isfinite, numbers)):
        return "a finite number"
    bounds = [(*_COMPARISONS[type(bound)], *dataclasses.astuple(bound)) for bound in _bounds(kind)]
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
