"""Export of a model as a Hugging Face folder or a GGUF file, checked by the software that reads it."""

import contextlib
from pathlib import Path
from typing import cast

import torch

from data.command_line import UserError
from data.files import new_file, new_folder, refuse_full_disk
from data.tokenization.configuration import read_json_object
from data.tokenization.gguf import gguf_tokenizer, texts_with_other_ids
from data.tokenization.loading import load_tokenizer
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.model_card import model_card
from launch.checkpoints.opening import OpenedModel, open_model
from launch.compressing import llama_engine
from launch.compressing.beside_weights import refuse_unwritable_tokenizer, special_tokens, write_tokenizer_of
from launch.compressing.settings import ExportSettings
from launch.evaluation.tasks.table import task_of
from model import huggingface
from model.compression import gguf_file
from model.config import count_parameters
from model.finite import first_not_finite

# Largest relative difference allowed between llama.cpp's perplexity and ours. llama.cpp multiplies float16 weights by float16 activations,
# and blocks by activations of 8 bits; it reads GPT-2's GELU from a table of float16.
_TOLERANCE = {"f32": 1e-4, "f16": 1e-3}
_TOLERANCE_FOR_BLOCKS = 0.02

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(settings: ExportSettings) -> int:
    """Write the folder or file and print what was checked; return the exit status. Raises UserError if the model cannot be exported."""
    opened = open_model(settings.model, settings.average)
    if opened.tokenizer is None:
        raise UserError(f"There is no tokenizer.model, tokenizer.json or .tiktoken file next to {settings.model}.")
    write = _write_huggingface if settings.format == "huggingface" else _write_gguf
    try:
        print(write(settings, opened, load_tokenizer(opened.tokenizer), Path(settings.output)))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _write_huggingface(settings: ExportSettings, opened: OpenedModel, tokenizer: Tokenizer, output: Path) -> str:
    opened.refuse_quantized("it is already a Hugging Face folder")
    dtype = _DTYPES[settings.precision]
    refuse_full_disk(output, dtype.itemsize * count_parameters(opened.config))
    read_json_object(opened.root / "run.json")  # raises UserError now; the model card needs it at the end
    refuse_unwritable_tokenizer(opened, tokenizer)
    _refuse_not_finite(opened)
    opened.compare_with_transformers()
    tokens = special_tokens(opened, tokenizer)
    tag = task_of(opened).pipeline_tag(huggingface.architecture(opened.config))
    with new_folder(output) as folder:
        huggingface.export(opened.config, opened.state, folder, tokens, dtype, int(settings.max_shard_gib * 2**30))
        write_tokenizer_of(opened, tokenizer, folder)
        difference = huggingface.verify(folder, opened.config, opened.state)
        card = model_card(opened, output.name, settings.average, dtype, difference, tag)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return f"{output}: transformers loads it with no missing or unexpected key; largest difference of logits {difference:.1e}."


def _write_gguf(settings: ExportSettings, opened: OpenedModel, tokenizer: Tokenizer, output: Path) -> str:
    kind, config = settings.type or "f16", opened.config
    gguf_file.architecture(config)  # raises ValueError if GGUF has none for it
    if opened.kv_cache or any(scheme.activations != "none" for scheme in opened.schemes.values()):
        opened.refuse_quantized("GGUF cannot store that activations, keys or values are rounded")
    if opened.schemes:
        print(
            f"{opened.folder} is quantized. The file holds its dequantized weights as {kind}; they are no more precise than the codes they "
            "come from."
        )
    if kind in llama_engine.K_QUANTS:
        llama_engine.refuse_missing(f"--type {kind} is written by llama.cpp")
    tokenizer = _sentencepiece_original(tokenizer)
    entries = gguf_tokenizer(tokenizer, config.vocab_size)
    for kind_of_text in texts_with_other_ids(tokenizer):
        print(f"llama.cpp gives other ids than this project to {kind_of_text}.")
    blocks = {"q8_0": 32, "q4_0": 32}.get(kind, 256 if kind in llama_engine.K_QUANTS else 1)
    if others := gguf_file.indivisible(config, blocks):
        print(
            f"The row lengths of {', '.join(others[:8])} ({len(others)} in all) are not multiples of {blocks}: these matrices are stored "
            f"in another type than {kind}."
        )
    first_kind = "f16" if kind in llama_engine.K_QUANTS else cast(gguf_file.Kind, kind)  # llama.cpp makes the other types from f16
    refuse_full_disk(output, gguf_file.size(config, first_kind))
    _refuse_not_finite(opened)
    opened.compare_with_transformers()
    with new_file(output) as unfinished:
        if kind in llama_engine.K_QUANTS:
            floats = unfinished.parent / "f16" / output.name
            floats.parent.mkdir()
            gguf_file.write(config, opened.state, entries, floats, first_kind)
            llama_engine.quantize(floats, kind, unfinished)
        else:
            gguf_file.write(config, opened.state, entries, unfinished, first_kind)
        checks = _check_gguf(unfinished, kind, opened, tokenizer)
        stored = ", ".join(f"{count} {name}" for name, count in gguf_file.types(unfinished).most_common())
        size = unfinished.stat().st_size
    return f"{output}: {size:,} bytes, tensors: {stored}.\n{checks}."


def _refuse_not_finite(opened: OpenedModel) -> None:
    """Raise UserError if a weight is not finite: no comparison with transformers would agree."""
    if name := first_not_finite(opened.state):
        raise UserError(opened.not_finite(name))


def _check_gguf(file: Path, kind: str, opened: OpenedModel, tokenizer: Tokenizer) -> str:
    """Read the file with transformers and, if installed, llama.cpp; return what was checked. Raises RuntimeError if they differ from us."""
    config = opened.config
    checks = f"transformers reads it; largest difference of logits {gguf_file.verify(file, config):.1e}"
    if not llama_engine.is_installed():
        return f"{checks}. It was not checked with llama.cpp, because llama-cpp-python is not installed ({llama_engine.INSTALL})"
    is_gpt2 = gguf_file.architecture(config) == "gpt2"
    allowed = _TOLERANCE.get("f16" if is_gpt2 and kind == "f32" else kind, _TOLERANCE_FOR_BLOCKS)
    difference = llama_engine.verify(file, config, tokenizer, allowed)
    return f"{checks}. llama.cpp gives the same ids, and a perplexity that differs from ours by {difference:.1e} (allowed: {allowed:g})"


def _sentencepiece_original(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer.model that a tokenizer.json was made from, if it lies next to it and gives the same ids."""
    original_path = tokenizer.path.with_name("tokenizer.model")
    if tokenizer.path.suffix == ".json" and original_path.is_file():
        with contextlib.suppress(UserError):
            original = load_tokenizer(original_path, add_bos=tokenizer.adds_bos)
            if all(original.encode(text) == tokenizer.encode(text) for text in texts_of_many_kinds(tokenizer)):
                return original
    return tokenizer
