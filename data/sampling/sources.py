"""What a run reads: prepared folders cut into samples, and the blend that says which of them comes when."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.command_line import UserError
from data.shards import PreparedData

if TYPE_CHECKING:
    from data.sampling.fill_in_the_middle import FillInTheMiddle
    from data.sampling.objectives import Objective
    from data.sampling.order import Blend
    from data.sampling.packing import Samples
    from data.tokenization.tokenizer import Tokenizer


ObjectiveName = Literal["causal", "prefix", "masked", "span_corruption", "pairs", "classification"]
Architecture = Literal["decoder", "encoder", "encoder_decoder"]
OBJECTIVES: dict[Architecture, tuple[ObjectiveName, ObjectiveName]] = {
    "decoder": ("causal", "prefix"),
    "encoder": ("masked", "classification"),
    "encoder_decoder": ("span_corruption", "pairs"),
}
"""What each architecture can be asked for; the first is the default."""


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
    objective: ObjectiveName | None = None
    """What a sample asks for (default: causal for a decoder, masked for an encoder, span_corruption for an encoder_decoder). causal: the
    next token; prefix: the same behind a prefix whose tokens see one another; masked: tokens that were hidden; span_corruption: spans
    that were cut out; pairs: the second text of each document, given the first; classification: its label (--pair_field of
    data/prepare.py)."""
    mask_rate: float = 0.15
    """Share of the tokens that masked hides (ModernBERT: 0.3) or span_corruption cuts out, above 0 and below 1."""
    whole_words: bool = False
    """masked hides all tokens of a word or none."""
    next_sentence: bool = False
    """Beside masked: whether the second part of a sample follows the first, or is from another document, is its class (1: another)."""
    span_length: float = 3.0
    """Tokens of a span that span_corruption cuts out, on average; at least 1."""
    target_length: int | None = None
    """Tokens of the second texts in a sample of pairs (default: model.sequence_length, which is that of the first texts)."""
    labels: tuple[str, ...] = ()
    """Labels of classification, as they stand in the data; a label's place, from 0, is its class."""
    start_token: str | None = None
    """Special token that a decoder reads before the first target of span_corruption and pairs (default: the one that ends a text).
    Weights of published T5 and Marian models need <pad>."""
    class_token: str = "[CLS]"
    """Special token before each text that an encoder reads."""
    mask_token: str = "[MASK]"
    """Special token in the place of a hidden one."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The samples of a run's sources, in the order of data.path."""

    folders: dict[str, PreparedData]
    """By name."""
    samples: "list[Samples]"
    blend: "Blend"
    tokenizer: "Tokenizer"
    fill: "FillInTheMiddle | None"
    objective: ObjectiveName

    @property
    def names(self) -> list[str]:
        return list(self.folders)

    @property
    def end_of_text(self) -> int:
        """The id that ends each document, in all folders."""
        return next(iter(self.folders.values())).end_of_text

    @property
    def target_length(self) -> int | None:
        """Tokens that the decoder of an encoder-decoder reads of a sample; None elsewhere."""
        return self.samples[0].target_length

    @property
    def start_token(self) -> int | None:
        """The id that the decoder of an encoder-decoder reads first; None elsewhere."""
        return self.samples[0].start_token

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text that the blend reads, in UTF-8; None where the objective does not ask for every token behind those before it."""
        if self.objective != "causal":
            return None
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
    folders: dict[str, PreparedData],
    settings: SamplingSettings,
    sequence_length: int,
    document_mask: bool,
    seed: int,
    architecture: Architecture = "decoder",
    token_types: int = 0,
) -> Sampling:
    """Cut the training split of each folder into samples and blend them.

    What is behind `settings` is the model's; `token_types` is how many it tells apart. Raises UserError where the settings do not
    fit it or the folders.
    """
    from data.sampling.order import Blend

    tokenizer, objective = _open_objective(folders, settings, sequence_length, document_mask, architecture, token_types)
    empty = [folder.folder for folder in folders.values() if not len(folder.splits["train"])]
    if empty:
        raise UserError(f"{empty[0]} has no tokens to train on.")
    samples = [objective.samples(folder, "train", seed, source) for source, folder in enumerate(folders.values())]
    blend = Blend([one.num_samples for one in samples], settings.weights or None, seed)
    return Sampling(folders, samples, blend, tokenizer, objective.fill, objective.name)


def open_held_out(
    folders: dict[str, PreparedData],
    settings: SamplingSettings,
    sequence_length: int,
    document_mask: bool,
    architecture: Architecture = "decoder",
    token_types: int = 0,
    split: str = "validation",
) -> "dict[str, Samples]":
    """The samples of a split of each folder that has one, by the folder's name; as in open_sampling, but the same for every seed."""
    _, objective = _open_objective(folders, settings, sequence_length, document_mask, architecture, token_types)
    return {name: objective.held_out(folder, split) for name, folder in folders.items() if len(folder.splits[split])}


def _open_objective(
    folders: dict[str, PreparedData], settings: SamplingSettings, *of_model: int | bool | str
) -> "tuple[Tokenizer, Objective]":
    from data.sampling.objectives import Objective
    from data.tokenization.tokenizer import load_tokenizer

    first = next(iter(folders.values()))
    tokenizer = load_tokenizer(first.tokenizer_path)
    return tokenizer, Objective(settings, *of_model, tokenizer, first.end_of_text)


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
