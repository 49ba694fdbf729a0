"""The parts of launch/benchmarks/pruning_and_quantization.py."""

import contextlib
import dataclasses
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.command_line import UserError
from data.shards import PreparedData
from data.tokenization.huggingface_folder import write_tokenizer
from launch import REPOSITORY, export, prune, quantize
from launch.benchmarks.measurement import Timing, describe_machine, timed
from launch.benchmarks.settings import CompressionSettings
from launch.checkpoints.opening import open_model
from launch.checkpoints.run_record import versions
from launch.compressing.samples import calibration_text
from launch.evaluation.evaluating import evaluate
from launch.evaluation.settings import EvaluateSettings
from launch.ranks import processes
from model import huggingface
from model.compression.structured import sizes_for
from model.config import ModelConfig, count_parameters, flops_per_token
from model.generation import tokens_per_second
from model.transformer import Transformer, parameter_shapes

# Another Python runs this program. It prints the wall and CPU seconds of each recipe, from reading the model to the written folder.
_LLM_COMPRESSOR = """
import json, sys, time
from llmcompressor import oneshot
from safetensors.torch import load_file
from torch.utils.data import DataLoader

model, calibration, output, recipes = sys.argv[1:]
samples = [{"input_ids": row} for row in load_file(calibration)["tokens"]]
for name, modifiers in json.loads(recipes).items():
    wall, cpu = time.perf_counter(), time.process_time()
    recipe = json.dumps({"default_stage": {"default_modifiers": modifiers}})
    oneshot(model=model, recipe=recipe, dataset=DataLoader(samples, batch_size=16), output_dir=output + "/" + name)
    print(json.dumps({name: [time.perf_counter() - wall, time.process_time() - cpu]}), flush=True)
"""
_LARGE: dict[str, Any] = {  # a Llama of 0.49 B parameters
    "vocab_size": 32_000,
    "sequence_length": 256,
    "hidden_size": 2048,
    "num_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 5632,
    "tie_embeddings": False,
}
_LINEAR_LAYERS = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}


@dataclasses.dataclass(frozen=True)
class _Method:
    """One method, as options of our script and as modifiers of llm-compressor."""

    script: str
    options: str
    modifiers: dict[str, Any] | None
    """None if llm-compressor does not have the method."""


def _pruned(method: str, sparsity: str) -> _Method:
    theirs = {"mask_structure": sparsity, "sparsity": 0.5} if ":" in sparsity else {"sparsity": float(sparsity)}
    modifier = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}[method]
    return _Method("prune", f"--method {method} --sparsity {sparsity}", {modifier: theirs | _LINEAR_LAYERS})


def _quantized(method: str, options: str, more: dict[str, Any] | None = None, **scheme: Any) -> _Method:
    modifier = {"rtn": "QuantizationModifier", "gptq": "GPTQModifier"}[method]
    theirs = {modifier: _LINEAR_LAYERS | scheme}
    return _Method("quantize", f"--method {method} --precision float32 {options}", (more or {}) | theirs)


