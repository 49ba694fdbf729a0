"""Command lines over command lines."""

from itertools import takewhile


def over(words: list[str], more: list[str]) -> list[str]:
    """`words` without the options that `more` names, with their values, and `more`: a list may be given once."""
    named = {word for word in more if word.startswith("--")}
    kept, left = [], list(words)
    while left:
        option = left.pop(0)
        values = list(takewhile(lambda word: not word.startswith("--"), left))
        del left[: len(values)]
        kept += [option, *values] if option not in named else []
    return [*kept, *more]
