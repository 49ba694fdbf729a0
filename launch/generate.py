"""Let a model write: python launch/generate.py runs/demo --prompt "def " """

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from data.command_line import UserError, read_settings, run_door
from data.files import publish_file

if TYPE_CHECKING:
    from launch.evaluation.prediction import Answers


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    model: str
    """Run folder, a checkpoint in one, or an exported Hugging Face folder."""
    prompt: str = ""
    """Text: a decoder continues it (default: nothing, the start of a document), an encoder-decoder takes it as its source, an encoder
    fills each [MASK] in it, or tells its class."""
    input: str | None = None
    """File with a text a line in place of --prompt, - for standard input; a line of results for each. Not for a decoder."""
    output: str | None = None
    """New file for the results of --input (default: standard output)."""
    batch_size: int | None = None
    """Lines of --input at a time (default: 64)."""
    max_new_tokens: int | None = None
    """Longest text that is written, tokens (default: 200; of a search with beams, those of its source + 50)."""
    temperature: float | None = None
    """Divides the logits; 0 always takes the likeliest token (default: 0.8; an encoder-decoder draws only where this or one of the next
    three is given)."""
    top_k: int | None = None
    """Draw only from the k likeliest tokens; for a [MASK], show so many (default: 5)."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int | None = None
    """Of the draws (default: 0)."""
    beam_size: int | None = None
    """Targets that an encoder-decoder follows at a time (default: 4); 1 takes the likeliest token each time."""
    length_penalty: float | None = None
    """The best target has the highest log P / ((5 + tokens) / 6) ** length_penalty (arXiv 1609.08144; default: 0.6)."""
    average: int = 1
    """Mean of the weights of a run's newest so many checkpoints."""
    tokenizer: str | None = None
    """tokenizer.model, tokenizer.json or a .tiktoken file (default: the one beside the model)."""


_DRAWING = ("temperature", "top_k", "top_p", "seed")
_OF_FILES = ("input", "output", "batch_size")
_OPTIONS = {
    "a decoder": ("max_new_tokens", *_DRAWING),
    "an encoder-decoder": ("max_new_tokens", *_DRAWING, "beam_size", "length_penalty", *_OF_FILES),
    "an encoder with masks to fill": ("top_k", *_OF_FILES),
    "a classifier": _OF_FILES,
}


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(GenerateSettings, arguments, "Let a model write.", positional="model")
    if settings.output and Path(settings.output).exists():
        raise UserError(f"--output {settings.output} is there already; nothing is overwritten. Give another name.")
    from data.tokenization.tokenizer import load_tokenizer
    from launch.checkpoints.opening import load_model

    trained = load_model(settings.model, average=settings.average)
    kind = _kind(trained.config)
    _refuse_meaningless(settings, kind, trained.config.sequence_length)
    tokenizer_path = Path(settings.tokenizer) if settings.tokenizer else trained.tokenizer
    if tokenizer_path is None:
        raise UserError(f"No tokenizer.model, tokenizer.json or .tiktoken file lies beside {settings.model}: give --tokenizer.")
    tokenizer = load_tokenizer(tokenizer_path)
    try:
        if kind == "a decoder":
            _continue(settings, trained, tokenizer)
        else:
            answers = _answers(settings, kind, trained, tokenizer)
            if settings.input:
                _write_lines(settings.input, settings, answers)
            else:
                print(answers.in_full(settings.prompt))
            if answers.num_cut:
                print(f"Read without their ends, more than {trained.config.sequence_length} tokens: {answers.num_cut}.", file=sys.stderr)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _kind(config) -> str:
    if config.architecture == "encoder":
        return "an encoder with masks to fill" if config.token_head else "a classifier"
    return "an encoder-decoder" if config.architecture == "encoder_decoder" else "a decoder"


