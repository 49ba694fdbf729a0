"""Tests on one NVIDIA GPU: the same numbers as on a CPU, fp16, compression, and speed; pytest -s prints them.

Without a GPU they are skipped. Other tests compare the CPU's numbers with plain PyTorch. They take about four minutes; commands that are
not timed run in parallel.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer

from launch.checkpoints.opening import open_model
from launch.ranks.stopping import SAVED_AND_UNFINISHED
from model import huggingface
from model.compression.pruning import Sparsity, sparsegpt
from model.compression.statistics import InputStatistics, matrices
from model.config import ModelConfig, named_size
from model.transformer import Transformer
from tests.launch.training.test_resume import curves
from tests.ranks import REPOSITORY, clean_environment, finish

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")

STEPS = 60
BATCH = ["--batch.global_batch_size=8", "--batch.micro_batch_size=4", "--optimizer.learning_rate=1e-3", "--schedule.warmup_steps=5"]
QUIET = ["--log.validation_interval=0", "--log.validation_samples=8", "--log.sample_interval=0"]
# Runs of the demo's network: engine JSON, precision, and the allowed difference of a step's loss from the CPU's. Float32 sums in another
# order; in bf16 and fp16 a loss of 8 has three digits.
TRAINED = {
    "ZeRO-1 bf16": ("zero1", "bf16", 1e-2),
    "ZeRO-3 bf16": ("zero3", "bf16", 1e-2),
    "ZeRO-1 fp16": ("zero1", "fp16", 1e-2),
    "ZeRO-1 float32": ("zero1", "float32", 1e-4),
}
COMPRESSED = {
    "SparseGPT 2:4": ("prune", "--method=sparsegpt", "--sparsity=2:4"),
    "structured": ("prune", "--method=structured", "--intermediate_size=640", "--num_key_value_heads=3", "--hidden_size=240"),
    "GPTQ int4": ("quantize", "--method=gptq", "--bits=4", "--group_size=32"),
    "AWQ asymmetric int4": ("quantize", "--method=rtn", "--bits=4", "--group_size=32", "--scaling=awq", "--symmetric=false"),
    "FP8, keys and values too": ("quantize", "--method=rtn", "--kind=fp8", "--kv_cache=fp8"),
    "W8A8": ("quantize", "--method=gptq", "--bits=8", "--activations=int8", "--scaling=smoothquant"),
}
# Arguments of training, and the allowed differences of the losses in float32, and in bf16 under ZeRO-3, from those of the CPU in float32.
# The last bit of a scale decides to which of two codes a weight between them is rounded, and bf16 has other scales.
HEALED = {
    "taught": (["--init={pruned}", "--hold_zeros=true", "--distillation.teacher={dense}"], 1e-4, 3e-2),
    "rounded": (["--init={dense}", "--quantization.bits=4", "--quantization.group_size=32"], 1e-2, 5e-2),
}


def begin(device: str, *words: str | Path) -> subprocess.Popen:
    """Start a script as a process of its own, on "cuda" or "cpu"."""
    path = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # packages that the machine lacks may be there
    environment = clean_environment(DS_ACCELERATOR=device, OMP_NUM_THREADS="4", PYTHONPATH=path)
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def do(device: str, *words: str | Path) -> str:
    """Run a script and return what it printed."""
    return finish([begin(device, *words)], timeout_seconds=200)[0]


def losses_of(folder: Path) -> list[float]:
    return list(curves(folder)["loss/train"].values())


def measured(folder: Path, name: str) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry[name] for entry in entries if name in entry]


def largest_difference(some: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def text(folder) -> Path:
    """Prepare the embedded corpus."""
    do("cpu", "data/prepare.py", "--output", folder / "text", "--gigatoken=false", "--tokenizer_characters=2000000")
    return folder / "text"


@pytest.fixture(scope="module")
def short(folder, text):
    """Return a function that gives the arguments of a short run of the demo's network."""

    def words(name: str, json_name: str, precision: str) -> list[str]:
        place = [f"--data={text}", f"--output={folder / name}", f"--deepspeed=ds_configs/{json_name}.json", f"--precision={precision}"]
        return ["launch/pretrain.py", *place, f"--train_steps={STEPS}", *BATCH, *QUIET]

    return words


@pytest.fixture(scope="module")
def trained(pool, folder, text, short) -> dict[str, Future[Path]]:
    """Start runs on the GPU: "plain" is one on the CPU, "stopped" one that was stopped and resumed, "dense" a longer one."""

    def run(name: str, device: str, json_name: str, precision: str, *more: str) -> Path:
        do(device, *short(name, json_name, precision), *more)
        return folder / name

    def stop_and_resume() -> Path:
        words = [*short("stopped", "zero1", "float32"), "--log.sample_interval=2"]  # frequent writing gives time to stop it
        process, metrics = begin(GPU, *words), folder / "stopped" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("loss/train") >= 10):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=100)[0]
        assert process.returncode == SAVED_AND_UNFINISHED, printed
        assert "Resuming from step" in do(GPU, *words)
        return folder / "stopped"

    whole = "--optimizer.learning_rate=5e-3", "--train_steps=600"
    started = {"dense": pool.submit(run, "dense", GPU, "zero1", "bf16", *whole), "stopped": pool.submit(stop_and_resume)}
    started["plain"] = pool.submit(run, "plain", "cpu", "zero1", "float32")
    return started | {name: pool.submit(run, name, GPU, *words) for name, (*words, _) in TRAINED.items()}


