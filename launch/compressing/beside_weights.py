"""The files next to the weights of an exported, pruned or quantized model: the tokenizer with all that belongs to it."""

import json
import shutil
import tempfile
from pathlib import Path

from data.files import disk_errors_named
from data.tokenization.companions import licence_files
from data.tokenization.huggingface_files import padding
from data.tokenization.huggingface_folder import write_tokenizer
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import OpenedModel
from launch.checkpoints.run_record import generation_settings
from launch.evaluation.predictions import names_of
from model import huggingface


def special_tokens(opened: OpenedModel, tokenizer: Tokenizer) -> huggingface.SpecialTokens:
    """Return the token ids and labels for config.json and generation_config.json, with those of the model that this one was made from."""
    generation = {} if opened.config.architecture == "encoder" else generation_settings(opened.root)
    ids = tokenizer.end_of_text, padding(tokenizer)[1]
    return huggingface.SpecialTokens(*ids, names_of(opened).labels, opened.start_token(tokenizer), generation, tokenizer.begin_of_text)


def write_tokenizer_of(opened: OpenedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer and the licence of a model into a Hugging Face folder. Raises UserError if transformers reads it otherwise."""
    names = names_of(opened)
    marks = opened.config.architecture, names.class_token, names.mask_token
    write_tokenizer(tokenizer.path, folder, opened.config.sequence_length, None, *marks)
    for path in licence_files(opened.root):
        shutil.copyfile(path, folder / path.name)


def refuse_unwritable_tokenizer(opened: OpenedModel, tokenizer: Tokenizer) -> None:
    """Raise UserError, before any weight is written, if write_tokenizer_of would."""
    with tempfile.TemporaryDirectory() as name, disk_errors_named(Path(name)):
        config_json = huggingface.to_huggingface(opened.config, special_tokens(opened, tokenizer))
        Path(name, "config.json").write_text(json.dumps(config_json))  # for AutoTokenizer
        write_tokenizer_of(opened, tokenizer, Path(name))
