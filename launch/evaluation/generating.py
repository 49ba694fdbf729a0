"""Predictions of one model for a prompt, printed as they come, or for a file, one line for each line."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from tqdm import tqdm

from data.command_line import UserError
from data.files import publish_file
from data.tokenization.loading import load_tokenizer
from launch.checkpoints.opening import load_model
from launch.evaluation.predictions import Predictor
from launch.evaluation.settings import GenerateSettings
from launch.evaluation.tasks.table import TASKS, task_of
from launch.evaluation.tasks.task import Task
from launch.ranks.processes import device_name
from model.config import ModelConfig


def generate(settings: GenerateSettings) -> int:
    """Predict for --prompt or --input; return the exit status. Raises UserError if the settings do not fit the model."""
    trained = load_model(settings.model, average=settings.average)
    task = task_of(trained)
    _refuse_unsuitable(settings, task, trained.config)
    tokenizer_path = Path(settings.tokenizer) if settings.tokenizer else trained.tokenizer
    if tokenizer_path is None:
        raise UserError(f"There is no tokenizer.model, tokenizer.json or .tiktoken file next to {settings.model}. Give --tokenizer.")
    tokenizer = load_tokenizer(tokenizer_path)
    try:
        predictor = task.predictor(trained, tokenizer, device_name(), settings)
        if settings.input:
            _write_lines(settings.input, settings, predictor)
        else:
            for piece in predictor.stream(settings.prompt):
                sys.stdout.write(piece)
                sys.stdout.flush()
    except ValueError as error:
        raise UserError(str(error)) from error
    if predictor.num_cut:
        print(
            f"Texts longer than {trained.config.sequence_length} tokens that were cut at their end: {predictor.num_cut}.", file=sys.stderr
        )
    return 0


def _refuse_unsuitable(settings: GenerateSettings, task: Task, config: ModelConfig) -> None:
    """Raise UserError for settings that this kind of model does not support."""
    all_options = dict.fromkeys(option for one in TASKS.values() for option in one.options)
    supported = ", ".join(f"--{option}" for option in task.options)
    complaints = [
        f"--{name} is not supported for {task.model_kind} ({settings.model} is one). Supported options: {supported}."
        for name in settings.given(*all_options)
        if name not in task.options
    ]
    complaints += task.option_complaints(settings, config)
    if task.needs_prompt and not settings.input and not settings.prompt.strip():
        complaints.append(f"{settings.model} is {task.model_kind}. Give it a text with --prompt, or a file of texts with --input.")
    if complaints:
        raise UserError("\n".join(complaints))


def _write_lines(path: str, settings: GenerateSettings, predictor: Predictor) -> None:
    """Write a line for each line of the input; an output file gets its name when it is complete."""
    unfinished = Path(f"{settings.output}.unfinished")
    with contextlib.ExitStack() as files:
        source = sys.stdin.buffer if path == "-" else files.enter_context(_open(path, "rb"))
        target = files.enter_context(_open(unfinished, "wb")) if settings.output else sys.stdout.buffer
        bar = files.enter_context(tqdm(unit=" texts", disable=None, leave=False))
        texts = _decoded(source, path)
        for line in predictor.predict_lines(texts, 64 if settings.batch_size is None else settings.batch_size, bar.update):
            target.write(f"{line}\n".encode())
        if settings.output:
            publish_file(target, settings.output)


def _decoded(lines: Iterable[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"--input {path}: line {number} is not valid UTF-8.") from error


def _open(path: str | Path, mode: Literal["rb", "wb"]) -> BinaryIO:
    try:
        return open(path, mode)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.") from error
