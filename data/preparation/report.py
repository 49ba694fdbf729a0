"""What a prepared folder holds, on a page to read in any browser: no network, no scripts, pictures inside."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.command_line import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "report.html"

_MOST_INPUTS = 40  # rows of a table that somebody still reads
_MOST_PIECES = 16
_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 500
_POINTS_OF_CURVE = 400

# Okabe and Ito's colours, which people who see few colours can tell apart.
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#5f6b76"

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


def write_report(
    folder: Path,
    manifest: dict,
    token_counts: NDArray[np.int64],
    length_counts: NDArray[np.int64],
    examples: dict[str, list[dict]],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Write folder/report.html about a manifest, the occurrences of each id [vocab_size], and document lengths [bins].

    length_counts[b] counts the documents of 2**b to 2**(b + 1) - 1 tokens; `examples` has {"place", "text"} of dropped documents by
    reason; `decode` makes ids text. The same arguments give the same bytes.
    """
    parts = [
        _totals(manifest),
        _remarks(manifest, token_counts, length_counts, decode),
        f'<div class="columns">{_lengths(length_counts)}{_dropped(manifest)}</div>',
        _inputs(manifest["inputs"]),
        _vocabulary(manifest["tokenizer"], token_counts, decode),
        _examples(examples),
        _settings(manifest),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>Prepared text</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    (folder / REPORT).write_bytes(page.encode())


def _totals(manifest: dict) -> str:
    splits = manifest["splits"]
    documents, tokens, num_bytes = (sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes"))
    totals = {
        "documents": f"{documents:,}",
        "tokens": f"{tokens:,}",
        "text": _size(num_bytes),
        "bytes a token": _ratio(num_bytes, tokens),
        "tokens a document": f"{tokens / documents:,.0f}" if documents else "–",
    }
    tiles = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in totals.items())
    rows = [
        [
            split_name,
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['bytes']:,}",
            _ratio(split["bytes"], split["tokens"]),
            f"{len(split['shards']):,}",
        ]
        for split_name, split in splits.items()
    ]
    return (
        "<header><h1>Prepared text</h1><p>What is in this folder, and what was left out</p></header>\n"
        f'<section><dl class="totals">{tiles}</dl>'
        + _table(["split", "documents", "tokens", "bytes", "bytes a token", "shards"], rows)
        + "</section>"
    )


def _remarks(manifest: dict, token_counts: NDArray[np.int64], length_counts: NDArray[np.int64], decode: Callable) -> str:
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in odd_things(manifest, token_counts, length_counts, decode))
    return f"<section><h2>What stands out</h2>{f'<ul>{remarks}</ul>' if remarks else 'Nothing.'}</section>"


