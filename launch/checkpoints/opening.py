"""Opening a model for any script: from a run folder, one checkpoint or an exported Hugging Face folder."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from data.command_line import UserError
from data.recorded_paths import other_data, require_path
from data.sampling.sources import fingerprint_of, open_folders
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints import checkpoint
from launch.checkpoints.run_record import find_tokenizer, recorded_paths
from launch.checkpoints.state import SavedState
from model import huggingface
from model.compression.activations import round_activations
from model.compression.packed import CacheScheme, Scheme, describe_schemes
from model.config import ModelConfig, count_parameters
from model.finite import first_not_finite
from model.transformer import Transformer

_MAPPED_BYTES_PER_FILE = 8 << 20


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """Model on disk whose weights are not loaded yet."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    """Whole parameters by name; each is read when it is accessed."""
    folder: Path
    """Folder of the newest checkpoint, or the Hugging Face folder."""
    tokenizer: Path | None
    """File of its tokenizer; None if the run or the folder has none."""
    step: int | None
    """Step of the checkpoint; None for a Hugging Face folder."""
    recipe: dict
    """Settings of the run, from the checkpoint; empty for a Hugging Face folder."""

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Quantization of each quantized weight, by parameter name."""
        return self.state.schemes if isinstance(self.state, huggingface.State) else {}

    @property
    def kv_cache(self) -> CacheScheme | None:
        """Quantization of the keys and values in the cache; None if they are not quantized."""
        return self.state.kv_cache if isinstance(self.state, huggingface.State) else None

    @property
    def root(self) -> Path:
        """Folder of the files next to the weights: the run folder, or the Hugging Face folder."""
        return self.folder if self.step is None else self.folder.parent.parent

    def refuse_quantized(self, reason: str) -> None:
        """Raise UserError, with the reason, if the model is quantized."""
        if self.schemes or self.kv_cache:
            kinds = describe_schemes(self.schemes.values(), self.kv_cache)
            raise UserError(f"{self.folder} is quantized ({kinds}): {reason}. Give the model that it was made from.")

    def compare_with_transformers(self) -> None:
        """Raise UserError if transformers reads the Hugging Face folder of this model otherwise. A run has no such folder."""
        if isinstance(self.state, huggingface.State):
            try:
                huggingface.verify_source(self.folder, self.config, self.state)
            except ValueError as error:
                raise UserError(str(error)) from error

    def data_paths(self) -> list[str]:
        """Return the folders of the data that the run was trained on.

        Raises UserError if one is at none of its recorded places, or other data is there.
        """
        manifest = checkpoint.read_manifest(self.folder)
        paths = [require_path(one, self.root, "--data") for one in recorded_paths(manifest, "data.path")]
        recorded = manifest.get("data", {}).get("fingerprint")
        if recorded is not None and recorded != (found := fingerprint_of(open_folders(paths).values())):
            raise UserError(other_data(self.root, paths, recorded, found))
        return paths

    def refuse_other_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if a tokenizer has ids that the model does not have."""
        if tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.vocab_size:,} ids, but the model in {self.folder} has a vocabulary of "
                f"{self.config.vocab_size:,}: it is the tokenizer of another model."
            )

    def file_of(self, name: str) -> Path:
        """Return the file that holds a parameter, or the checkpoint whose files share it."""
        return self.state.file_of(name) if isinstance(self.state, huggingface.State) else self.folder

    def not_finite(self, name: str) -> str:
        """Return the message that a parameter is not finite."""
        return f"{self.file_of(name)}: {name} contains numbers that are not finite. The file is damaged, or the training diverged."

    def start_token(self, tokenizer: Tokenizer) -> int:
        """Token id with which the decoder of an encoder-decoder begins, from the run or the Hugging Face folder."""
        stated = huggingface.decoder_start(self.folder) if self.step is None else None
        return tokenizer.start_token_id(self.recipe.get("data", {}).get("start_token")) if stated is None else stated


@dataclasses.dataclass(frozen=True)
class LoadedModel(OpenedModel):
    """Opened model whose weights are loaded."""

    model: Transformer
    """Network in float32 on the CPU, in eval mode. From a quantized folder: with dequantized weights, and rounding activations."""


class AveragedState(Mapping[str, Tensor]):
    """Parameter name -> float32 tensor: the mean over checkpoints of any layouts. Each tensor is read when it is accessed."""

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self._saved = [SavedState(folder) for folder in folders]
        self._names = list(self._saved[0].names())
        self._mapped_bytes = 0
        self._most_mapped_bytes = max(64 << 20, _MAPPED_BYTES_PER_FILE * sum(len(list(folder.glob("*.safetensors"))) for folder in folders))

    def __getitem__(self, name: str) -> Tensor:
        if self._mapped_bytes > self._most_mapped_bytes:  # pages that were read count as memory until the files are closed
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
    """Open the newest undamaged checkpoint of a run folder, one checkpoint, or a Hugging Face folder, without loading its weights.

    `average` is the number of newest checkpoints of a run folder whose mean the weights are. Raises UserError if there is no such model
    or it is damaged.
    """
    folder = Path(path).resolve()
    if average < 1:
        raise UserError(f"--average is {average}; it must be at least 1.")
    is_checkpoint = (folder / checkpoint.MANIFEST).is_file()
    if average > 1 and (is_checkpoint or (folder / "config.json").is_file()):
        raise UserError(f"--average {average} needs a run folder with {average} checkpoints; {folder} is one model.")
    if (folder / "config.json").is_file() and not is_checkpoint:
        try:
            config, weights = huggingface.load(folder)
        except ValueError as error:
            raise UserError(str(error)) from error
        return _with_own_tokenizer(OpenedModel(config, weights, folder, find_tokenizer(folder), None, {}))
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
    return _with_own_tokenizer(OpenedModel(config, AveragedState(folders), folders[0], tokenizer, manifest["step"], recipe))


def load_model(path: str, average: int = 1) -> LoadedModel:
    """Open a model as open_model does, and load its weights."""
    return load_weights(open_model(path, average))


def load_weights(opened: OpenedModel) -> LoadedModel:
    """Load the weights of an opened model. Raises UserError if one is not finite."""
    model = Transformer.from_state(opened.config, opened.state)
    if name := first_not_finite({name: weight.detach() for name, weight in model.named_parameters()}):
        raise UserError(opened.not_finite(name))
    round_activations(model, opened.schemes, opened.kv_cache)
    fields = {field.name: getattr(opened, field.name) for field in dataclasses.fields(opened)}
    return LoadedModel(**fields, model=model)


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


def _with_own_tokenizer(opened: OpenedModel) -> OpenedModel:
    tokenizer = None
    if opened.tokenizer is not None:
        with contextlib.suppress(UserError):  # the error is raised again when the tokenizer is needed
            tokenizer = load_tokenizer(opened.tokenizer)
    if tokenizer is not None:
        opened.refuse_other_tokenizer(tokenizer)
    return opened


def _newest_in_run(folder: Path, average: int) -> list[Path]:
    root = folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give a run folder, a checkpoint in one, or an exported Hugging Face folder.")
    report = functools.partial(print, file=sys.stderr)  # standard output has only the script's result
    newest = checkpoint.newest_undamaged(root, checkpoint.find_damage, report, may_rename=False)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint and no config.json: it is neither a run folder nor an exported model.")
    found = [newest]
    for older in checkpoint.published(root):
        if len(found) < average and checkpoint.step_of(older) < checkpoint.step_of(newest) and checkpoint.find_damage(older) is None:
            found.append(older)
    if len(found) < average:
        raise UserError(
            f"--average {average}: {root} has {len(found)} undamaged checkpoints. A run keeps the newest checkpoint.keep of them."
        )
    return found
