"""The space of a search: the settings that are tried, each with its values or its range."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

SCALES = ("log", "linear")
NOT_SEARCHED = ("output", "seed", "pause_tokens", "resume", "allow_changes", "dry_run", "config")
"""Settings of a run that the search itself sets, or that make no sense in it."""

Values = dict[str, str]
"""The values of a trial by dotted name, as a command line has them."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One setting of a space: a list of values, or a range."""

    text: str
    """The text that the user gave."""
    name: str
    """Dotted name of the setting."""
    values: tuple[str, ...] = ()
    """The values of a list; empty for a range."""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    """True if the values of a range are spread evenly in their logarithm."""
    is_whole: bool = False
    """True if a range has whole numbers only."""

    def at(self, share: float) -> str:
        """Return the value at a share of the space, from 0 (the first value or low) to below 1 (the last value or high)."""
        if self.values:
            return self.values[int(share * len(self.values))]
        if self.is_whole and not self.is_log:
            return str(math.floor(self.low + share * (self.high + 1 - self.low)))
        number = self.low * (self.high / self.low) ** share if self.is_log else self.low + share * (self.high - self.low)
        return number_text(number, self.is_whole)

    @property
    def ends(self) -> tuple[str, ...]:
        """All values of a list, or the two ends of a range."""
        return self.values or (number_text(self.low, self.is_whole), number_text(self.high, self.is_whole))


def read_dimension(text: str) -> Dimension:
    """Read "NAME VALUE VALUE ..." or "NAME log|linear LOW HIGH [N]". Raises ValueError with what is wrong."""
    name, *words = text.split() or [""]
    name = name.removeprefix("--")
    if name in NOT_SEARCHED:
        raise ValueError(f"{name} cannot be searched: the search sets it for each run." if name != "config" else "give recipe instead.")
    if not name:
        raise ValueError("the text is empty. Give a setting and its values.")
    if not words or words[0] not in SCALES:
        if len(set(words)) < 2:
            raise ValueError('one point is not a space. Give two values or more, or "log LOW HIGH".')
        if repeated := [word for word in dict.fromkeys(words) if words.count(word) > 1]:
            raise ValueError(f"{repeated[0]} stands twice.")
        return Dimension(text, name, tuple(words))
    scale, *numbers = words
    if len(numbers) not in (2, 3):
        raise ValueError(f"{scale} needs LOW and HIGH, and may have a number of values.")
    low, high = (_number(word) for word in numbers[:2])
    if not low < high:
        raise ValueError(f"LOW {numbers[0]} must be below HIGH {numbers[1]}.")
    if scale == "log" and low <= 0:
        raise ValueError(f"LOW {numbers[0]} must be above 0 for log. Use linear, or a larger LOW.")
    one = Dimension(text, name, (), low, high, scale == "log", all(word.lstrip("-").isdecimal() for word in numbers[:2]))
    if len(numbers) == 2:
        return one
    if not numbers[2].isdecimal() or int(numbers[2]) < 2:
        raise ValueError(f"the number of values is {numbers[2]}; it must be a whole number, 2 or more.")
    values = dict.fromkeys(_value_of_list(one, index / (int(numbers[2]) - 1)) for index in range(int(numbers[2])))
    return dataclasses.replace(one, values=tuple(values))


def _value_of_list(one: Dimension, share: float) -> str:
    number = one.low * (one.high / one.low) ** share if one.is_log else one.low + share * (one.high - one.low)
    return number_text(number, one.is_whole)


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        raise ValueError(f"{word} is not a number.") from None
    if not math.isfinite(number):
        raise ValueError(f"{word} is not a finite number.")
    return number


def number_text(number: float, is_whole: bool) -> str:
    """Return a number as it is written on a command line, with at most six digits."""
    return str(round(number)) if is_whole else f"{number:.6g}"


def grid(space: Sequence[Dimension]) -> list[Values]:
    """Return every combination of the values of lists; those of the last setting change first."""
    names = [dimension.name for dimension in space]
    return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*(one.values for one in space))]


def words_of(values: Values) -> list[str]:
    """Return the values of a trial as options of launch/pretrain.py."""
    return [f"--{name}={value}" for name, value in values.items()]
