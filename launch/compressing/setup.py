"""Preparation of launch/prune.py and launch/quantize.py: the model, the text, the ranks, and the checks before any long work."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from data.command_line import INTERRUPTED, UserError, describe, flatten, nearest
from data.files import refuse_full_disk
from data.tokenization.loading import load_tokenizer
from launch.checkpoints.opening import OpenedModel, open_model, weights_bytes
from launch.checkpoints.state import ShardSlice, checksum
from launch.compressing import report
from launch.compressing.beside_weights import refuse_unwritable_tokenizer
from launch.compressing.layer_store import LayerStore, folder_for
from launch.compressing.samples import Text, calibration_text, paths_for, refuse_shared_text, test_text
from launch.compressing.settings import CompressionSettings
from launch.compressing.workers import Workers, find_workers
from launch.evaluation.evaluation_sets import first_inputs
from model import huggingface
from model.compression.statistics import Matrix, matrices
from model.config import SIZES, ModelConfig, count_parameters, named_size
from model.finite import is_finite
from model.layers import Stream

Settings = TypeVar("Settings", bound=CompressionSettings)

_MAX_ZEROS = 0.05  # share of a matrix; one that was trained and not pruned has no zeros
_SETTINGS_OUTSIDE_THE_PLAN = (
    *("model", "output", "data", "calibration_data"),  # the plan compares the weights and the text instead
    *("kv_cache", "test_samples", "max_shard_gib", "max_perplexity_ratio", "strict", "force", "dry_run"),
)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types by their names in --precision."""


@dataclasses.dataclass(frozen=True)
class Job(Generic[Settings]):
    """A model to compress and the text for it, after all checks."""

    settings: Settings
    script: str
    """File name of the script, without .py."""
    arguments: Sequence[str]
    opened: OpenedModel
    workers: Workers
    calibration: Text | None
    test: Text | None
    before: report.Weights
    fingerprint: str
    """Hash of the model's weights."""
    start_time: float
    """Start time by time.perf_counter, seconds."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the dense model."""
        return self.opened.config

    @property
    def output(self) -> Path:
        """Folder to write."""
        assert self.settings.output is not None
        return Path(self.settings.output)

    @property
    def dtype(self) -> torch.dtype:
        """Type of written weights that are not quantized."""
        return DTYPES[self.settings.precision]

    @property
    def samples(self) -> list[Stream]:
        """This rank's share of the calibration text, as the first layer reads it."""
        batches = self.workers.share(self.calibration.batches) if self.calibration else []
        return first_inputs(batches, self.workers.device)

    @contextlib.contextmanager
    def layer_store(self) -> Iterator[LayerStore]:
        """Lock the folder of finished layers for this process while the context lasts."""
        store = LayerStore(self.output, self._plan())
        try:
            self.workers.run_on_rank0(store.open)
            yield store
        except KeyboardInterrupt:
            told = store.how_to_resume
            if report.is_in(self.output):
                store.remove()
                told = f"{self.output} is complete."
            raise KeyboardInterrupt(f"{INTERRUPTED} {told}") from None
        finally:
            store.close()

    def _plan(self) -> dict[str, Any]:
        """Return what identifies this compression; an earlier start is resumed if it has the same plan."""
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in _SETTINGS_OUTSIDE_THE_PLAN}
        calibration = self.calibration.fingerprint if self.calibration else None
        return {"door": self.script, "model": self.fingerprint, "calibration": calibration} | flatten(settings)

    def log(self, text: str) -> None:
        """Print a line on the first rank."""
        if self.workers.is_first:
            print(text, flush=True)


def open_source(settings: CompressionSettings) -> tuple[ModelConfig, OpenedModel | None]:
    """Return the model's shape, and the model unless only a size is named. Raises UserError if it cannot be compressed or written."""
    if settings.dry_run and settings.model in SIZES and not Path(settings.model).exists():
        return ModelConfig(**named_size(settings.model)), None
    opened = open_model(settings.model, settings.average)
    if opened.tokenizer is None:
        raise UserError(f"There is no tokenizer.model, tokenizer.json or .tiktoken file next to {settings.model}.")
    if not settings.force:
        opened.refuse_quantized("compressing it again would add a second loss. Use --force to allow it")
    try:
        huggingface.architecture(opened.config)
    except ValueError as error:
        raise UserError(str(error)) from error
    refuse_unwritable_tokenizer(opened, load_tokenizer(opened.tokenizer))
    return opened.config, opened