def _refuse_meaningless(settings: GenerateSettings, kind: str, sequence_length: int) -> None:
    """Raise UserError for what says nothing to this kind of model, or beside the other options."""
    given = _given(settings, *dict.fromkeys(sum(_OPTIONS.values(), ())))
    complaints = [
        f"--{name} says nothing to {kind}, which {settings.model} is; it takes {', '.join('--' + option for option in _OPTIONS[kind])}."
        for name in given
        if name not in _OPTIONS[kind]
    ]
    searching = [name for name in given if name == "length_penalty" or (name == "beam_size" and settings.beam_size != 1)]
    drawing = [name for name in given if name in _DRAWING]
    if kind == "an encoder-decoder" and searching and drawing:
        complaints.append(f"--{drawing[0]} is for drawing tokens, --{searching[0]} for the search of the best target: keep one of them.")
    if kind == "an encoder-decoder" and given.get("max_new_tokens", 0) > sequence_length:
        complaints.append(f"max_new_tokens is {settings.max_new_tokens}; the longest target of {settings.model} has {sequence_length}.")
    if settings.input and settings.prompt:
        complaints.append("--prompt and --input both say what to read: keep one of them.")
    if not settings.input:
        complaints += [f"--{name} is for the results of --input, which is not given." for name in ("output", "batch_size") if name in given]
        if kind != "a decoder" and not settings.prompt.strip():
            complaints.append(f"{settings.model} is {kind}: give it a text with --prompt, or a file of them with --input.")
    for name in ("top_k", "batch_size"):
        if given.get(name, 1) < 1:
            complaints.append(f"{name} is {given[name]}; it must be at least 1.")
    if complaints:
        raise UserError("\n".join(complaints))


def _given(settings: GenerateSettings, *names: str) -> dict:
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def _drawing(settings: GenerateSettings) -> dict:
    """The options of model.generation.generate."""
    return {"max_new_tokens": 200, "temperature": 0.8, "seed": 0} | _given(settings, "max_new_tokens", *_DRAWING)


def _continue(settings: GenerateSettings, trained, tokenizer) -> None:
    """Print text as it comes; the bytes of a character that is not whole yet are held back."""
    import torch

    from launch.ranks.processes import device_name
    from model.generation import generate

    ids = tokenizer.encode(settings.prompt) or [tokenizer.end_of_text]
    drawn = generate(
        trained.model.to(device_name()),
        torch.tensor([ids], device=device_name()),
        **_drawing(settings),
        stop=tokenizer.end_of_text,
        sequence_length=trained.config.sequence_length,
        vocab_size=tokenizer.vocab_size,
        prefix_attention=trained.config.prefix_attention,
    )
    sys.stdout.write(settings.prompt)
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


def _answers(settings: GenerateSettings, kind: str, trained, tokenizer) -> "Answers":
    from launch.evaluation.prediction import Classes, Masks, Targets, names_of
    from launch.ranks.processes import device_name

    if kind == "a classifier":
        return Classes(trained, tokenizer, device_name(), names_of(trained))
    if kind == "an encoder with masks to fill":
        return Masks(trained, tokenizer, device_name(), names_of(trained), 5 if settings.top_k is None else settings.top_k)
    search = _given(settings, "max_new_tokens", "beam_size", "length_penalty")
    return Targets(trained, tokenizer, device_name(), search, _drawing(settings) if _given(settings, *_DRAWING) else None)


def _write_lines(path: str, settings: GenerateSettings, answers: "Answers") -> None:
    """A line for each line of the input; a file of them has its name when it is whole."""
    from tqdm import tqdm

    unfinished = Path(f"{settings.output}.unfinished")
    with contextlib.ExitStack() as files:
        source = sys.stdin.buffer if path == "-" else files.enter_context(_open(path, "rb"))
        target = files.enter_context(_open(unfinished, "wb")) if settings.output else sys.stdout.buffer
        bar = files.enter_context(tqdm(unit=" texts", disable=None, leave=False))
        texts = _decoded(source, path)
        for line in answers.in_order(texts, 64 if settings.batch_size is None else settings.batch_size, bar.update):
            target.write(f"{line}\n".encode())
        if settings.output:
            publish_file(target, settings.output)


def _decoded(lines: Iterable[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"--input {path}: line {number} is not UTF-8.") from error


def _open(path: str | Path, mode: Literal["rb", "wb"]) -> BinaryIO:
    try:
        return open(path, mode)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.") from error


if __name__ == "__main__":
    run_door(main)
