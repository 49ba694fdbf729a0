"""make demo: from real text to a trained, pruned, retrained, quantized and exported model, in about nine minutes on two CPU cores."""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError, run_script
from launch.training.recipe import read_run_settings


def main(arguments: Sequence[str]) -> int:
    """Run each stage, a command that you can type; return exit status 1 if the model's bits per byte are not below those of xz."""
    if arguments:
        raise UserError(f"{arguments[0]}: the demo takes no settings. Each command that it prints takes its own.")
    start, settings = time.perf_counter(), read_run_settings([])
    (data,), run = settings.data.path, settings.output
    train, export = "deepspeed -q launch/pretrain.py --deepspeed ds_configs/zero3.json", "python launch/export.py"
    _run("Text to shards", f"python data/prepare.py --output {data} --vocab_size {settings.data.vocab_size}")
    _run("Training", train)
    _make(f"{run}/huggingface", run, "Hugging Face export", f"{export} {run}")
    _run("A sample", f"python launch/generate.py {run} --prompt 'def read_lines(path):\n' --max_new_tokens 96 --seed 1")
    from launch.evaluation.compressors import print_against_compressors  # imports torch, which a mistake on the command line does not need

    is_better_than_xz = print_against_compressors(run, data)
    pruned, healed, quantize = f"{run}-pruned", f"{run}-healed", f"python launch/quantize.py {run}-healed"
    _make(pruned, run, "Pruning", f"python launch/prune.py {run} --method structured --parameters 0.75")
    _make(healed, pruned, "Training after pruning", f"{train} --config launch/recipes/heal-demo.yaml --init {pruned}", resumes=True)
    _make(f"{run}-int4", healed, "Four bits", f"{quantize} --method gptq --bits 4 --group_size 32")
    _make(f"{run}-int8", healed, "Eight bits", f"{quantize} --bits 8 --activations int8 --scaling smoothquant")
    _make(f"{run}-q4_0.gguf", healed, "Four bits for llama.cpp", f"{export} {healed} --format gguf --type q4_0")
    shutil.rmtree(f"{run}-compressed", ignore_errors=True)
    models = f"{run} {pruned} {healed} {run}-int4 {run}-int8 {run}-q4_0.gguf"
    _run("Comparison", f"python launch/compare.py {models} --output {run}-compressed")
    print(f"\nmake demo took {time.perf_counter() - start:.0f} s. Training curves: tensorboard --logdir runs/")
    return 0 if is_better_than_xz else 1


def _make(output: str, source: str, title: str, command: str, resumes: bool = False) -> None:
    """Run a command that makes `output` from `source`. An output of an earlier demo is removed if its source is newer, else kept."""
    made = Path(output)
    origin = next(path for path in (Path(source, "checkpoints"), Path(source)) if path.exists())
    if made.exists() and made.stat().st_mtime < origin.stat().st_mtime:
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    if resumes or not made.exists():
        _run(title, f"{command} --output {output}")


def _run(title: str, command: str) -> None:
    print(f"\n=== {title}: {command}", flush=True)
    program, *arguments = shlex.split(command)
    if status := subprocess.run([str(Path(sys.executable).parent / program), *arguments]).returncode:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