@pytest.fixture(scope="module")
def compressed(pool, folder, trained) -> dict[tuple[str, str], Future[Path]]:
    """Start the compressions; return them by name and device."""

    def compress(door: str, words: list[str], device: str, output: Path) -> Path:
        counts = "--calibration_samples=64", "--test_samples=64", "--sensitivity_samples=2"
        do(device, f"launch/{door}.py", trained["dense"].result(), *words, *counts, "--output", output)
        return output

    return {
        (name, device): pool.submit(compress, door, words, device, folder / f"{name} on {device}")
        for name, (door, *words) in COMPRESSED.items()
        for device in (GPU, "cpu")
    }


@pytest.fixture(scope="module")
def healed(pool, folder, text, trained, compressed) -> dict[tuple[str, str], Future[Path]]:
    """Start runs of ten steps that begin with compressed models; return them by name and way."""

    def heal(name: str, device: str, json_name: str, precision: str, output: Path) -> Path:
        models = {"dense": trained["dense"].result(), "pruned": compressed["SparseGPT 2:4", GPU].result()}
        words = [word.format(**models) for word in HEALED[name][0]]
        how = f"--deepspeed=ds_configs/{json_name}.json", f"--precision={precision}", "--train_steps=10"
        do(device, "launch/pretrain.py", f"--data={text}", f"--output={output}", *how, *words, *BATCH, *QUIET)
        return output

    ways = {"plain": ("cpu", "zero1", "float32"), "float32": (GPU, "zero1", "float32"), "bf16": (GPU, "zero3", "bf16")}
    return {(name, way): pool.submit(heal, name, *how, folder / f"{name}, {way}") for name in HEALED for way, how in ways.items()}


@pytest.mark.parametrize("name", TRAINED)
def test_training_losses_match_the_cpu(trained, name):
    expected, run = losses_of(trained["plain"].result()), trained[name].result()
    losses, skipped, bound = losses_of(run), len(measured(run, "alarm/skipped_step")), TRAINED[name][-1]
    difference = largest_difference(losses, expected)
    scales = sorted(set(measured(run, "optimization/loss_scale")))
    print(f"\n{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {difference:.1e} from the CPU's; {skipped} steps skipped, scales {scales}")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    assert difference < bound


def test_resume_gives_the_losses_of_a_run_that_never_stopped(trained):
    difference = largest_difference(losses_of(trained["stopped"].result()), losses_of(trained["ZeRO-1 float32"].result()))
    print(f"\nStopped and resumed: largest difference {difference:.1e} from the run that never stopped")
    assert difference < 1e-4


def test_evaluation_perplexity_matches_the_cpu(pool, trained):
    words = "launch/evaluate.py", trained["dense"].result()
    printed = [one.result() for one in [pool.submit(do, device, *words) for device in (GPU, "cpu")]]
    gpu, cpu = (float(re.search(r"perplexity: ([\d.]+)", one)[1]) for one in printed)
    print(f"\nPerplexity of the dense model: {gpu} on the GPU, {cpu} on the CPU")
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compression_cost_matches_the_cpu(compressed, name):
    """transformers has read each of the folders on that device; otherwise the folder would not exist."""
    gpu, cpu = (json.loads((compressed[name, device].result() / "report.json").read_text()) for device in (GPU, "cpu"))
    ratios = [report["quality"]["ratio"]["value"] for report in (gpu, cpu)]
    found = f"perplexity x{ratios[0]:.5f} on the GPU in {gpu['seconds']:.1f} s, x{ratios[1]:.5f} on the CPU in {cpu['seconds']:.1f} s"
    print(f"\n{name}: {found}; transformers differs by {gpu['proof']['difference']:.1e}")
    assert gpu["device"].startswith(GPU) and cpu["device"] == "cpu"
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-2)
    assert gpu["proof"]["measure"] == "perplexity" and gpu["proof"]["difference"] <= gpu["proof"]["bound"]


@pytest.mark.parametrize("name", HEALED)
def test_training_after_compression_matches_the_cpu(trained, compressed, healed, name):
    runs = {way: healed[name, way].result() for way in ("plain", "float32", "bf16")}
    losses = {way: losses_of(run) for way, run in runs.items()}
    differences = [largest_difference(losses[way], losses["plain"]) for way in ("float32", "bf16")]
    found = f"losses {losses['plain'][0]:.4f} -> {losses['plain'][-1]:.4f} on the CPU"
    print(f"\n{name}: {found}; {differences[0]:.1e} from them in float32, {differences[1]:.1e} in bf16 under ZeRO-3")
    assert differences[0] < HEALED[name][1] and differences[1] < HEALED[name][2]
    if name == "taught":
        pruned = open_model(str(compressed["SparseGPT 2:4", GPU].result()))
        for way in ("float32", "bf16"):
            state = open_model(str(runs[way])).state
            assert all(torch.equal(state[weight] == 0, pruned.state[weight] == 0) for weight in matrices(pruned.config)), way


