"""make demo: real text in; a model trained, pruned, healed, quantized and checked by other people's software, in some eight minutes on
two CPU cores. Each stage is a command that you can type."""

import gzip
import lzma
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from data.command_line import UserError, run_door
from data.shards import PreparedData
from data.tokenization.tokenizer import load_tokenizer
from launch.training.settings import read_run_settings


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f"{arguments[0]}: the demo takes no settings; each command that it prints takes its own.")
    start = time.perf_counter()
    settings = read_run_settings([])
    (data,), run = settings.data.path, settings.output
    _do("Text to shards", "python", "data/prepare.py", "--output", data, "--vocab_size", str(settings.data.vocab_size))
    _do("Training", "deepspeed", "-q", "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json")
    _make(f"{run}/huggingface", run, "Hugging Face export", "python", "launch/export.py", run)
    _do("A sample", "python", "launch/generate.py", run, "--prompt", "def read_lines(path):\n", "--max_new_tokens", "96", "--seed", "1")
    beats_xz = _beats_xz(run, data)
    _compress(run)
    print(f"\nmake demo took {time.perf_counter() - start:.0f} s. Curves: tensorboard --logdir runs/")
    return 0 if beats_xz else 1


def _compress(run: str) -> None:
    """A quarter of the model away, and made up for; what is left in 4 and in 8 bits, for transformers and vLLM, and for llama.cpp."""
    pruned, healed, table = f"{run}-pruned", f"{run}-healed", Path(f"{run}-compressed")
    _make(pruned, run, "Pruning", "python", "launch/prune.py", run, "--method", "structured", "--parameters", "0.75")
    recipe = "launch/recipes/heal-demo.yaml"
    _remove_older(healed, pruned)
    _do("Healing", "deepspeed", "-q", "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json", "--config", recipe, "--init", pruned)
    quantize = "python", "launch/quantize.py", healed
    _make(f"{run}-int4", healed, "Four bits", *quantize, "--method", "gptq", "--bits", "4", "--group_size", "32")
    _make(f"{run}-int8", healed, "Eight bits", *quantize, "--bits", "8", "--activations", "int8", "--scaling", "smoothquant")
    _make(f"{run}-q4_0.gguf", healed, "Four bits for llama.cpp", "python", "launch/export.py", healed, "--format", "gguf", "--type", "q4_0")
    models = [run, pruned, healed, f"{run}-int4", f"{run}-int8", f"{run}-q4_0.gguf"]
    shutil.rmtree(table, ignore_errors=True)
    _do("Side by side", "python", "launch/compare.py", *models, "--output", str(table))


def _make(output: str, source: str, title: str, *command: str) -> None:
    """Where it is not there from an earlier demo, of the same source."""
    _remove_older(output, source)
    if not Path(output).exists():
        _do(title, *command, "--output", output)


def _remove_older(output: str, source: str) -> None:
    """What an earlier demo has made, if its source is newer."""
    made, of = Path(output), Path(source)
    of = of / "checkpoints" if (of / "checkpoints").exists() else of
    if made.exists() and made.stat().st_mtime < of.stat().st_mtime:
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def _do(title: str, *command: str) -> None:
    print(f"\n=== {title}: {shlex.join(command)}", flush=True)
    program = [sys.executable] if command[0] == "python" else [str(Path(sys.executable).parent / command[0])]
    status = subprocess.run([*program, *command[1:]]).returncode
    if status:
        sys.exit(status)


def _beats_xz(run: str, data: str) -> bool:
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
