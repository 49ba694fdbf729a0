"""Write a model that Hugging Face's transformers loads: python launch/export.py runs/demo --output exported/demo"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data.command_line import UserError, read_settings, run_door


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported folder."""
    output: str
    """New folder: safetensors, config.json, generation_config.json, tokenizer, README.md."""
    average: int = 1
    """Mean of the weights of the newest so many checkpoints."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of the written weights."""
    max_shard_gib: float = 4.0
    """Largest safetensors file, GiB."""


def main(arguments: Sequence[str]) -> int:
    description = (
        "Write a model that Hugging Face's transformers loads, and compare its logits with ours. Memory: three of the largest weights "
        "while writing; the whole model in float32, in transformers, while comparing."
    )
    settings = read_settings(ExportSettings, arguments, description, positional="model")
    import torch

    from data.huggingface_tokenizer import padding, write_tokenizer
    from data.tokenizer import load_tokenizer
    from launch.answers import names_of
    from launch.training.model_card import model_card
    from launch.training.weights import open_model
    from model import huggingface

    output = Path(settings.output)
    if output.exists():
        raise UserError(f"--output {output} is there already; nothing is overwritten. Give another name.")
    if settings.max_shard_gib <= 0:
        raise UserError(f"--max_shard_gib is {settings.max_shard_gib:g}; it must be above 0.")
    opened = open_model(settings.model, settings.average)
    if opened.tokenizer is None:
        raise UserError(f"No tokenizer.model, tokenizer.json or .tiktoken file lies beside {settings.model}.")
    tokenizer, names = load_tokenizer(opened.tokenizer), names_of(opened)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    differences: list[float] = []

    def complete(unfinished: Path) -> None:
        marks = opened.config.architecture, names.class_token, names.mask_token
        write_tokenizer(opened.tokenizer, unfinished, opened.config.sequence_length, None, *marks)
        differences.append(huggingface.verify(unfinished, opened.config, opened.state))
        card = model_card(opened, output.name, settings.average, dtype, differences[0])
        (unfinished / "README.md").write_text(card, encoding="utf-8")

    start = opened.start_token(tokenizer)
    tokens = huggingface.SpecialTokens(tokenizer.end_of_text, padding(tokenizer)[1], names.labels, start)
    try:
        huggingface.export(opened.config, opened.state, output, tokens, dtype, int(settings.max_shard_gib * 2**30), complete)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{output}: transformers loads it with no missing or unexpected key; largest difference of logits {differences[0]:.1e}.")
    return 0


if __name__ == "__main__":
    run_door(main)
