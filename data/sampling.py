"""What a run reads: prepared folders cut into samples, and the blend that says which of them comes when."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError
from data.shards import PreparedData

if TYPE_CHECKING:
    from data.fill_in_the_middle import FillInTheMiddle
    from data.order import Blend
    from data.packing import Samples
    from data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    path: tuple[str, ...] = ("prepared",)
    """Folder that data/prepare.py wrote, or several to blend."""
    weights: tuple[float, ...] = ()
    """Share of each folder in the samples, in any unit (default: what each holds)."""
    packing: Literal["packed", "best_fit"] = "packed"
    """How documents fill samples: joined and cut where a sample is full, or, for a little padding, none cut that fits into one.
    Without model.document_mask those of a sample see one another either way."""
    fim_rate: float = 0.0
    """Share of the pieces of documents whose middle is moved to their end, to be filled in (Bavarian et al. 2022, arXiv 2207.14255).
    A document is one piece if it lies in one sample, and several if samples divide it."""
    fim_tokens: tuple[str, ...] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    """Special tokens of the tokenizer before prefix, suffix and middle of such a document."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The samples of a run's sources, in the order of data.path."""

    folders: dict[str, PreparedData]
    """By name."""
    samples: "list[Samples]"
    blend: "Blend"
    tokenizer: "Tokenizer"
    fill: "FillInTheMiddle | None"

    @property
    def names(self) -> list[str]:
        return list(self.folders)

    @property
    def end_of_text(self) -> int:
        """The id that ends each document, in all folders."""
        return next(iter(self.folders.values())).end_of_text

    @property
    def bytes_per_token(self) -> float:
        """Of the text that the blend reads, in UTF-8."""
        streams = [folder.splits["train"] for folder in self.folders.values()]
        return sum(float(share) * stream.num_bytes / len(stream) for share, stream in zip(self.blend.shares, streams, strict=True))

    def epochs(self, positions: int) -> dict[str, float]:
        """How often the first so many samples of the run read each source, by its name."""
        return dict(zip(self.names, self.blend.epochs(positions).tolist(), strict=True))


def open_folders(paths: Sequence[str]) -> dict[str, PreparedData]:
    """The prepared folders by name. Raises UserError where one is missing or damaged, or has another tokenizer than the first."""
    if not paths:
        raise UserError("data.path names no folder; give at least one.")
    folders = dict(zip(names_of(paths), map(PreparedData, paths), strict=True))
    first, *others = folders.values()
    for other in others:
        if difference := _difference(other, first):
            raise UserError(
                f"{other.folder} was tokenized otherwise than {first.folder}: {difference}. All folders of data.path need one "
                f"tokenizer: prepare again with --tokenizer {first.tokenizer_path}."
            )
    return folders


def names_of(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell all apart. Raises UserError where a folder is named twice."""
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
    folders: dict[str, PreparedData], settings: SamplingSettings, sequence_length: int, document_mask: bool, seed: int
) -> Sampling:
    """Cut the training split of each folder into samples and blend them. Raises UserError where the settings do not fit them."""
    from data.order import Blend
    from data.packing import BestFitSamples, PackedSamples
    from data.tokenizer import load_tokenizer

    first = next(iter(folders.values()))
    tokenizer = load_tokenizer(first.tokenizer_path)
    fill = _fill_in_the_middle(settings, tokenizer, first.end_of_text)
    kind = {"packed": PackedSamples, "best_fit": BestFitSamples}[settings.packing]
    empty = [folder.folder for folder in folders.values() if not len(folder.splits["train"])]
    if empty:
        raise UserError(f"{empty[0]} has no tokens to train on.")
    samples = [
        kind(folder.splits["train"], sequence_length, folder.end_of_text, document_mask, fill, seed, source)
        for source, folder in enumerate(folders.values())
    ]
    return Sampling(folders, samples, Blend([one.num_samples for one in samples], settings.weights or None, seed), tokenizer, fill)


def _fill_in_the_middle(settings: SamplingSettings, tokenizer: "Tokenizer", end_of_text: int) -> "FillInTheMiddle | None":
    from data.fill_in_the_middle import FillInTheMiddle

    if settings.fim_rate == 0:
        return None
    if len(settings.fim_tokens) != 3:
        raise UserError(f"data.fim_tokens has {len(settings.fim_tokens)} tokens; it must be three: before prefix, suffix and middle.")
    fill = FillInTheMiddle(settings.fim_rate, *(tokenizer.special_token_id(token) for token in settings.fim_tokens))
    if len({fill.prefix, fill.suffix, fill.middle, end_of_text}) != 4:
        raise UserError(
            f"data.fim_tokens is {' '.join(settings.fim_tokens)}; it must be three different tokens, "
            f"none of them the one that ends a document (number {end_of_text})."
        )
    return fill


def _difference(prepared: PreparedData, first: PreparedData) -> str:
    """How the tokenizer of a folder is not that of the first; empty where it is the same."""
    there, here = first.manifest["tokenizer"], prepared.manifest["tokenizer"]
    if here["sha256"] != there["sha256"]:
        return f"{here['sha256'][:12]} ({prepared.vocab_size:,} ids) is not {there['sha256'][:12]} ({first.vocab_size:,} ids)"
    settings, others = here.get("settings") or {}, there.get("settings") or {}
    if differing := [name for name in sorted(settings | others) if settings.get(name) != others.get(name)]:
        return f"the same file with other settings beside it ({', '.join(differing)})"
    if prepared.end_of_text != first.end_of_text:
        return f"token {prepared.end_of_text} ends its documents, not {first.end_of_text}"
    return ""
