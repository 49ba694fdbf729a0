"""Write a model for other people's engines: python launch/export.py runs/demo --output exported/demo [--format gguf --type q4_0]"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError, read_settings, run_door
from data.files import new_file, new_folder

if TYPE_CHECKING:
    from data.tokenization.tokenizer import Tokenizer
    from launch.checkpoints.opening import OpenedModel

# How far llama.cpp's perplexity may be from ours, relative: it multiplies float16 weights by float16 activations, and blocks by
# activations of 8 bits; GPT-2's GELU it looks up in a table of float16.
_TOLERANCE = {"f32": 1e-4, "f16": 1e-3}
_TOLERANCE_OF_BLOCKS = 0.02


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported folder."""
    output: str
    """New folder: safetensors, config.json, generation_config.json, tokenizer, README.md. With gguf: new file, NAME.gguf."""
    format: Literal["huggingface", "gguf"] = "huggingface"
    """A folder for transformers and what reads its files, or a file for llama.cpp (decoders, tokenizer inside)."""
    average: int = 1
    """Mean of the weights of the newest so many checkpoints."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of the written weights; of gguf --type says it."""
    max_shard_gib: float = 4.0
    """Largest safetensors file, GiB."""
    type: Literal["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"] | None = None
    """Of gguf: type of the matrices (default: f16). q8_0 and q4_0 round to blocks of 32; the last three are written by llama.cpp, where
    llama-cpp-python is installed."""


def main(arguments: Sequence[str]) -> int:
    description = (
        "Write a model that Hugging Face's transformers, or llama.cpp, loads, and compare its logits with ours. Memory: three of the "
        "largest weights while writing; the whole model in float32, in transformers, while comparing."
    )
    settings = read_settings(ExportSettings, arguments, description, positional="model")
    from data.tokenization.tokenizer import load_tokenizer
    from launch.checkpoints.opening import open_model

    output = Path(settings.output)
    if output.exists():
        raise UserError(f"--output {output} is there already; nothing is overwritten. Give another name.")
    if settings.max_shard_gib <= 0:
        raise UserError(f"--max_shard_gib is {settings.max_shard_gib:g}; it must be above 0.")
    _refuse_meaningless(settings)
    opened = open_model(settings.model, settings.average)
    if opened.tokenizer is None:
        raise UserError(f"No tokenizer.model, tokenizer.json or .tiktoken file lies beside {settings.model}.")
    write = _write_huggingface if settings.format == "huggingface" else _write_gguf
    try:
        print(write(settings, opened, load_tokenizer(opened.tokenizer), output))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _refuse_meaningless(settings: ExportSettings) -> None:
    if settings.format == "huggingface" and settings.type is not None:
        raise UserError(f"--type {settings.type} is for --format gguf; of a Hugging Face folder --precision says the type.")
    if settings.format == "gguf" and settings.precision != "float32":
        raise UserError(f"--precision {settings.precision} is for Hugging Face folders; of gguf --type says the type.")
    if settings.format == "gguf" and Path(settings.output).suffix != ".gguf":
        raise UserError(f"--output {settings.output} is to be a file whose name ends with .gguf.")


def _write_huggingface(settings: ExportSettings, opened: "OpenedModel", tokenizer: "Tokenizer", output: Path) -> str:
    import torch

    from data.tokenization.huggingface import padding, write_tokenizer
    from launch.checkpoints.model_card import model_card
    from launch.evaluation.prediction import names_of
    from model import huggingface

    opened.refuse_quantized("it is a Hugging Face folder already")
    names = names_of(opened)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    tokens = huggingface.SpecialTokens(tokenizer.end_of_text, padding(tokenizer)[1], names.labels, opened.start_token(tokenizer))
    with new_folder(output) as folder:
        huggingface.export(opened.config, opened.state, folder, tokens, dtype, int(settings.max_shard_gib * 2**30))
        marks = opened.config.architecture, names.class_token, names.mask_token
        write_tokenizer(tokenizer.path, folder, opened.config.sequence_length, None, *marks)
        difference = huggingface.verify(folder, opened.config, opened.state)
        card = model_card(opened, output.name, settings.average, dtype, difference)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return f"{output}: transformers loads it with no missing or unexpected key; largest difference of logits {difference:.1e}."


def _write_gguf(settings: ExportSettings, opened: "OpenedModel", tokenizer: "Tokenizer", output: Path) -> str:
    from data.tokenization.gguf import gguf_tokenizer
    from launch.compressing import llama_engine
    from model.compression import gguf_file

    kind = settings.type or "f16"
    config = opened.config
    name = gguf_file.architecture(config)
    if opened.kv_cache or any(scheme.activations != "none" for scheme in opened.schemes.values()):
        opened.refuse_quantized("GGUF has no place for inputs, keys and values that are rounded")
    if opened.schemes:
        print(f"{opened.folder} is quantized: the file holds what its codes stand for, as {kind}; it is no better than they are.")
    if kind in llama_engine.K_QUANTS:
        llama_engine.refuse_missing(f"--type {kind} is written by llama.cpp")
    tokenizer = _sentencepiece_beside(tokenizer)
    entries = gguf_tokenizer(tokenizer, config.vocab_size)
    with new_file(output) as unfinished:
        if kind in llama_engine.K_QUANTS:
            floats = unfinished.parent / "f16" / output.name
            floats.parent.mkdir()
            gguf_file.write(config, opened.state, entries, floats, "f16")
            llama_engine.quantize(floats, kind, unfinished)
        else:
            gguf_file.write(config, opened.state, entries, unfinished, kind)
        proof = f"transformers reads it; largest difference of logits {gguf_file.verify(unfinished, config):.1e}"
        if llama_engine.is_installed():
            allowed = _TOLERANCE.get("f16" if (kind, name) == ("f32", "gpt2") else kind, _TOLERANCE_OF_BLOCKS)
            difference = llama_engine.verify(unfinished, config, tokenizer, allowed)
            proof += f". llama.cpp gives our ids, and a perplexity {difference:.1e} of it from ours ({allowed:g} is allowed)"
        else:
            proof += f". llama.cpp was not asked: llama-cpp-python is not installed ({llama_engine.INSTALL})"
        stored = ", ".join(f"{count} {name}" for name, count in gguf_file.types(unfinished).most_common())
        size = unfinished.stat().st_size
    blocks = {"q8_0": 32, "q4_0": 32}.get(kind, 256 if kind in llama_engine.K_QUANTS else 1)
    if others := gguf_file.indivisible(config, blocks):
        print(
            f"Rows of {', '.join(others[:8])} ({len(others)} in all) are no multiple of {blocks}: these are stored otherwise than {kind}."
        )
    return f"{output}: {size:,} bytes, tensors: {stored}.\n{proof}."


def _sentencepiece_beside(tokenizer: "Tokenizer") -> "Tokenizer":
    """The tokenizer.model from which a tokenizer.json was made, where it lies beside it and gives the same ids."""
    from data.tokenization.huggingface import texts_of_many_kinds
    from data.tokenization.tokenizer import load_tokenizer

    beside = tokenizer.path.with_name("tokenizer.model")
    if tokenizer.path.suffix == ".json" and beside.is_file():
        with contextlib.suppress(UserError):
            original = load_tokenizer(beside)
            if all(original.encode(text) == tokenizer.encode(text) for text in texts_of_many_kinds(tokenizer)):
                return original
    return tokenizer


if __name__ == "__main__":
    run_door(main)