def odd_things(
    manifest: dict, token_counts: NDArray[np.int64], length_counts: NDArray[np.int64], decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """What somebody should know before training on this, a sentence each; arguments as in write_report."""
    remarks = []
    splits, inputs, dropped = manifest["splits"], manifest["inputs"], manifest["dropped"]
    kept, tokens, num_bytes = (sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes"))
    gone = sum(dropped.values())
    if gone > 0.1 * (kept + gone):
        worst = max(dropped, key=dropped.__getitem__)
        remarks.append(f"{_percent(gone, kept + gone)} of the documents read were dropped, most of them for: {worst}.")
    if not splits.get("validation", {}).get("documents"):
        remarks.append("No document is held out, so no training run can have a validation loss.")
    remarks += [f"{given['given']} gave no document at all." for given in inputs if not given["documents"]][:5]
    if len(inputs) > 1 and tokens:
        largest = max(inputs, key=lambda given: given["tokens"])
        if largest["tokens"] > 0.9 * tokens:
            remarks.append(f"{largest['given']} holds {_percent(largest['tokens'], tokens)} of all tokens.")
    if length_counts.sum():
        longest_half = 2 ** (_median_bin(length_counts) + 1)
        if longest_half <= 64:
            remarks.append(f"Half of all documents are shorter than {longest_half} tokens.")
    if 0 < num_bytes < 2 * tokens:
        remarks.append(f"{_ratio(num_bytes, tokens)} bytes a token are few: the tokenizer was made for other text, or has few ids.")
    never = int((token_counts == 0).sum())
    if never > 0.1 * len(token_counts):
        remarks.append(f"{_percent(never, len(token_counts))} of the ids never occur ({never:,} of {len(token_counts):,}).")
    if tokens:
        commonest = int(token_counts.argmax())
        if token_counts[commonest] > 0.1 * tokens:
            piece = _piece(commonest, manifest["tokenizer"], decode)
            remarks.append(f"One id of {len(token_counts):,}, {piece}, is {_percent(int(token_counts[commonest]), tokens)} of all tokens.")
    return remarks


def _lengths(length_counts: NDArray[np.int64]) -> str:
    occupied = np.flatnonzero(length_counts)
    if not len(occupied):
        return "<section><h2>Length of documents</h2>There are none.</section>"
    bins = np.arange(occupied[0], occupied[-1] + 1)
    median = _median_bin(length_counts)
    figure, axes = _figure(5.4)
    axes.bar(bins, length_counts[bins], width=0.94, align="edge", color=[_ORANGE if number == median else _BLUE for number in bins])
    every = len(bins) // 13 + 1
    edges = [*bins, bins[-1] + 1][::every]
    axes.set_xticks(edges, [f"{2**edge}" if edge < 10 else f"{2 ** (edge - 10):,}k" for edge in map(int, edges)])
    axes.set_xlabel("tokens in the document (1k = 1,024)")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    rows = [
        [f"{2**number:,} to {2 ** (number + 1) - 1:,}" if number else "1", f"{int(length_counts[number]):,}"] for number in map(int, bins)
    ]
    between = f"{2**median:,} to {2 ** (median + 1) - 1:,}" if median else "1"
    note = f"The middle document is in the orange bar: {between} tokens, the end-of-text token among them."
    return (
        f"<section><h2>Length of documents</h2>{_picture(figure, 'Documents by their number of tokens. ' + note)}"
        f'<p class="note">{note}</p><details><summary class="note">as numbers</summary>'
        f"{_table(['tokens', 'documents'], rows)}</details></section>"
    )


def _dropped(manifest: dict) -> str:
    dropped = {reason: count for reason, count in manifest["dropped"].items() if count}
    gone = sum(dropped.values())
    read = gone + sum(split["documents"] for split in manifest["splits"].values())
    if not dropped:
        return f"<section><h2>Dropped</h2>None of the {read:,} documents read.</section>"
    most = max(dropped.values())
    in_order = sorted(dropped.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [[reason, f"{count:,}", _percent(count, read)] for reason, count in in_order]
    return (
        f'<section class="dropped"><h2>Dropped: {gone:,} of {read:,} documents read, {_percent(gone, read)}</h2>'
        + _table(["reason", "documents", "of all read"], rows, [count / most for _, count in in_order])
        + "</section>"
    )


def _inputs(inputs: list[dict]) -> str:
    in_order = sorted(inputs, key=lambda given: -given["tokens"])
    shown, others = in_order[:_MOST_INPUTS], in_order[_MOST_INPUTS:]
    if others:
        totals = {name: sum(given[name] for given in others) for name in ("files", "documents", "tokens", "bytes", "dropped")}
        shown = [*shown, {"given": f"{len(others):,} others"} | totals]
    total = sum(given["tokens"] for given in inputs)
    rows = [
        [
            given["given"],
            f"{given['files']:,}",
            f"{given['documents']:,}",
            f"{given['dropped']:,}",
            f"{given['bytes']:,}",
            f"{given['tokens']:,}",
            _ratio(given["bytes"], given["tokens"]),
            _percent(given["tokens"], total),
        ]
        for given in shown
    ]
    header = ["input", "files", "documents", "dropped", "bytes", "tokens", "bytes a token", "of all tokens"]
    bars = [given["tokens"] / total if total else 0.0 for given in shown]
    return f"<section><h2>Where the tokens come from</h2>{_table(header, rows, bars)}</section>"


def _examples(examples: dict[str, list[dict]]) -> str:
    if not any(examples.values()):
        return ""
    parts = []
    for reason, dropped in sorted(examples.items()):
        texts = "".join(
            f'<div class="place">{html.escape(example["place"])}</div><pre dir="auto">{html.escape(_cut(example["text"]))}</pre>'
            for example in islice(dropped, _EXAMPLES)
        )
        parts.append(f"<details open><summary><strong>{html.escape(reason)}</strong></summary>{texts}</details>" if dropped else "")
    return f"<section><h2>Some that were dropped</h2>{''.join(parts)}</section>"


def _vocabulary(tokenizer: dict, token_counts: NDArray[np.int64], decode: Callable[[Sequence[int]], str]) -> str:
    order = np.argsort(-token_counts, kind="stable")
    used = order[: int((token_counts > 0).sum())]
    total = int(token_counts.sum())
    if not total:
        return ""
    counts = token_counts[used]
    reached = np.cumsum(counts)
    of_all = {share: int(np.searchsorted(reached, share * total)) + 1 for share in (0.5, 0.9, 0.99)}

    figure, axes = _figure(10.5)
    ranks = np.unique(np.geomspace(1, len(used), _POINTS_OF_CURVE).astype(np.int64))
    axes.loglog(ranks, counts[ranks - 1], color=_BLUE, linewidth=2)
    for share, rank in of_all.items():
        axes.axvline(rank, color=_ORANGE, linewidth=1, linestyle="--")
        axes.annotate(
            _percent(share, 1),
            (rank, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            color=_ORANGE,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("rank of the id, the most frequent first")
    axes.set_ylabel("occurrences")
    note = (
        f"{len(used):,} of {len(token_counts):,} ids occur; {_percent(len(token_counts) - len(used), len(token_counts))} never do. "
        + "; ".join(f"{rank:,} ids make up {_percent(share, 1)} of all tokens" for share, rank in of_all.items())
        + "."
    )

    def pieces(ids: NDArray[np.int64]) -> str:
        rows = [
            [_piece(number, tokenizer, decode), f"{number:,}", f"{int(token_counts[number]):,}", _percent(int(token_counts[number]), total)]
            for number in ids.tolist()
        ]
        return _table(["piece", "id", "occurrences", "of all tokens"], rows)

    return (
        f"<section><h2>Use of the vocabulary</h2>{_picture(figure, 'Occurrences of ids by their rank. ' + note)}"
        f'<p class="note">{note}</p></section>\n<div class="columns">'
        f"<section><h2>Most frequent</h2>{pieces(used[:_MOST_PIECES])}</section>"
        f"<section><h2>Least frequent of those that occur</h2>{pieces(used[::-1][:_MOST_PIECES])}</section></div>"
    )


def _settings(manifest: dict) -> str:
    def rows(values: dict) -> list[list[str]]:
        flat = flatten(values)
        return [
            [name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
            for name, value in flat.items()
            if value is not None
        ]

    return (
        f'<div class="columns"><section><h2>Settings</h2>{_table(["name", "value"], rows(manifest["settings"]), text_columns=2)}</section>'
        f"<section><h2>Tokenizer</h2>{_table(['name', 'value'], rows(manifest['tokenizer']), text_columns=2)}</section></div>"
    )


def _table(header: list[str], rows: list[list[str]], bars: list[float] | None = None, text_columns: int = 1) -> str:
    """Cells are plain text, the first columns to the left; bars, from 0 to 1, stand behind the rows."""

    def line(tag: str, cells: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if place < text_columns else ''}>{html.escape(cell)}</{tag}>" for place, cell in enumerate(cells)
        )

    ends = [f'<td class=bar><div style="width:{bar:.1%}"></div></td>' for bar in bars] if bars is not None else [""] * len(rows)
    body = "".join(f"<tr>{line('td', row)}{end}</tr>\n" for row, end in zip(rows, ends, strict=True))
    empty = "<th></th>" if bars is not None else ""
    return f'<div class="scroll"><table>\n<tr>{line("th", header)}{empty}</tr>\n{body}</table></div>'


def _figure(width: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure  # half a second, for this page alone

    figure = Figure(figsize=(width, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dde1e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _picture(figure: "Figure", description: str) -> str:
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):  # else the names inside are drawn by chance
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _median_bin(length_counts: NDArray[np.int64]) -> int:
    return int(np.searchsorted(np.cumsum(length_counts), length_counts.sum() / 2))


def _piece(number: int, tokenizer: dict, decode: Callable[[Sequence[int]], str]) -> str:
    """A token as it can be seen."""
    if number == tokenizer["end_of_text"]:
        return "(end of text)"
    text = decode([number])
    for invisible, sign in {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}.items():
        text = text.replace(invisible, sign)
    if "\ufffd" in text:
        return "(part of a character)"
    return text if text.isprintable() and text else "(not to be seen)"


def _cut(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else f"{text[:_EXAMPLE_CHARACTERS]} … ({len(text):,} characters)"


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "below 0.1 %"
    return f"{share:.1f} %" if share < 10 or 99 < share < 100 else f"{share:.0f} %"


def _ratio(num_bytes: int, tokens: int) -> str:
    return f"{num_bytes / tokens:.2f}" if tokens else "–"


def _size(num_bytes: float) -> str:
    for unit, size in {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3}.items():
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,} bytes"


def _short(value: float) -> str:
    """A number on an axis."""
    for unit, size in {"G": 1e9, "M": 1e6, "k": 1e3}.items():
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.3g}"
