"""Draw .readme/multi30k.png: python .readme/multi30k_curve.py runs/multi30k test_2016_flickr.en test_2016_flickr.de [CHECKPOINT ...]

The validation loss of a run of launch/recipes/multi30k-en-de.yaml, and the BLEU of checkpoints that were kept of it, beam 5.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import sacrebleu

matplotlib.use("Agg")
from matplotlib import pyplot

HOUSE = Path(__file__).resolve().parent


def bleu(model: Path, source: Path, reference: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "translated"
        words = ["--input", source, "--output", output, "--beam_size", "5"]
        subprocess.run([sys.executable, HOUSE.parent / "launch" / "generate.py", model, *words], check=True)
        translated = output.read_text(encoding="utf-8").splitlines()
    return sacrebleu.corpus_bleu(translated, [reference.read_text(encoding="utf-8").splitlines()]).score


def main(run: Path, source: Path, reference: Path, *checkpoints: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss/validation"] for line in lines if "loss/validation" in line}
    scores = {int(path.name.removeprefix("step_")): bleu(path, source, reference) for path in checkpoints}
    for step, score in sorted(scores.items()):
        print(f"step {step}: BLEU {score:.1f}")
    figure, loss_axis = pyplot.subplots(figsize=(8, 3.6))
    loss_axis.plot(*zip(*sorted(losses.items()), strict=True), color="#4c72b0", marker=".")
    loss_axis.set(xlabel="step", ylabel="validation loss, nats a token")
    loss_axis.yaxis.label.set_color("#4c72b0")
    bleu_axis = loss_axis.twinx()
    bleu_axis.plot(*zip(*sorted(scores.items()), strict=True), color="#c44e52", marker="o")
    bleu_axis.set(ylabel="BLEU, test_2016_flickr", ylim=(0, None))
    bleu_axis.yaxis.label.set_color("#c44e52")
    figure.tight_layout()
    figure.savefig(HOUSE / "multi30k.png", dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
