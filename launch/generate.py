"""Continue a text: python launch/generate.py runs/demo --prompt "def " """

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from data.command_line import UserError, read_settings, run_door


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    prompt: str = ""
    """Text to continue (default: nothing, the start of a document)."""
    max_new_tokens: int = 200
    """Longest continuation, tokens."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw only from the k likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int = 0
    """Of the draws."""
    tokenizer: str | None = None
    """tokenizer.model, tokenizer.json or a .tiktoken file (default: the one beside the model)."""


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(GenerateSettings, arguments, "Continue a text.", positional="model")
    import torch

    from data.tokenizer import load_tokenizer
    from launch.training.processes import device_name
    from launch.training.weights import load_model
    from model.generation import generate

    trained = load_model(settings.model)
    tokenizer_path = Path(settings.tokenizer) if settings.tokenizer else trained.tokenizer
    if tokenizer_path is None:
        raise UserError(f"No tokenizer.model, tokenizer.json or .tiktoken file lies beside {settings.model}: give --tokenizer.")
    tokenizer = load_tokenizer(tokenizer_path)
    prompt = tokenizer.encode(settings.prompt) or [tokenizer.end_of_text]
    try:
        drawn = generate(
            trained.model.to(device_name()),
            torch.tensor([prompt], device=device_name()),
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.seed,
            stop=tokenizer.end_of_text,
            sequence_length=trained.config.sequence_length,
            vocab_size=tokenizer.vocab_size,
        )
        _stream(settings.prompt, prompt, drawn, tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _stream(prompt_text: str, prompt: list[int], drawn, tokenizer) -> None:
    """Print text as it comes; the bytes of a character that is not whole yet are held back."""
    sys.stdout.write(prompt_text)
    ids = list(prompt)
    printed = len(tokenizer.decode(ids))
    for token in drawn:
        if int(token[0]) == tokenizer.end_of_text:
            break
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[printed:])
            sys.stdout.flush()
            printed = len(text)
    sys.stdout.write("\n")


if __name__ == "__main__":
    run_door(main)
