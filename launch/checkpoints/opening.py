"""Whole weights out of a checkpoint; and a model from whatever a person points a door at."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from data.command_line import UserError
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints import checkpoint
from launch.checkpoints.run_record import find_tokenizer
from launch.checkpoints.state import SavedState
from model import huggingface
from model.compression.activations import round_activations
from model.compression.packed import CacheScheme, Scheme, in_words
from model.config import ModelConfig, count_parameters
from model.transformer import Transformer

_MAPPED_BYTES_PER_FILE = 8 << 20


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """What is known about a model on disk. Its weights are not read yet."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    """Parameter by name, whole, each read when it is asked for."""
    folder: Path
    """The newest checkpoint, or the Hugging Face folder."""
    tokenizer: Path | None
    """Its tokenizer's file, where one lies beside it."""
    step: int | None
    """Of the checkpoint."""
    recipe: dict
    """What the run was told, as the checkpoint says; of a Hugging Face folder empty."""

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """How weights are quantized; empty where none is."""
        return self.state.schemes if isinstance(self.state, huggingface.State) else {}

    @property
    def kv_cache(self) -> CacheScheme | None:
        """As which codes keys and values are kept, if so."""
        return self.state.kv_cache if isinstance(self.state, huggingface.State) else None

    def refuse_quantized(self, asked: str) -> None:
        """Raise UserError where weights are quantized, with what `asked` for others."""
        if self.schemes or self.kv_cache:
            kinds = in_words(self.schemes.values(), self.kv_cache)
            raise UserError(f"{self.folder} is quantized ({kinds}): {asked}. Give the model that it was made from.")

    def start_token(self, tokenizer: Tokenizer) -> int:
        """The id that a decoder behind an encoder begins with, as the run or the Hugging Face folder has it."""
        stated = huggingface.decoder_start(self.folder) if self.step is None else None
        return tokenizer.start_token_id(self.recipe.get("data", {}).get("start_token")) if stated is None else stated


@dataclasses.dataclass(frozen=True)
class LoadedModel(OpenedModel):
    """A model read from disk, and what is known about it."""

    model: Transformer
    """In float32 on the CPU, and in its eval mode; of a quantized folder with what the codes stand for, rounding what it says."""


class AveragedState(Mapping[str, Tensor]):
    """Parameter name -> float32 tensor, the mean over checkpoints, whatever layouts wrote them; each is read when it is asked for."""

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self._saved = [SavedState(folder) for folder in folders]
        self._names = list(self._saved[0].names())
        self._mapped_bytes = 0
        self._most_mapped_bytes = max(64 << 20, _MAPPED_BYTES_PER_FILE * sum(len(list(folder.glob("*.safetensors"))) for folder in folders))

    def __getitem__(self, name: str) -> Tensor:
        if self._mapped_bytes > self._most_mapped_bytes:  # what was read counts as memory until files are closed
            self._saved, self._mapped_bytes = [SavedState(folder) for folder in self._folders], 0
        total = self._saved[0].whole(name)
        for saved in self._saved[1:]:
            total += saved.whole(name)
        self._mapped_bytes += total.nbytes * len(self._saved)
        return total.div_(len(self._saved))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_model(path: str, average: int = 1) -> OpenedModel:
    """Find a run folder's newest whole checkpoint, one checkpoint in it, or a Hugging Face folder.

    `average`: the weights are the mean of those of the newest so many checkpoints of a run folder.
    """
    folder = Path(path).resolve()
    if average < 1:
        raise UserError(f"--average is {average}; it must be at least 1.")
    is_checkpoint = (folder / checkpoint.MANIFEST).is_file()
    if average > 1 and (is_checkpoint or (folder / "config.json").is_file()):
        raise UserError(f"--average {average} needs a run folder with so many checkpoints; {folder} holds one model.")
    if (folder / "config.json").is_file() and not is_checkpoint:
        try:
            config, weights = huggingface.load(folder)
        except ValueError as error:
            raise UserError(str(error)) from error
        return _checked(OpenedModel(config, weights, folder, find_tokenizer(folder), None, {}))
    if is_checkpoint:
        if complaint := checkpoint.find_damage(folder):
            raise UserError(complaint)
        folders = [folder]
    else:
        folders = _newest_in_run(folder, average)
    manifest = checkpoint.read_manifest(folders[0])
    for one in folders:
        checkpoint.refuse_earlier_format(one, checkpoint.read_manifest(one))
    tokenizer = find_tokenizer(folders[0].parent.parent)
    config, recipe = ModelConfig(**manifest["model"]), manifest.get("recipe", {})
    return _checked(OpenedModel(config, AveragedState(folders), folders[0], tokenizer, manifest["step"], recipe))


def load_model(path: str, average: int = 1) -> LoadedModel:
    """Read the weights too, of what open_model finds."""
    return load_weights(open_model(path, average))


def load_weights(opened: OpenedModel) -> LoadedModel:
    """Read the weights too."""
    model = Transformer.from_state(opened.config, opened.state)
    round_activations(model, opened.schemes, opened.kv_cache)
    known = {field.name: getattr(opened, field.name) for field in dataclasses.fields(opened)}
    return LoadedModel(**known, model=model)


def weights_bytes(opened: OpenedModel) -> int:
    """Return the size of a model's weights in bytes.

    For a Hugging Face folder it is the size of its safetensors files, for a GGUF file the size of the whole file, tokenizer included. A
    checkpoint also holds the optimizer's states; for it, the size of its weights in float32 is returned.
    """
    if opened.step is not None:
        return 4 * count_parameters(opened.config)
    if opened.folder.is_file():
        return opened.folder.stat().st_size
    return sum(path.stat().st_size for path in opened.folder.glob("model*.safetensors"))


def _checked(opened: OpenedModel) -> OpenedModel:
    num_ids = 0
    if opened.tokenizer is not None:
        with contextlib.suppress(UserError):  # who needs the tokenizer is told what is wrong with it
            num_ids = load_tokenizer(opened.tokenizer).vocab_size
    if num_ids > opened.config.vocab_size:
        raise UserError(
            f"{opened.tokenizer} has {num_ids:,} ids, more than the vocabulary of {opened.config.vocab_size:,} that the model in "
            f"{opened.folder} has: it is another model's."
        )
    return opened


def _newest_in_run(folder: Path, average: int) -> list[Path]:
    root = folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give a run folder, a checkpoint in one, or an exported Hugging Face folder.")
    say = functools.partial(print, file=sys.stderr)  # a door's own answer is what stands on standard output
    newest = checkpoint.newest_undamaged(root, checkpoint.find_damage, say, may_rename=False)
    if newest is None:
        raise UserError(f"{folder} holds no checkpoint and no config.json; it is neither a run folder nor an exported model.")
    found = [newest]
    for older in checkpoint.published(root):
        if len(found) < average and checkpoint.step_of(older) < checkpoint.step_of(newest) and checkpoint.find_damage(older) is None:
            found.append(older)
    if len(found) < average:
        raise UserError(f"--average {average}: {root} holds {len(found)} whole checkpoints; a run keeps as many as checkpoint.keep says.")
    return found
