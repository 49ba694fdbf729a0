"""make demo: real text in, a trained model out, in a few minutes on two CPU cores. Each stage is a command that you can type."""

import gzip
import lzma
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data.command_line import run_door
from data.shards import PreparedData
from data.tokenizer import load_tokenizer
from launch.training.config import read_run_settings


def main(arguments: list[str]) -> int:
    start = time.perf_counter()
    settings = read_run_settings([])
    (data,), run = settings.data.path, settings.output
    _do("Text to shards", "python", "data/prepare.py", "--output", data, "--vocab_size", str(settings.data.vocab_size))
    _do("Training", "deepspeed", "-q", "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json")
    exported = f"{run}/huggingface"
    if not Path(exported).exists():
        _do("Hugging Face export", "python", "launch/export.py", run, "--output", exported)
    _do("A sample", "python", "launch/generate.py", run, "--prompt", "def read_lines(path):\n", "--max_new_tokens", "96", "--seed", "1")
    beats_xz = _compare(run, data)
    print(f"\nmake demo took {time.perf_counter() - start:.0f} s. Curves: tensorboard --logdir runs/")
    return 0 if beats_xz else 1


def _do(title: str, *command: str) -> None:
    print(f"\n=== {title}: {shlex.join(command)}", flush=True)
    program = [sys.executable] if command[0] == "python" else [str(Path(sys.executable).parent / command[0])]
    status = subprocess.run([*program, *command[1:]]).returncode
    if status:
        sys.exit(status)


def _compare(run: str, data: str) -> bool:
    """Print the model's bits per byte on held-out files beside those of the compressors that everybody has; whether it beats xz."""
    from launch.evaluate import EvaluateSettings, evaluate

    print(f"\n=== Held-out files: python launch/evaluate.py {run}", flush=True)
    result = evaluate(EvaluateSettings(run, data))
    prepared = PreparedData(data)
    held_out = prepared.splits["validation"]
    text = load_tokenizer(prepared.tokenizer_path).decode(held_out.read(0, len(held_out))).encode()
    assert len(text) == result.bytes, "not the bytes that were evaluated"
    rows = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "this model": result.bits_per_byte,
    }
    print(f"bits per byte on {len(text):,} bytes of source text that it never saw (perplexity {result.perplexity:.2f} a token):")
    for name, bits in rows.items():
        print(f"  {name:<12}{bits:6.3f}  {'#' * round(20 * bits)}")
    return rows["this model"] < rows["xz -9"]


if __name__ == "__main__":
    run_door(main)