def test_gptq_of_blocks_of_a_billion_parameter_model(folder, text):
    """Quantize with 128 samples of 2,048 tokens; the memory is that of all processes on the device, read ten times a second."""
    config = dataclasses.replace(ModelConfig(**named_size("llama-1.1b")), num_layers=4)
    huggingface.export(config, Transformer(config, seed=1).state_dict(), folder / "wide", dtype=torch.bfloat16)
    shutil.copy(text / "tokenizer.model", folder / "wide")
    idle, used, done = torch.cuda.mem_get_info()[0], [], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            used.append(idle - torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        counts = "--calibration_samples=128", "--test_samples=8", "--sensitivity_samples=0", "--precision=bf16"
        do(GPU, "launch/quantize.py", folder / "wide", f"--data={text}", "--method=gptq", *counts, "--output", folder / "wide int4")
    finally:
        done.set()
        watcher.join()
    report = json.loads((folder / "wide int4" / "report.json").read_text())
    seconds = ", ".join(f"{block['seconds']:.1f}" for block in report["blocks"])
    found = f"{seconds} s a block, {report['seconds']:.0f} s in all, {max(used) / 1e9:.1f} GB of the GPU's memory"
    print(f"\nGPTQ int4, groups of 128, 4 blocks of llama-1.1b, 262,144 tokens: {found}")
    assert report["calibration"]["tokens"] == 128 * 2048
    assert len(report["linears"]) == 4 * 7 and not any(linear["notes"] for linear in report["linears"])
    assert all(linear["error"] < 0.2 for linear in report["linears"])


def test_2_4_sparse_weights_run_on_sparse_tensor_cores():
    """Multiply by a matrix that SparseGPT has pruned, with PyTorch's own kernels."""
    size = 4096
    rows = torch.randn(2 * size, size, device=GPU)
    statistics_of_rows = InputStatistics(len(rows), rows.T @ rows, rows.abs().mean(dim=0), rows.abs().amax(dim=0))
    weight = torch.randn(size, size, device=GPU) / size**0.5
    torch.cuda.synchronize()
    start = time.perf_counter()
    dense = sparsegpt(weight, statistics_of_rows, Sparsity.parse("2:4")).weight.bfloat16()
    torch.cuda.synchronize()
    pruning_seconds = time.perf_counter() - start
    x, sparse = rows[:size].bfloat16(), to_sparse_semi_structured(dense)
    with torch.inference_mode():
        torch.testing.assert_close(F.linear(x, sparse), F.linear(x, dense), rtol=2**-7, atol=1e-2)  # a bf16 sum has 8 significant bits
        seconds = [
            Timer("F.linear(x, weight)", globals={"F": F, "x": x, "weight": one}).blocked_autorange(min_run_time=0.5).median
            for one in (dense, sparse)
        ]
    rates = [2 * size**3 / one / 1e12 for one in seconds]
    found = f"{seconds[0] * 1e3:.3f} ms dense ({rates[0]:.0f} TFLOP/s), {seconds[1] * 1e3:.3f} ms as 2:4: x{seconds[0] / seconds[1]:.2f}"
    print(f"\n{size} x {size} x {size} in bf16: {found}; SparseGPT took {pruning_seconds:.1f} s")


@pytest.mark.parametrize("is_compiled", [False, True])
def test_training_uses_the_gpu(folder, text, is_compiled):
    """Train llama-160m in bf16; figures are medians of the last 15 of 30 steps."""
    run = folder / f"160m {is_compiled}"
    place = f"--data={text}", f"--output={run}", f"--compile={str(is_compiled).lower()}", "--log.interval=1", "--train_steps=30"
    batch = "--batch.global_batch_size=32", "--batch.micro_batch_size=16", "--schedule.warmup_steps=10"
    do(GPU, "launch/pretrain.py", "--size=llama-160m", *place, *batch, *QUIET)
    medians = {name: statistics.median(measured(run, name)[15:]) for name in ("throughput/tokens_per_second", "throughput/utilization")}
    speed, use = medians.values()
    memory, first = measured(run, "memory/peak_gib")[-1], measured(run, "time/step")[0]
    found = f"{speed:,.0f} tokens/s, MFU {use:.1%}, {memory:.1f} GiB; first step {first:.0f} s"
    print(f"\nllama-160m, 2,048 tokens, {torch.cuda.get_device_name()}{', compiled' if is_compiled else ''}: {found}")
    losses = losses_of(run)
    assert losses[-1] < losses[0] - 1
    assert use > 0.1
