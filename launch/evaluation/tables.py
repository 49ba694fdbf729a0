"""Tables and sizes as text, for people."""

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is also readable as plain text: the first column aligned left, the others right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return "\n".join([_line(header, widths), rule, *(_line(row, widths) for row in rows)])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
    return "| " + " | ".join(cells) + " |"


def size_text(num_bytes: int) -> str:
    """Return a number of bytes with its unit, three significant digits."""
    for unit, factor in {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if (count := num_bytes / factor) >= 1:
            return f"{count:.{max(0, 2 - int(math.log10(count)))}f} {unit}"
    return f"{num_bytes} bytes"
