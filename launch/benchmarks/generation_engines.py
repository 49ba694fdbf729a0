"""The contenders of launch/benchmarks/generation.py."""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers

from data.command_line import UserError
from launch.benchmarks.settings import GenerationSettings
from launch.checkpoints.opening import load_model
from launch.compressing import llama_engine
from model import huggingface
from model.compression import gguf_file
from model.config import ModelConfig, named_size
from model.generation import tokens_per_second
from model.transformer import Transformer

_PROMPT_TOKENS = 16


def measure(settings: GenerationSettings) -> int:
    """Measure all contenders in turn and print their medians in tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            contenders = _contenders(settings, Path(folder))
        except ValueError as error:
            raise UserError(str(error)) from error
        measured: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(settings.rounds):
            for name, run in contenders.items():
                print(f"round {number + 1}/{settings.rounds}: {name} ...", file=sys.stderr, flush=True)
                measured[name].append(run())
    medians = {name: statistics.median(rates) for name, rates in measured.items()}
    ours = next(iter(medians.values()))
    print(f"{'':24}{'tokens/s':>10}{'times ours':>12}")
    for name, rate in medians.items():
        print(f"{name:24}{rate:10.1f}{rate / ours:12.2f}")
    return 0


def _contenders(settings: GenerationSettings, folder: Path) -> dict[str, Callable[[], float]]:
    """One function per contender that returns its tokens per second, ours first. Files for the other engines are written to `folder`."""
    network = load_model(settings.model).model if settings.model else Transformer(ModelConfig(**named_size(settings.size))).eval()
    config, new_tokens = network.config, settings.new_tokens
    gguf_file.architecture(config)
    if (length := _PROMPT_TOKENS + new_tokens + 1) > config.sequence_length:
        raise UserError(f"new_tokens {new_tokens} and a prompt make {length} tokens; the model's context is {config.sequence_length}.")
    network = network.to(torch.bfloat16)
    state = {name: weight.detach() for name, weight in network.named_parameters()}
    huggingface.export(config, state, folder / "huggingface", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "huggingface", dtype=torch.bfloat16, local_files_only=True).eval()
    contenders: dict[str, Callable[[], float]] = {
        "ours, bf16": lambda: tokens_per_second(network, new_tokens, _PROMPT_TOKENS),
        "transformers, bf16": lambda: _transformers_tokens_per_second(theirs, config.vocab_size, new_tokens),
    }
    if not llama_engine.is_installed():
        print(f"llama.cpp is left out: llama-cpp-python is not installed ({llama_engine.INSTALL}).", file=sys.stderr)
        return contenders
    for kind in settings.types:
        file = _gguf_file(kind, config, state, folder)
        contenders[f"llama.cpp, {kind}"] = functools.partial(llama_engine.tokens_per_second, file, new_tokens, _PROMPT_TOKENS)
    return contenders


def _gguf_file(kind: str, config: ModelConfig, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write the model as a GGUF file of this type, without a tokenizer; llama.cpp itself writes the K-quants."""
    file, no_tokenizer = folder / f"{kind}.gguf", {"tokenizer.ggml.model": "none"}
    if kind in get_args(gguf_file.Kind):
        gguf_file.write(config, state, no_tokenizer, file, cast(gguf_file.Kind, kind))
        return file
    floats = folder / "floats.gguf"
    if not floats.exists():
        gguf_file.write(config, state, no_tokenizer, floats, "f16")
    llama_engine.quantize(floats, kind, file)
    return file


@torch.inference_mode()
def _transformers_tokens_per_second(network: Any, vocab_size: int, new_tokens: int) -> float:
    output = network(torch.arange(_PROMPT_TOKENS)[None] % vocab_size, use_cache=True)
    start = time.perf_counter()
    for _ in range(new_tokens):
        output = network(output.logits[:, -1:].argmax(dim=-1), past_key_values=output.past_key_values, use_cache=True)
    return new_tokens / (time.perf_counter() - start)
