"""BERT learns masked words of WikiText-2, then the labels of SST-2, with our scripts only.

No margin over the same classifier without pretraining is asserted: a run this short does not show one for every seed. The README has what
the whole recipe gains.
"""

import lzma
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.shards import PreparedData
from tests.ranks import REPOSITORY

CORPORA = REPOSITORY.parent / "shared" / "corpora"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not (CORPORA / "wikitext-2").is_dir(), reason="wikitext-2 and sst2 are not next to the repository"),
]


def run(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def paragraphs(folder: Path) -> Path:
    """Write one paragraph per line, lower-cased as SST-2 is, without headings, joined signs and marks of unknown words."""
    lines = lzma.decompress((CORPORA / "wikitext-2" / "train.txt.xz").read_bytes()).decode().lower().split("\n")
    kept = [line for line in lines if line.strip() and not line.startswith(" =")]
    text = re.sub(r" @(\S)@ ", r"\1", "\n".join(kept)).replace("<unk>", "")
    path = folder / "wikitext.txt"
    path.write_text(re.sub(" +", " ", text), encoding="utf-8")
    return path


def loss_by_frequency(prepared: PreparedData) -> float:
    """Return the loss per held-out token, nats, of a prediction from token frequencies in the training split."""
    seen, held_out = (stream.read(0, len(stream)) for stream in (prepared.splits["train"], prepared.splits["validation"]))
    counts = np.bincount(seen, minlength=prepared.vocab_size) + 1
    return float(-np.log(counts / counts.sum())[held_out[held_out != prepared.end_of_text]].mean())


def test_pretraining_beats_token_frequencies_and_its_classifier_learns(tmp_path):
    wikitext, pretrained, classifier = tmp_path / "wikitext", tmp_path / "pretrained", tmp_path / "classifier"
    learnt = ("--vocab_size", 8000, "--pieces_within_words", "--special_tokens", "[CLS]", "[MASK]", "--held_out", 0.01)
    run("data/prepare.py", "--input", paragraphs(tmp_path), "--separator", "line", *learnt, "--output", wikitext)
    labelled = ["--columns", "text", "label", "--pair_field", "label", "--tokenizer", wikitext]
    labelled += ["--held_out", 0, "--exact_duplicates", "keep"]
    for part in ("train", "dev"):
        run("data/prepare.py", "--input", CORPORA / "sst2" / f"{part}.tsv", *labelled, "--output", tmp_path / part)

    recipe = ("--config", "launch/recipes/bert-wikitext.yaml", "--train_steps", 500, "--schedule.warmup_steps", 50)
    run("launch/pretrain.py", *recipe, "--log.validation_interval", 0, "--data", wikitext, "--output", pretrained)
    loss = float(re.search(r"loss: ([\d.]+)", run("launch/evaluate.py", pretrained)).group(1))
    assert (
        loss < loss_by_frequency(PreparedData(wikitext)) - 0.7
    )  # before attention learns to use its neighbours, the loss is half a nat below

    recipe = ("--config", "launch/recipes/sst2.yaml", "--train_steps", 216, "--schedule.warmup_steps", 20, "--init", pretrained)
    run("launch/pretrain.py", *recipe, "--data", tmp_path / "train", "--output", classifier)
    printed = run("launch/evaluate.py", classifier, "--data", tmp_path / "dev", "--split", "train")
    assert float(re.search(r"accuracy: ([\d.]+)%", printed).group(1)) > 65  # there are two classes with half of the sentences each
