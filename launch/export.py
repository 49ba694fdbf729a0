"""Write a model that Hugging Face's transformers loads: python launch/export.py runs/demo --output exported/demo"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data.command_line import UserError, read_settings, run_door


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    model: str
    """Run folder, or a checkpoint in one."""
    output: str
    """New folder: safetensors, config.json, generation_config.json, tokenizer."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of the written weights."""
    max_shard_gib: float = 4.0
    """Largest safetensors file, GiB."""


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(ExportSettings, arguments, "Write a model that Hugging Face's transformers loads.", positional="model")
    import torch

    from data.huggingface_tokenizer import write_tokenizer
    from data.tokenizer import load_tokenizer
    from launch.training.weights import load_model
    from model import huggingface

    if Path(settings.output).exists():
        raise UserError(f"--output {settings.output} is there already; nothing is overwritten. Give another name.")
    trained = load_model(settings.model)
    if trained.tokenizer is None:
        raise UserError(f"No tokenizer.model, tokenizer.json or .tiktoken file lies beside {settings.model}.")
    tokenizer = load_tokenizer(trained.tokenizer)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    state = trained.model.state_dict()
    differences: list[float] = []

    def complete(unfinished: Path) -> None:
        write_tokenizer(trained.tokenizer, unfinished, trained.config.sequence_length)
        differences.append(huggingface.verify(unfinished, trained.config, state))

    try:
        huggingface.export(
            trained.config, state, settings.output, tokenizer.end_of_text, dtype, int(settings.max_shard_gib * 2**30), complete
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{settings.output}: transformers loads it with no missing or unexpected key; largest difference of logits {differences[0]:.1e}.")
    return 0


if __name__ == "__main__":
    run_door(main)
