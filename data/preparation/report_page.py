"""Building blocks of an HTML page that any browser shows: no network, no scripts, pictures inside."""

import base64
import html
import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind people can distinguish.
BLUE, ORANGE = "#0072b2", "#d55e00"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2329; background: #f4f5f6; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 0 0 8px; } h3 { font-size: 14px; margin: 0 0 4px; }
header p { color: #5f6b76; margin: 2px 0 16px; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #dde1e4; border-radius: 8px; padding: 16px 20px; margin-bottom: 16px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.columns > section { margin-bottom: 0; min-width: 0; } .columns { margin-bottom: 16px; }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 16px; margin: 0 0 12px; }
.totals dt { color: #5f6b76; } .totals dd { font-size: 26px; font-weight: 600; margin: 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; color: #5f6b76; font-weight: 500; white-space: nowrap; }
td { text-align: right; border-top: 1px solid #eceff1; white-space: nowrap; }
th, td { padding: 3px 8px; } th.text, td.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 130px; }
td.bar { width: 25%; min-width: 90px; } .bar div { background: #0072b2; height: 12px; border-radius: 2px; min-width: 1px; }
.dropped .bar div { background: #d55e00; }
ul { margin: 0; padding-left: 20px; } img { width: 100%; height: auto; display: block; }
pre { background: #f4f5f6; border-radius: 4px; padding: 8px 10px; margin: 2px 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code { font: 13px/1.45 ui-monospace, monospace; } code { background: #f4f5f6; border-radius: 3px; padding: 1px 4px; white-space: pre; }
summary { cursor: pointer; } .place, .note { color: #5f6b76; font-size: 13px; overflow-wrap: anywhere; } .note { margin: 8px 0 0; }
"""


def html_page(title: str, sections: list[str]) -> bytes:
    """Return a whole page of sections, which are HTML."""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    return page.encode()


def table(header: list[str], rows: list[list[str]], bars: list[float] | None = None, text_columns: int = 1) -> str:
    """Return a table. Cells are plain text; the first columns are left-aligned; `bars`, from 0 to 1, follow the rows."""

    def _line(tag: str, cells: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if index < text_columns else ''}>{html.escape(cell)}</{tag}>" for index, cell in enumerate(cells)
        )

    ends = [f'<td class=bar><div style="width:{bar:.1%}"></div></td>' for bar in bars] if bars is not None else [""] * len(rows)
    body = "".join(f"<tr>{_line('td', row)}{end}</tr>\n" for row, end in zip(rows, ends, strict=True))
    empty = "<th></th>" if bars is not None else ""
    return f'<div class="scroll"><table>\n<tr>{_line("th", header)}{empty}</tr>\n{body}</table></div>'


def new_figure(width: float) -> tuple[Figure, Axes]:
    """Return an empty figure of a width in inches, and its axes."""
    figure = Figure(figsize=(width, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dde1e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def picture(figure: Figure, description: str) -> str:
    """Return a figure as an image inside the page."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):  # otherwise matplotlib writes random ids
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}">'


def percent(part: float, whole: float) -> str:
    """Return a share as text, such as "8.9 %"."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "below 0.1 %"
    return f"{share:.1f} %" if share < 10 or 99 < share < 100 else f"{share:.0f} %"


def ratio(num_bytes: int, tokens: int) -> str:
    """Return bytes per token as text."""
    return f"{num_bytes / tokens:.2f}" if tokens else "–"


def format_bytes(num_bytes: float) -> str:
    """Return a size as text, such as "5.0 MB"."""
    for unit, size in {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3}.items():
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,} bytes"


def short_number(value: float) -> str:
    """Return a short form of a number, for an axis."""
    for unit, size in {"G": 1e9, "M": 1e6, "k": 1e3}.items():
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.3g}"