def _grouped(bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    return {"group": {"targets": ["Linear"], "weights": weights}}


_METHODS = {
    "magnitude 70 %": _Method("prune", "--method magnitude --sparsity 0.7", None),
    "Wanda 50 %": _pruned("wanda", "0.5"),
    "Wanda 2:4": _pruned("wanda", "2:4"),
    "Wanda 70 %": _pruned("wanda", "0.7"),
    "SparseGPT 50 %": _pruned("sparsegpt", "0.5"),
    "SparseGPT 2:4": _pruned("sparsegpt", "2:4"),
    "SparseGPT 70 %": _pruned("sparsegpt", "0.7"),
    "RTN W4A16": _quantized("rtn", "--bits 4", config_groups=_grouped(4)),
    "RTN W3A16": _quantized("rtn", "--bits 3", config_groups=_grouped(3)),
    "RTN W8A8": _quantized("rtn", "--bits 8 --activations int8", scheme="W8A8"),
    "RTN FP8": _quantized("rtn", "--kind fp8", scheme="FP8_DYNAMIC"),
    "GPTQ W4A16": _quantized("gptq", "--bits 4", config_groups=_grouped(4), actorder=None),
    "GPTQ W4A16, act-order": _quantized("gptq", "--bits 4 --act_order true", config_groups=_grouped(4), actorder="static"),
    "GPTQ W3A16": _quantized("gptq", "--bits 3", config_groups=_grouped(3), actorder=None),
    "SmoothQuant + GPTQ W8A8": _quantized(
        "gptq",
        "--bits 8 --activations int8 --scaling smoothquant --smoothing_strength 0.5",
        {"SmoothQuantModifier": {"smoothing_strength": 0.5, "ignore": ["re:.*lm_head"]}},
        scheme="W8A8",
        actorder=None,
    ),
}


def measure(names: Sequence[str], settings: CompressionSettings) -> int:
    """Measure these parts and print their tables."""
    processes.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            TABLE[name](settings, Path(folder))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\n{describe_machine(f'{torch.get_num_threads()} threads for each contender')}, {packages}")
    return 0


def _methods(settings: CompressionSettings, folder: Path) -> None:
    """Print the perplexity of both outputs, and the wall and CPU seconds of both. Ours include the proof with transformers."""
    perplexity = lambda model: evaluate(EvaluateSettings(str(model), settings.data), show_progress=False).perplexity  # noqa: E731
    dense = folder / "dense"
    with contextlib.redirect_stdout(io.StringIO()):
        export.main([settings.model, "--output", str(dense)])
    theirs = _llm_compressor(settings, dense, folder) if settings.peer_python else {}
    options = f"--data {settings.data} --calibration_samples {settings.calibration_samples} --test_samples 0 --sensitivity_samples 0"
    scripts = {"prune": prune.main, "quantize": quantize.main}
    print(f"\n{'perplexity; dense: ' + format(perplexity(dense), '.4f'):28}{'ours':>12}{'theirs':>12}{'ours/theirs':>13}", end="")
    print(f"{'seconds':>10}{'CPU s':>8}{'theirs':>10}{'CPU s':>8}")
    for number, (name, method) in enumerate(_METHODS.items()):
        output = folder / f"ours-{number}"
        arguments = [str(dense), "--output", str(output), *options.split(), *method.options.split()]
        with contextlib.redirect_stdout(io.StringIO()):
            timing = timed(lambda script=scripts[method.script], arguments=arguments: script(arguments))  # type: ignore[misc]
        ours = perplexity(output)
        peer_perplexity, peer_seconds = f"{'':12}{'':13}", ""
        if name in theirs:
            peer = perplexity(folder / "theirs" / name)
            peer_perplexity, peer_seconds = f"{peer:12.4f}{ours / peer:13.5f}", f"{theirs[name].wall:10.1f}{theirs[name].cpu:8.1f}"
        print(f"{name:28}{ours:12.4f}{peer_perplexity}{timing.wall:10.1f}{timing.cpu:8.1f}{peer_seconds}", flush=True)


def _llm_compressor(settings: CompressionSettings, dense: Path, folder: Path) -> dict[str, Timing]:
    """Run llm-compressor and return its time by method. Its outputs are in folder/theirs, one folder per method."""
    text = calibration_text(open_model(str(dense)), str(dense), [settings.data], settings.calibration_samples, None)
    tokens, segments = (torch.cat([batch.inputs[index] for batch in text.batches]) for index in (0, 1))
    if (segments != 1).any():
        raise UserError(
            f"{settings.data} has too little text for {settings.calibration_samples} full samples. Use a smaller --calibration_samples."
        )
    save_file({"tokens": tokens.long()}, folder / "calibration.safetensors")
    recipes = json.dumps({name: method.modifiers for name, method in _METHODS.items() if method.modifiers})
    program = [str(settings.peer_python), "-c", _LLM_COMPRESSOR, str(dense), str(folder / "calibration.safetensors")]
    lines = _output([*program, str(folder / "theirs"), recipes])
    return {name: Timing(*times) for line in lines if line.startswith("{") for name, times in json.loads(line).items()}


def _large(settings: CompressionSettings, folder: Path) -> None:
    """Print the seconds per block and the peak memory of launch/quantize.py on 0.5 B parameters, which are never in memory all at once."""
    config = ModelConfig(**_LARGE)
    tokenizer = PreparedData(settings.data).tokenizer_path
    huggingface.export(config, _RandomWeights(config), folder / "large")
    write_tokenizer(tokenizer, folder / "large", config.sequence_length)
    options = f"--data {settings.data} --calibration_samples 32 --test_samples 0 --sensitivity_samples 0 --output {folder / 'small'}"
    script = REPOSITORY / "launch" / "quantize.py"
    seconds, gigabytes = [], 0.0
    for line in _output([sys.executable, str(script), str(folder / "large"), *options.split()]):
        if found := re.search(r"([\d.]+) s \| peak memory ([\d.]+) GB", line):
            seconds.append(float(found[1]))
            gigabytes = float(found[2])
        if found or line.startswith("Needs"):
            print(line.rstrip(), flush=True)
    print(f"GPTQ of 0.5 B parameters: {statistics.median(seconds):.1f} s per block, {gigabytes:.2f} GB peak memory before the proof")


class _RandomWeights(Mapping[str, Tensor]):
    """Random weights of a network, each drawn when it is read."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = parameter_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _generation(settings: CompressionSettings, folder: Path) -> None:
    """Print the tokens per second of random weights and of the sizes that structured pruning leaves, measured in turn."""
    dense = ModelConfig(**_LARGE)
    configs = [dense, *(sizes_for(dense, parameters=share) for share in (0.75, 0.5))]
    print(f"\n{'generation, batch of 1':28}{'parameters':>14}{'tokens/s':>10}{'faster':>9}{'fewer FLOPs':>13}")
    for dtype in (torch.bfloat16, torch.float32):
        networks = [Transformer(config).to(dtype).eval() for config in configs]
        measured: list[list[float]] = [[] for _ in networks]
        for _ in range(settings.rounds):
            for network, network_rates in zip(networks, measured, strict=True):
                network_rates.append(tokens_per_second(network))
        rates = [statistics.median(network_rates) for network_rates in measured]
        for config, rate in zip(configs, rates, strict=True):
            fewer = flops_per_token(dense, 64) / flops_per_token(config, 64)
            what = f"{str(dtype).removeprefix('torch.')}, width {config.intermediate_size}"
            print(f"{what:28}{count_parameters(config):14,}{rate:10.1f}{rate / rates[0]:9.2f}{fewer:13.2f}", flush=True)


def _output(command: list[str]) -> Iterator[str]:
    """Yield the lines of a command's standard output as they come. It keeps freed memory, as we do. Raises RuntimeError if it fails."""
    environment = os.environ | {"GLIBC_TUNABLES": processes.KEEP_FREED_MEMORY}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        yield from process.stdout
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"{command[0]} failed:\n{errors.read()[-4000:]}")


TABLE: dict[str, Callable[[CompressionSettings, Path], None]] = {"methods": _methods, "large": _large, "generation": _generation}
"""The function of each part, by its name in `only`."""
