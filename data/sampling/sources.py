"""The sources of a run: prepared folders cut into samples, and the blend that orders them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.command_line import UserError
from data.sampling.objectives.base import ModelShape, Objective
from data.sampling.objectives.table import open_objective, refuse_other_records
from data.sampling.order import Blend
from data.sampling.samples import Samples
from data.sampling.settings import Architecture, SamplingSettings
from data.shards import PreparedData, bytes_per_token
from data.tokenization.loading import load_tokenizer
from data.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The samples of a run's sources, in the order of data.path."""

    folders: dict[str, PreparedData]
    """The prepared folders by name."""
    samples: list[Samples]
    blend: Blend
    tokenizer: Tokenizer
    objective: Objective

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return list(self.folders)

    @property
    def end_of_text(self) -> int:
        """The id that ends each document in all folders."""
        return next(iter(self.folders.values())).end_of_text

    @property
    def target_length(self) -> int | None:
        """Tokens of a sample that the decoder of an encoder-decoder reads; None for other architectures."""
        return self.samples[0].target_length

    @property
    def start_token(self) -> int | None:
        """The id that the decoder of an encoder-decoder reads first; None for other architectures."""
        return self.samples[0].start_token

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes of a predicted token in the text that the blend reads; None if the objective does not predict every token."""
        if not self.objective.predicts_every_token:
            return None
        streams = [folder.splits["train"] for folder in self.folders.values()]
        return sum(float(share) * bytes_per_token([stream]) for share, stream in zip(self.blend.shares, streams, strict=True))

    def epochs(self, positions: int) -> dict[str, float]:
        """Return how often the first `positions` samples of the run read each source, by the source's name."""
        return dict(zip(self.names, self.blend.epochs(positions).tolist(), strict=True))


def open_folders(paths: Sequence[str]) -> dict[str, PreparedData]:
    """Return the prepared folders by name. Raises UserError if one is missing or damaged, or has another tokenizer than the first."""
    if not paths:
        raise UserError("data.path names no folder; give at least one folder.")
    folders = dict(zip(names_of(paths), map(PreparedData, paths), strict=True))
    first, *others = folders.values()
    for other in others:
        if other.begin_of_text != first.begin_of_text:
            with_bos, without = (other, first) if first.begin_of_text is None else (first, other)
            raise UserError(
                f"{with_bos.folder} was prepared with --add_bos true and {without.folder} with --add_bos false, so that only the documents "
                "of the first begin with the begin-of-text token. Prepare one of them again with the value of the other."
            )
        if difference := _difference(other, first):
            raise UserError(
                f"{other.folder} and {first.folder} have different tokenizers: {difference}. All folders of data.path need the same "
                f"tokenizer: prepare again with --tokenizer {first.tokenizer_path}."
            )
    return folders


def fingerprint_of(folders: Iterable[PreparedData]) -> str:
    """Return one hash of all tokens of the folders, in their order."""
    fingerprints = [folder.fingerprint for folder in folders]
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


def refuse_changed(folders: Iterable[PreparedData]) -> None:
    """Raise UserError if a shard has changed since its folder was opened, so that a result may be of other text."""
    for folder in folders:
        if change := folder.find_change():
            raise UserError(f"{change} No result was computed, because the data changed during the evaluation. Run the command again.")


def names_of(paths: Sequence[str]) -> list[str]:
    """Return the last parts of each path, as few as make all names different. Raises UserError if a folder is named twice."""
    resolved = [Path(path).resolve() for path in paths]
    twice = next((path for number, path in enumerate(resolved) if path in resolved[:number]), None)
    if twice:
        raise UserError(f"data.path names {twice} twice; name a folder once and give it a larger share in data.weights.")
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names


def open_sampling(
    folders: dict[str, PreparedData],
    settings: SamplingSettings,
    sequence_length: int,
    document_mask: bool,
    seed: int,
    architecture: Architecture = "decoder",
    token_types: int = 0,
) -> Sampling:
    """Cut the training split of each folder into samples and blend them.

    `sequence_length`, `document_mask`, `architecture` and `token_types` are the model's. Raises UserError if the settings do not fit
    the model or the folders.
    """
    objective = _open_objective(folders, settings, ModelShape(sequence_length, document_mask, architecture, token_types))
    empty = [folder.folder for folder in folders.values() if not len(folder.splits["train"])]
    if empty:
        raise UserError(f"{empty[0]} has no tokens to train on.")
    for folder in folders.values():
        refuse_other_records(type(objective), folder, "train")
    samples = [objective.samples(folder, "train", seed, source) for source, folder in enumerate(folders.values())]
    blend = Blend([one.num_samples for one in samples], settings.weights or None, seed)
    return Sampling(folders, samples, blend, objective.tokenizer, objective)


def open_held_out(
    folders: dict[str, PreparedData],
    settings: SamplingSettings,
    sequence_length: int,
    document_mask: bool,
    architecture: Architecture = "decoder",
    token_types: int = 0,
    split: str = "validation",
) -> dict[str, Samples]:
    """Return the evaluation samples of a split of each folder that has one, by the folder's name.

    The parameters are those of open_sampling; the samples are the same for every seed.
    """
    objective = _open_objective(folders, settings, ModelShape(sequence_length, document_mask, architecture, token_types))
    chosen = {name: folder for name, folder in folders.items() if len(folder.splits[split])}
    for folder in chosen.values():
        refuse_other_records(type(objective), folder, split)
    return {name: objective.evaluation_samples(folder, split) for name, folder in chosen.items()}


def _open_objective(folders: dict[str, PreparedData], settings: SamplingSettings, model: ModelShape) -> Objective:
    first = next(iter(folders.values()))
    tokenizer = load_tokenizer(first.tokenizer_path)
    objective = open_objective(settings, model, tokenizer, first.end_of_text)
    if first.begin_of_text is not None and not objective.reads_begin_of_text:
        raise UserError(
            f"{first.folder} was prepared with --add_bos true, so each document begins with {tokenizer.begin_of_text_token}; "
            f"data.objective {objective.name} has special tokens of its own around a text. Prepare the text again with --add_bos false."
        )
    return objective


def _difference(prepared: PreparedData, first: PreparedData) -> str:
    """Return how the tokenizer of a folder differs from that of the first folder; empty if they are equal."""
    own, other = prepared.manifest["tokenizer"], first.manifest["tokenizer"]
    if own["sha256"] != other["sha256"]:
        return f"{own['sha256'][:12]} ({prepared.vocab_size:,} ids) is not {other['sha256'][:12]} ({first.vocab_size:,} ids)"
    settings, others = own.get("settings") or {}, other.get("settings") or {}
    if differing := [name for name in sorted(settings | others) if settings.get(name) != others.get(name)]:
        return f"the files are equal, but the settings next to them differ ({', '.join(differing)})"
    if prepared.end_of_text != first.end_of_text:
        return f"documents end with token {prepared.end_of_text}, not {first.end_of_text}"
    return ""
