"""The contenders of launch/benchmarks/generation.py."""

import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers

from data.command_line import UserError
from launch.benchmarks.measurement import Spread, Timing, describe_machine, timed
from launch.benchmarks.settings import GenerationSettings
from launch.checkpoints.opening import load_model
from launch.compressing import llama_engine
from launch.ranks.processes import keep_freed_memory
from model import huggingface
from model.compression import gguf_file
from model.config import ModelConfig, named_size
from model.generation import generate
from model.transformer import Transformer

_PROMPT_TOKENS = 16
Start = Callable[[], Callable[[], object]]
"""A contender: evaluates the prompt and returns a function that generates one token."""


def measure(settings: GenerationSettings) -> int:
    """Measure all contenders in turn; print their speed and their CPU time."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        try:
            contenders = _contenders(settings, Path(folder))
        except ValueError as error:
            raise UserError(str(error)) from error
        timings: dict[str, list[Timing]] = {name: [] for name in contenders}
        for number in range(settings.rounds + 1):
            for name, start in contenders.items():
                print(f"{f'round {number}/{settings.rounds}' if number else 'warm-up'}: {name} ...", file=sys.stderr, flush=True)
                timings[name].append(_time(start(), settings.new_tokens))
    rates = {name: Spread.of([settings.new_tokens / timing.wall for timing in measured[1:]]) for name, measured in timings.items()}
    ours = next(iter(rates.values()))
    print(f"{'':24}{'tokens/s':>10}{'least':>8}{'most':>8}{'times ours':>12}{'CPU ms/token':>14}")
    for name, rate in rates.items():
        milliseconds = 1000 * statistics.median(timing.cpu for timing in timings[name][1:]) / settings.new_tokens
        print(f"{name:24}{rate.median:10.1f}{rate.least:8.1f}{rate.most:8.1f}{rate.median / ours.median:12.2f}{milliseconds:14.1f}")
    print(f"\n{describe_machine(f'{torch.get_num_threads()} threads for each contender')}")
    return 0


def _time(generate_one: Callable[[], object], new_tokens: int) -> Timing:
    return timed(lambda: [generate_one() for _ in range(new_tokens)])


def _contenders(settings: GenerationSettings, folder: Path) -> dict[str, Start]:
    """One function per contender, ours first. Files for the other engines are written to `folder`."""
    network = load_model(settings.model).model if settings.model else Transformer(ModelConfig(**named_size(settings.size))).eval()
    config, new_tokens = network.config, settings.new_tokens
    gguf_file.architecture(config)
    if (length := _PROMPT_TOKENS + new_tokens + 1) > config.sequence_length:
        raise UserError(f"new_tokens {new_tokens} and a prompt make {length} tokens; the model's context is {config.sequence_length}.")
    network = network.to(torch.bfloat16)
    state = {name: weight.detach() for name, weight in network.named_parameters()}
    huggingface.export(config, state, folder / "huggingface", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "huggingface", dtype=torch.bfloat16, local_files_only=True).eval()
    contenders: dict[str, Start] = {
        "ours, bf16": lambda: _start_ours(network, new_tokens),
        "transformers, bf16": lambda: _start_transformers(theirs, config.vocab_size),
    }
    if not llama_engine.is_installed():
        print(f"llama.cpp is left out: llama-cpp-python is not installed ({llama_engine.INSTALL}).", file=sys.stderr)
        return contenders
    for kind in settings.types:
        file = _gguf_file(kind, config, state, folder)
        contenders[f"llama.cpp, {kind}"] = functools.partial(llama_engine.start_generation, file, new_tokens, _PROMPT_TOKENS)
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


def _start_ours(network: Transformer, new_tokens: int) -> Callable[[], object]:
    prompt = torch.arange(_PROMPT_TOKENS)[None] % network.config.vocab_size
    generated = generate(network, prompt, new_tokens + 1, temperature=0, sequence_length=network.config.sequence_length)
    next(generated)
    return lambda: next(generated)


def _start_transformers(network: Any, vocab_size: int) -> Callable[[], object]:
    with torch.inference_mode():
        output = network(torch.arange(_PROMPT_TOKENS)[None] % vocab_size, use_cache=True)

    @torch.inference_mode()
    def generate_one() -> None:
        """Choose the likeliest token and evaluate it."""
        nonlocal output
        output = network(output.logits[:, -1:].argmax(dim=-1), past_key_values=output.past_key_values, use_cache=True)

    return generate_one
