"""Measure how fast a decoder writes, beside transformers and llama.cpp: python launch/benchmarks/generation.py [--model runs/demo]

All write token by token behind a short prompt, on as many threads as torch has, in rounds one after the other; a ratio is one of medians.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from data.command_line import UserError, read_settings, run_door

_PROMPT_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    model: str | None = None
    """Run folder, a checkpoint in one, or an exported folder of a decoder (default: random weights of --size)."""
    size: str = "llama-160m"
    """Named size of the random weights."""
    types: tuple[Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"], ...] = ("f16", "q8_0", "q4_0", "q4_k_m")
    """Of GGUF, as --type of launch/export.py: nothing without llama-cpp-python."""
    new_tokens: int = 64
    """Written in each round."""
    rounds: int = 3
    """How often each is measured."""


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(SpeedSettings, arguments, "Measure how fast a decoder writes, beside transformers and llama.cpp.")
    for name in ("new_tokens", "rounds"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be at least 1.")
    with tempfile.TemporaryDirectory() as folder:
        try:
            contenders = _contenders(settings, Path(folder))
        except ValueError as error:
            raise UserError(str(error)) from error
        measured: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(settings.rounds):
            for name, measure in contenders.items():
                print(f"round {number + 1}/{settings.rounds}: {name} ...", file=sys.stderr, flush=True)
                measured[name].append(measure())
    medians = {name: statistics.median(found) for name, found in measured.items()}
    first = next(iter(medians.values()))
    print(f"{'':24}{'tokens/s':>10}{'times ours':>12}")
    for name, found in medians.items():
        print(f"{name:24}{found:10.1f}{found / first:12.2f}")
    return 0


def _contenders(settings: SpeedSettings, folder: Path) -> dict[str, Callable[[], float]]:
    """What measures each, ours first; files for the others are written into `folder`."""
    import torch

    from launch.checkpoints.opening import load_model
    from launch.compressing import llama_engine
    from model import huggingface
    from model.compression import gguf_file
    from model.config import ModelConfig, named_size
    from model.generation import tokens_per_second
    from model.transformer import Transformer

    network = load_model(settings.model).model if settings.model else Transformer(ModelConfig(**named_size(settings.size))).eval()
    config, new_tokens = network.config, settings.new_tokens
    gguf_file.architecture(config)
    if (length := _PROMPT_TOKENS + new_tokens + 1) > config.sequence_length:
        raise UserError(f"new_tokens {new_tokens} and a prompt make {length} tokens; the model's context is {config.sequence_length}.")
    network = network.to(torch.bfloat16)
    state = {name: weight.detach() for name, weight in network.named_parameters()}
    huggingface.export(config, state, folder / "huggingface", dtype=torch.bfloat16)
    theirs = _transformers(folder / "huggingface")
    found = {
        "ours, bf16": lambda: tokens_per_second(network, new_tokens),
        "transformers, bf16": lambda: _of_transformers(theirs, config.vocab_size, new_tokens),
    }
    if not llama_engine.is_installed():
        print(f"llama.cpp is left out: llama-cpp-python is not installed ({llama_engine.INSTALL}).", file=sys.stderr)
        return found
    without_words = {"tokenizer.ggml.model": "none"}
    for kind in settings.types:
        file = folder / f"{kind}.gguf"
        if kind in llama_engine.K_QUANTS:
            floats = folder / "floats.gguf"
            if not floats.exists():
                gguf_file.write(config, state, without_words, floats, "f16")
            llama_engine.quantize(floats, kind, file)
        else:
            gguf_file.write(config, state, without_words, file, kind)
        found[f"llama.cpp, {kind}"] = lambda file=file: llama_engine.tokens_per_second(file, new_tokens, _PROMPT_TOKENS)
    return found


def _transformers(folder: Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()


def _of_transformers(network: Any, vocab_size: int, new_tokens: int) -> float:
    import torch

    with torch.inference_mode():
        said = network(torch.arange(_PROMPT_TOKENS)[None] % vocab_size, use_cache=True)
        start = time.perf_counter()
        for _ in range(new_tokens):
            said = network(said.logits[:, -1:].argmax(dim=-1), past_key_values=said.past_key_values, use_cache=True)
        return new_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    run_door(main)
