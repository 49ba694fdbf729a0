"""The benchmark measures every row on little text; a stand-in replaces datatrove, which is not in this environment."""

import json
import re
import sys
from pathlib import Path

import pytest

from data.command_line import UserError
from launch.benchmarks.preparation import ROWS, main
from launch.benchmarks.preparation_rows import TABLE, Bench, Row
from launch.benchmarks.settings import PreparationSettings

TINY = ["--megabytes", "0.05", "--rounds", "1", "--index_documents", "2000", "--blend_samples", "1000000", "--set_tokens", "3000000"]
DATATROVE = """#!{python}
import pathlib, sys, tokenizers
_, program, corpus, tokenizer, end_of_text, output, workers = sys.argv
model = tokenizers.Tokenizer.from_file(tokenizer)
import json
lines = [line for path in pathlib.Path(corpus).iterdir() for line in path.read_text().splitlines()]
tokens = sum(len(model.encode(json.loads(line)["text"]).ids) + 1 for line in lines)
pathlib.Path(output).mkdir()
(pathlib.Path(output) / "00000.ds").write_bytes(bytes(2 * (tokens - {missing})))
"""


def stand_in(folder: Path, missing: int) -> str:
    path = folder / "python"
    path.write_text(DATATROVE.format(python=sys.executable, missing=missing))
    path.chmod(0o755)
    return str(path)


def table(printed: str) -> dict[str, list[str]]:
    """Return the columns after the name of each line, by that name."""
    lines = [re.split(r"\s{2,}", line) for line in printed.splitlines() if re.search(r"\s\d\S*\s", line)]
    return {columns[0] or columns[1]: columns for columns in lines}


def test_rows_without_a_peer_are_measured(capsys):
    main([*TINY, "--only", "start_up", "index", "order", "random_access"])
    lines = table(capsys.readouterr().out)
    assert "not measured: no datatrove" in lines["start-up"][-1]
    assert {"index while writing", "order of 1e+06 samples", "sample of 3e+06 tokens", "with document masks", "to open the set"} <= set(
        lines
    )


def test_both_scripts_are_compared_in_one_row(capsys, tmp_path):
    main([*TINY, "--peer_python", stand_in(tmp_path, missing=0), "--only", "sentencepiece"])
    lines = table(capsys.readouterr().out)
    name, unit, ours, peer, ratio, *_ = lines["SentencePiece BPE, 2 processes, its own library"]
    assert unit == "MB/s" and lines[name][-1] == "datatrove"
    assert float(ratio) == pytest.approx(float(ours) / float(peer), abs=0.06)


def test_a_peer_that_writes_other_tokens_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="wrote different numbers of tokens"):
        main([*TINY, "--peer_python", stand_in(tmp_path, missing=1), "--only", "gigatoken"])


def test_a_ratio_above_one_means_that_ours_is_better():
    assert Row("", "MB/s", 6.0, 2.0, "").ratio == 3
    assert Row("", "seconds", 2.0, 6.0, "").ratio == 3
    assert Row("", "seconds", 2.0, None, "").ratio is None


def test_a_short_input_is_repeated(tmp_path):
    lines = [json.dumps({"text": letter * 90}) + "\n" for letter in "abc"]  # 102 bytes each
    (tmp_path / "three.jsonl").write_text("".join(lines))
    bench = Bench(PreparationSettings(input=(str(tmp_path / "three.jsonl"),), megabytes=0.00042), tmp_path)
    assert bench.documents == [*lines, *lines[:2]]
    assert [path.read_text() for path in sorted(bench.corpus(2).iterdir())] == [
        "".join([lines[0], lines[2], lines[1]]),
        lines[1] + lines[0],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "ordr"], 'Unknown row "ordr". Did you mean "order"'),
        (["--rounds", "0"], "rounds is 0; it must be above 0"),
        (["--input", "nowhere.jsonl", "--only", "start_up"], "--input nowhere.jsonl: No such file"),
        (["--peer_python", "/nowhere/python", "--only", "start_up"], "--peer_python /nowhere/python is not a program"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main([*TINY, *options])


def test_every_named_row_has_a_function():
    assert list(ROWS) == list(TABLE) == ["sentencepiece", "huggingface", "gigatoken", "start_up", "index", "order", "random_access"]
