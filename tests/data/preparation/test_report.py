"""The report shows the numbers of the manifest and the counts, and loads nothing from elsewhere."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from data.preparation.report import find_remarks, write_report

MANIFEST = {
    "settings": {"input": ["a/", "b.jsonl"], "held_out": 0.02, "filters": {"min_words": 50, "max_words": None}},
    "tokenizer": {"file": "tokenizer.model", "sha256": "ab" * 32, "vocab_size": 6, "end_of_text": 0, "engine": "sentencepiece 0.2.3"},
    "splits": {
        "train": {"documents": 1_200, "tokens": 1_234_000, "bytes": 5_000_000, "shards": [{}, {}]},
        "validation": {"documents": 34, "tokens": 567, "bytes": 2_000, "shards": [{}]},
    },
    "dropped": {"empty": 3, "duplicate": 10, "near duplicate": 0},
    "inputs": [
        {"given": "a/", "files": 2, "documents": 600, "tokens": 734_567, "bytes": 2_501_000, "dropped": 3},
        {"given": "b <1>.jsonl", "files": 1, "documents": 634, "tokens": 500_000, "bytes": 2_501_000, "dropped": 10},
    ],
    "sources": [],
}
TOKEN_COUNTS = np.array([1_234, 3, 110_000, 100_000, 100_000, 923_330])
LENGTH_COUNTS = np.array([0, 4, 0, 0, 30, 0, 0, 1_200, 0])
EXAMPLES = {"duplicate": [{"place": "a/x.txt", "text": "<script>alert('&')</script>" + "x" * 9_000}], "empty": []}


def decode(ids):
    return {1: " the", 2: "e\n", 3: "\ufffd", 4: "<b>"}.get(ids[0], "z")


class Page(HTMLParser):
    """The words and the table rows of a page. It fails if elements are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.rows, self.links, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def page(tmp_path):
    def write(manifest=MANIFEST, token_counts=TOKEN_COUNTS, length_counts=LENGTH_COUNTS, examples=EXAMPLES):
        write_report(tmp_path, manifest, token_counts, length_counts, examples, decode)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def changed(**values):
    return copy.deepcopy(MANIFEST) | values


def test_report_contains_the_manifests_numbers(page):
    read = Page(page())
    assert ["train", "1,200", "1,234,000", "5,000,000", "4.05", "2"] in read.rows
    assert ["validation", "34", "567", "2,000", "3.53", "1"] in read.rows
    assert ["duplicate", "10", "0.8 %", ""] in read.rows
    assert ["b <1>.jsonl", "1", "634", "10", "2,501,000", "500,000", "5.00", "41 %", ""] in read.rows
    assert ["a/", "2", "600", "3", "2,501,000", "734,567", "3.40", "59 %", ""] in read.rows
    assert ["2 to 3", "4"] in read.rows and ["128 to 255", "1,200"] in read.rows
    assert ["filters.min_words", "50"] in read.rows and ["engine", "sentencepiece 0.2.3"] in read.rows
    assert not any("near duplicate" in row or "filters.max_words" in row for row in read.rows)
    for words in (
        "documents 1,234 tokens 1,234,567 text 5.0 MB bytes per token 4.05 tokens per document 1,000",
        "Dropped: 13 of 1,247 documents read, 1.0 %",
        "128 to 255 tokens, including the end-of-text",
    ):
        assert words in read.text


def test_tokens_are_shown_as_visible_text(page):
    rows = Page(page()).rows
    pieces = [["z", "5", "923,330", "75 %"], ["e⏎", "2", "110,000", "8.9 %"], ["(part of a character)", "3", "100,000", "8.1 %"]]
    assert [row for row in rows if row in pieces] == [*pieces, *pieces[:0:-1], pieces[0]], "by frequency, then in reverse order"
    assert ["␣the", "1", "3", "below 0.1 %"] in rows and ["(end of text)", "0", "1,234", "below 0.1 %"] in rows


def test_dropped_text_is_escaped_and_shortened(page):
    written = page()
    assert "<script>alert('&')</script>x" in Page(written).text
    assert "9,027 characters" in written
    assert len(re.findall("x{400}", written)) == 1


def test_report_has_no_scripts_and_no_links(page):
    read = Page(page())
    assert read.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert len(read.links) == 2 and all(link.startswith("data:image/svg+xml;base64,") for link in read.links)


def test_report_is_deterministic(page):
    assert page() == page()


def test_empty_corpus_has_a_report(page):
    nothing = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    given = {"given": "-", "files": 0, "documents": 0, "tokens": 0, "bytes": 0, "dropped": 0}
    empty = changed(splits={"train": nothing}, dropped={}, inputs=[given])
    read = Page(page(empty, np.zeros(6, np.int64), np.zeros(9, np.int64), {}))
    assert "None of the 0 documents read." in read.text
    assert "No document of - is left." in read.text
    assert not read.links


def test_large_vocabularies_and_many_inputs_stay_readable(page):
    counts = np.zeros(200_000, np.int64)
    counts[:150_000] = 10**9 // np.arange(1, 150_001)
    given = MANIFEST["inputs"][0]
    written = page(changed(inputs=[given] * 1_000), counts, np.full(40, 10**8))
    assert len(written) < 300_000
    read = Page(written)
    assert ["960 others", "1,920", "576,000", "2,880", "2,400,960,000", "705,184,320", "3.40", "96 %", ""] in read.rows


def test_unusual_facts_are_remarked():
    train = MANIFEST["splits"]["train"]
    odd = changed(
        splits={"train": train | {"bytes": 1_500_000}},
        dropped={"min_words": 900, "empty": 20},
        inputs=[
            {"given": "a", "files": 1, "documents": 1_200, "tokens": 1_233_000, "bytes": 9, "dropped": 0},
            {"given": "b", "files": 1, "documents": 0, "tokens": 0, "bytes": 0, "dropped": 9},
        ],
    )
    assert find_remarks(odd, np.array([0, 0, 0, 9, 9, 1_000_000]), np.array([0, 0, 0, 500, 0, 400]), decode) == [
        "43 % of the documents read were dropped; the most frequent reason is: min_words.",
        "No document is held out, so training has no validation loss.",
        "No document of b is left.",
        "a has 99.9 % of all tokens.",
        "Half of the documents are shorter than 16 tokens.",
        "1.22 bytes per token are few: the tokenizer was trained on other text, or has few ids.",
        "50 % of the ids never occur (3 of 6).",
        "One id of 6, z, is 81 % of all tokens.",
    ]


def test_ordinary_corpus_has_no_remarks():
    assert find_remarks(MANIFEST, np.full(100, 12_345), LENGTH_COUNTS, decode) == []
