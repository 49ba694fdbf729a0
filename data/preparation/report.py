"""The report of a prepared folder: a page that shows its content, what was dropped, and what is unusual."""

import html
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.command_line import flatten
from data.preparation.report_page import BLUE, ORANGE, format_bytes, html_page, new_figure, percent, picture, ratio, short_number, table

REPORT = "report.html"

_MAX_INPUTS = 40  # rows of the table of inputs
_MAX_TOKENS = 16
_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 500
_CURVE_POINTS = 400


def write_report(
    folder: Path,
    manifest: dict,
    token_counts: NDArray[np.int64],
    length_counts: NDArray[np.int64],
    examples: dict[str, list[dict]],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Write folder/report.html from a manifest, the occurrences of each id [vocab_size] and the length histogram [bins].

    length_counts[b] is the number of documents of 2**b to 2**(b + 1) - 1 tokens. `examples` has {"place", "text"} of dropped documents
    by reason. `decode` turns ids into text. The same arguments give the same bytes.
    """
    sections = [
        _totals(manifest),
        _remarks(manifest, token_counts, length_counts, decode),
        f'<div class="columns">{_lengths(length_counts)}{_dropped(manifest)}</div>',
        _inputs(manifest["inputs"]),
        _vocabulary(manifest["tokenizer"], token_counts, decode),
        _examples(examples),
        _settings(manifest),
    ]
    (folder / REPORT).write_bytes(html_page("Prepared text", sections))


def _totals(manifest: dict) -> str:
    splits = manifest["splits"]
    documents, tokens, num_bytes = (sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes"))
    totals = {
        "documents": f"{documents:,}",
        "tokens": f"{tokens:,}",
        "text": format_bytes(num_bytes),
        "bytes per token": ratio(num_bytes, tokens),
        "tokens per document": f"{tokens / documents:,.0f}" if documents else "–",
    }
    tiles = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in totals.items())
    rows = [
        [
            split_name,
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['bytes']:,}",
            ratio(split["bytes"], split["tokens"]),
            f"{len(split['shards']):,}",
        ]
        for split_name, split in splits.items()
    ]
    return (
        "<header><h1>Prepared text</h1><p>Content of this folder, and what was dropped</p></header>\n"
        f'<section><dl class="totals">{tiles}</dl>'
        + table(["split", "documents", "tokens", "bytes", "bytes per token", "shards"], rows)
        + "</section>"
    )


def _remarks(manifest: dict, token_counts: NDArray[np.int64], length_counts: NDArray[np.int64], decode: Callable) -> str:
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in find_remarks(manifest, token_counts, length_counts, decode))
    return f"<section><h2>What stands out</h2>{f'<ul>{remarks}</ul>' if remarks else 'Nothing.'}</section>"


def find_remarks(
    manifest: dict, token_counts: NDArray[np.int64], length_counts: NDArray[np.int64], decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """Return remarks on what is unusual and should be known before training. The arguments are those of write_report."""
    remarks = []
    splits, inputs, dropped = manifest["splits"], manifest["inputs"], manifest["dropped"]
    kept, tokens, num_bytes = (sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes"))
    num_dropped = sum(dropped.values())
    if num_dropped > 0.1 * (kept + num_dropped):
        top_reason = max(dropped, key=dropped.__getitem__)
        remarks.append(
            f"{percent(num_dropped, kept + num_dropped)} of the documents read were dropped; the most frequent reason is: {top_reason}."
        )
    if not splits.get("validation", {}).get("documents"):
        remarks.append("No document is held out, so training has no validation loss.")
    remarks += [f"No document of {one['given']} is left." for one in inputs if not one["documents"]][:5]
    if len(inputs) > 1 and tokens:
        largest = max(inputs, key=lambda one: one["tokens"])
        if largest["tokens"] > 0.9 * tokens:
            remarks.append(f"{largest['given']} has {percent(largest['tokens'], tokens)} of all tokens.")
    if length_counts.sum():
        longest_half = 2 ** (_median_bin(length_counts) + 1)
        if longest_half <= 64:
            remarks.append(f"Half of the documents are shorter than {longest_half} tokens.")
    if 0 < num_bytes < 2 * tokens:
        remarks.append(f"{ratio(num_bytes, tokens)} bytes per token are few: the tokenizer was trained on other text, or has few ids.")
    num_unused = int((token_counts == 0).sum())
    if num_unused > 0.1 * len(token_counts):
        remarks.append(f"{percent(num_unused, len(token_counts))} of the ids never occur ({num_unused:,} of {len(token_counts):,}).")
    if tokens:
        most_frequent = int(token_counts.argmax())
        if token_counts[most_frequent] > 0.1 * tokens:
            piece = _piece(most_frequent, manifest["tokenizer"], decode)
            remarks.append(
                f"One id of {len(token_counts):,}, {piece}, is {percent(int(token_counts[most_frequent]), tokens)} of all tokens."
            )
    return remarks


def _lengths(length_counts: NDArray[np.int64]) -> str:
    occupied = np.flatnonzero(length_counts)
    if not len(occupied):
        return "<section><h2>Length of documents</h2>There are none.</section>"
    bins = np.arange(occupied[0], occupied[-1] + 1)
    median = _median_bin(length_counts)
    figure, axes = new_figure(5.4)
    axes.bar(bins, length_counts[bins], width=0.94, align="edge", color=[ORANGE if number == median else BLUE for number in bins])
    every = len(bins) // 13 + 1
    edges = [*bins, bins[-1] + 1][::every]
    axes.set_xticks(edges, [f"{2**edge}" if edge < 10 else f"{2 ** (edge - 10):,}k" for edge in map(int, edges)])
    axes.set_xlabel("tokens in the document (1k = 1,024)")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    rows = [
        [f"{2**number:,} to {2 ** (number + 1) - 1:,}" if number else "1", f"{int(length_counts[number]):,}"] for number in map(int, bins)
    ]
    between = f"{2**median:,} to {2 ** (median + 1) - 1:,}" if median else "1"
    note = f"The median document is in the orange bar: {between} tokens, including the end-of-text token."
    return (
        f"<section><h2>Length of documents</h2>{picture(figure, 'Documents by their number of tokens. ' + note)}"
        f'<p class="note">{note}</p><details><summary class="note">as numbers</summary>'
        f"{table(['tokens', 'documents'], rows)}</details></section>"
    )


def _dropped(manifest: dict) -> str:
    dropped = {reason: count for reason, count in manifest["dropped"].items() if count}
    num_dropped = sum(dropped.values())
    read = num_dropped + sum(split["documents"] for split in manifest["splits"].values())
    if not dropped:
        return f"<section><h2>Dropped</h2>None of the {read:,} documents read.</section>"
    most = max(dropped.values())
    in_order = sorted(dropped.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [[reason, f"{count:,}", percent(count, read)] for reason, count in in_order]
    return (
        f'<section class="dropped"><h2>Dropped: {num_dropped:,} of {read:,} documents read, {percent(num_dropped, read)}</h2>'
        + table(["reason", "documents", "of all read"], rows, [count / most for _, count in in_order])
        + "</section>"
    )


def _inputs(inputs: list[dict]) -> str:
    in_order = sorted(inputs, key=lambda given: -given["tokens"])
    shown, others = in_order[:_MAX_INPUTS], in_order[_MAX_INPUTS:]
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
            ratio(given["bytes"], given["tokens"]),
            percent(given["tokens"], total),
        ]
        for given in shown
    ]
    header = ["input", "files", "documents", "dropped", "bytes", "tokens", "bytes per token", "of all tokens"]
    bars = [given["tokens"] / total if total else 0.0 for given in shown]
    return f"<section><h2>Where the tokens come from</h2>{table(header, rows, bars)}</section>"


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
    return f"<section><h2>Examples of dropped documents</h2>{''.join(parts)}</section>"


def _vocabulary(tokenizer: dict, token_counts: NDArray[np.int64], decode: Callable[[Sequence[int]], str]) -> str:
    order = np.argsort(-token_counts, kind="stable")
    used = order[: int((token_counts > 0).sum())]
    total = int(token_counts.sum())
    if not total:
        return ""
    counts = token_counts[used]
    reached = np.cumsum(counts)
    of_all = {share: int(np.searchsorted(reached, share * total)) + 1 for share in (0.5, 0.9, 0.99)}

    figure, axes = new_figure(10.5)
    ranks = np.unique(np.geomspace(1, len(used), _CURVE_POINTS).astype(np.int64))
    axes.loglog(ranks, counts[ranks - 1], color=BLUE, linewidth=2)
    for share, rank in of_all.items():
        axes.axvline(rank, color=ORANGE, linewidth=1, linestyle="--")
        axes.annotate(
            percent(share, 1),
            (rank, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            color=ORANGE,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short_number(value))
    axes.set_xlabel("rank of the id, the most frequent first")
    axes.set_ylabel("occurrences")
    note = (
        f"{len(used):,} of {len(token_counts):,} ids occur; {percent(len(token_counts) - len(used), len(token_counts))} never do. "
        + "; ".join(f"{rank:,} ids make up {percent(share, 1)} of all tokens" for share, rank in of_all.items())
        + "."
    )

    def _pieces(ids: NDArray[np.int64]) -> str:
        rows = [
            [_piece(number, tokenizer, decode), f"{number:,}", f"{int(token_counts[number]):,}", percent(int(token_counts[number]), total)]
            for number in ids.tolist()
        ]
        return table(["piece", "id", "occurrences", "of all tokens"], rows)

    return (
        f"<section><h2>Use of the vocabulary</h2>{picture(figure, 'Occurrences of ids by their rank. ' + note)}"
        f'<p class="note">{note}</p></section>\n<div class="columns">'
        f"<section><h2>Most frequent</h2>{_pieces(used[:_MAX_TOKENS])}</section>"
        f"<section><h2>Least frequent of those that occur</h2>{_pieces(used[::-1][:_MAX_TOKENS])}</section></div>"
    )


def _settings(manifest: dict) -> str:
    def _rows(values: dict) -> list[list[str]]:
        flat = flatten(values)
        return [
            [name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
            for name, value in flat.items()
            if value is not None
        ]

    return (
        f'<div class="columns"><section><h2>Settings</h2>{table(["name", "value"], _rows(manifest["settings"]), text_columns=2)}</section>'
        f"<section><h2>Tokenizer</h2>{table(['name', 'value'], _rows(manifest['tokenizer']), text_columns=2)}</section></div>"
    )


def _median_bin(length_counts: NDArray[np.int64]) -> int:
    return int(np.searchsorted(np.cumsum(length_counts), length_counts.sum() / 2))


def _piece(number: int, tokenizer: dict, decode: Callable[[Sequence[int]], str]) -> str:
    """Return a token as visible text."""
    if number == tokenizer["end_of_text"]:
        return "(end of text)"
    if number == tokenizer.get("begin_of_text"):
        return "(begin of text)"
    text = decode([number])
    for invisible, sign in {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}.items():
        text = text.replace(invisible, sign)
    if "\ufffd" in text:
        return "(part of a character)"
    return text if text.isprintable() and text else "(not printable)"


def _cut(text: str) -> str:
    return text if len(text) <= _EXAMPLE_CHARACTERS else f"{text[:_EXAMPLE_CHARACTERS]} … ({len(text):,} characters)"
