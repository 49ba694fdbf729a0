"""Predictions of one model for a prompt, printed as they come, or for a file, one line for each line."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data.command_line import UserError
from data.files import new_file
from data.tokenization.loading import load_tokenizer
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.tokenizer import EncodingError, Tokenizer
from launch.checkpoints.opening import OpenedModel, load_weights, open_model
from launch.evaluation.predictions import Predictor
from launch.evaluation.settings import GenerateSettings
from launch.evaluation.tasks.table import TASKS, task_of
from launch.evaluation.tasks.task import Task
from launch.ranks.processes import device_name
from model.config import ModelConfig


def generate(settings: GenerateSettings) -> int:
    """Predict for --prompt or --input; return the exit status. Raises UserError if the settings do not fit the model."""
    opened = open_model(settings.model, settings.average)
    task = task_of(opened)
    _refuse_unsuitable(settings, task, opened.config)
    tokenizer = _tokenizer_of(settings, opened)
    with contextlib.ExitStack() as files:
        lines = None
        if settings.input:
            lines = sys.stdin.buffer if settings.input == "-" else files.enter_context(_open(settings.input))
        try:
            predictor = task.predictor(load_weights(opened), tokenizer, device_name(), settings)
            if lines is not None:
                _write_lines(_decoded(lines, str(settings.input)), settings, predictor)
            else:
                for piece in predictor.stream(settings.prompt):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except ValueError as error:
            raise UserError(str(error)) from error
    if predictor.num_cut:
        print(f"Texts longer than {opened.config.sequence_length} tokens that were cut at their end: {predictor.num_cut}.", file=sys.stderr)
    return 0


def _tokenizer_of(settings: GenerateSettings, opened: OpenedModel) -> Tokenizer:
    """Return the tokenizer of --tokenizer, or the one next to the model. Raises UserError if it is the tokenizer of another model."""
    path = Path(settings.tokenizer) if settings.tokenizer else opened.tokenizer
    if path is None:
        raise UserError(f"There is no tokenizer.model, tokenizer.json or .tiktoken file next to {settings.model}. Give --tokenizer.")
    tokenizer = load_tokenizer(path)
    opened.refuse_other_tokenizer(tokenizer)
    if settings.tokenizer and opened.tokenizer is not None:
        _refuse_other_ids(tokenizer, opened.tokenizer)
    elif settings.tokenizer and tokenizer.vocab_size < opened.config.vocab_size:
        print(
            f"Note: --tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} ids, the model {opened.config.vocab_size:,}, and there is no "
            f"tokenizer next to {settings.model} to compare it with. The text is right only if the model was trained with this tokenizer.",
            file=sys.stderr,
        )
    return tokenizer


def _refuse_other_ids(tokenizer: Tokenizer, own_path: Path) -> None:
    """Raise UserError if a tokenizer gives other ids than the one next to the model."""
    try:
        own = load_tokenizer(own_path)
    except UserError:  # it is damaged, which is a reason to give another file
        return
    if own.file_bytes() != tokenizer.file_bytes() and any(_ids(own, text) != _ids(tokenizer, text) for text in texts_of_many_kinds(own)):
        raise UserError(
            f"--tokenizer {tokenizer.path} gives other ids than {own_path}, the tokenizer next to the model: it is the tokenizer of "
            "another model. Leave --tokenizer out."
        )


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the ids of a text; None if the tokenizer cannot encode it."""
    try:
        return tokenizer.encode(text)
    except EncodingError:
        return None


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


def _write_lines(texts: Iterable[str], settings: GenerateSettings, predictor: Predictor) -> None:
    """Write a line for each text; an output file appears when it is complete."""
    with contextlib.ExitStack() as files:
        bar = files.enter_context(tqdm(unit=" texts", disable=None, leave=False))
        target: BinaryIO = sys.stdout.buffer
        if settings.output:
            target = files.enter_context(open(files.enter_context(new_file(Path(settings.output))), "wb"))
        for line in predictor.predict_lines(texts, 64 if settings.batch_size is None else settings.batch_size, bar.update):
            target.write(f"{line}\n".encode())


def _decoded(lines: Iterable[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"--input {path}: line {number} is not valid UTF-8.") from error


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.") from error