def open_job(settings: Settings, opened: OpenedModel, script: str, arguments: Sequence[str], needs_calibration: bool) -> Job[Settings]:
    """Find the text and the ranks, and check every weight. Raises UserError, before any long work, if something is wrong."""
    start_time = time.perf_counter()
    if needs_calibration and not settings.calibration_samples:
        given = describe(settings, "calibration_samples")
        raise UserError(f"{given}: this method needs statistics of the inputs of each matrix. Use --calibration_samples 128.")
    calibration = test = None
    if settings.calibration_samples or settings.test_samples:
        paths = paths_for(opened, settings.data, settings.model)
        length = settings.sequence_length
        if settings.calibration_samples:
            calibration_paths = [settings.calibration_data] if settings.calibration_data else paths
            calibration = calibration_text(opened, settings.model, calibration_paths, settings.calibration_samples, length)
        if settings.test_samples:
            test = test_text(opened, settings.model, paths, settings.test_samples, length)
        if calibration and test and not settings.force:
            refuse_shared_text(calibration, test)
    if settings.output is not None:
        _refuse_too_small_disk(Path(settings.output), opened.config, DTYPES[settings.precision])
    workers = find_workers(arguments)
    before, fingerprint = _check_weights(opened, workers, DTYPES[settings.precision], settings.force)
    if not settings.dry_run:
        workers.run_on_rank0(opened.compare_with_transformers)
    job = Job(settings, script, tuple(arguments), opened, workers, calibration, test, before, fingerprint, start_time)
    widest = max(matrix.shape[1] for matrix in matrices(opened.config).values())
    if calibration and calibration.tokens < widest:
        job.log(
            f"Note: {calibration.tokens:,} calibration tokens for matrices of up to {widest:,} inputs. With fewer tokens than inputs "
            "the statistics are incomplete. Give more --calibration_samples."
        )
    return job


def chosen_matrices(config: ModelConfig, ignore: Sequence[str]) -> dict[str, Matrix]:
    """Return the matrices of all blocks but those that patterns such as "0.*" and "*.down" match. Raises UserError if one matches none."""
    found = matrices(config)
    names = [str(matrix) for matrix in found.values()]
    for pattern in ignore:
        if not fnmatch.filter(names, pattern):
            kinds = ", BLOCK.".join(dict.fromkeys(matrix.linear for matrix in found.values()))
            raise UserError(f"--ignore {pattern} matches no matrix.{nearest(pattern, names)} The names are BLOCK.{kinds}.")
    chosen = {name: matrix for name, matrix in found.items() if not any(fnmatch.fnmatchcase(str(matrix), pattern) for pattern in ignore)}
    if not chosen:
        raise UserError(f"--ignore {' '.join(ignore)} leaves no matrix to compress.")
    return chosen


def _check_weights(opened: OpenedModel, workers: Workers, dtype: torch.dtype, force: bool) -> tuple[report.Weights, str]:
    """Return a report of every weight, and a hash of all. Raises UserError for a weight that is not finite, and for a pruned model."""
    kinds, linears = report.kinds_of_tensors(opened.config), matrices(opened.config)
    tensors, complaints = {}, []
    for name in workers.share(list(kinds)):
        weight = opened.state[name]
        zeros = int((weight == 0).sum())
        whole = ShardSlice.of_whole(name, weight.shape)
        tensors[name] = (
            report.TensorReport(name, kinds[name], weight.numel(), zeros, weight.nbytes),
            checksum(weight.flatten().float(), whole),
        )
        if not is_finite(weight):
            complaints.append(opened.not_finite(name))
        elif weight.abs().max() > torch.finfo(dtype).max:
            complaints.append(
                f"{opened.file_of(name)}: {name} contains numbers above {torch.finfo(dtype).max:g}, the largest number of the chosen "
                "--precision. Use --precision bf16 or float32."
            )
        elif name in linears and zeros > _MAX_ZEROS * weight.numel() and not force:
            complaints.append(
                f"{opened.file_of(name)}: {zeros / weight.numel():.0%} of {name} are zero, so the model is pruned already. Compressing "
                "it again would add a second loss. Use --force to allow it."
            )
    if complaints := [one for rank in workers.all_gather(complaints) for one in rank]:
        raise UserError(complaints[0] + (f" {len(complaints) - 1} more of its weights cannot be used." if complaints[1:] else ""))
    checked = {name: result for rank in workers.all_gather(tensors) for name, result in rank.items()}
    fingerprint = hashlib.sha256(repr([(name, checked[name][1]) for name in kinds]).encode()).hexdigest()
    return report.Weights(weights_bytes(opened), tuple(checked[name][0] for name in kinds)), fingerprint


def _refuse_too_small_disk(output: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Raise UserError if the finished layers and the folder, at most twice the weights less what an earlier start wrote, do not fit."""
    done = sum(path.stat().st_size for path in folder_for(output).glob("*.safetensors"))
    refuse_full_disk(output, 2 * dtype.itemsize * count_parameters(config) - done)
