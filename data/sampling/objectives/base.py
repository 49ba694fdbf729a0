"""The base class of the objectives."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.sampling.samples import IGNORED, Piece, Sample, Samples
from data.sampling.settings import Architecture, ObjectiveName, SamplingSettings
from data.shards import PreparedData
from data.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The settings of a model that its samples depend on."""

    sequence_length: int
    """Tokens of a sample."""
    document_mask: bool = False
    """True if the documents of a sample do not see one another."""
    architecture: Architecture = "decoder"
    """The objectives of another architecture are refused."""
    token_types: int = 0
    """Number of texts of a sample that an encoder tells apart."""


class ShownPart(NamedTuple):
    """A part of a sample as data/show.py prints it."""

    piece: Piece | None
    """The piece of a document to name first; None if there is none to name."""
    remark: str
    """Text to print after the piece's name."""
    texts: list[tuple[str, NDArray[np.int64]]]
    """Pairs of a name (may be empty) and the token ids to print as text after it."""


class Objective:
    """A training objective: which samples there are, which tokens a model reads in them and which it predicts.

    To add an objective, write a file in this folder with a subclass, add the class to the table in table.py, and add its name to
    data/sampling/settings.py. `open_objective` of table.py checks the settings before it constructs the class. The constructor looks
    up the special tokens that the objective needs; it raises UserError if the tokenizer lacks one.
    """

    name: ClassVar[ObjectiveName]
    """Value of data.objective."""
    architecture: ClassVar[Architecture]
    """The model.architecture that can learn it."""
    own_settings: ClassVar[tuple[str, ...]] = ()
    """Names of SamplingSettings that this objective reads and some others do not. The others refuse any value but the default."""
    reads_pairs: ClassVar[bool] = False
    """True if a document must be a pair of texts, as data/prepare.py --pair_field writes them; false if it must be a single text."""
    predicts_every_token: ClassVar[bool] = False
    """True if every token of the text is predicted once, from the tokens before it, so that bits per byte are defined and a text can be
    read in windows."""

    reads_begin_of_text: ClassVar[bool] = False
    """True if documents may begin with a begin-of-text token (--add_bos of data/prepare.py)."""

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        self.settings, self.model, self.tokenizer, self.end_of_text = settings, model, tokenizer, end_of_text

    @classmethod
    def complaints(cls, settings: SamplingSettings, model: ModelShape) -> list[str]:
        """Return one sentence for each setting that contradicts another one or the model."""
        return []

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """Return the training samples of a split; `source` is the index of the folder in data.path."""
        raise NotImplementedError

    def evaluation_samples(self, folder: PreparedData, split: str) -> Samples:
        """Return the samples to measure a model on: the same for every seed and in every blend."""
        return self.samples(folder, split, seed=0, source=0)

    def describe(self, samples: Sequence[Samples], shares: Sequence[float]) -> str:
        """Return a line for the plan of a run: how the documents of all sources become samples.

        `shares` holds each source's share of all samples.
        """
        padding = sum(share * one.padding_share for share, one in zip(shares, samples, strict=True))
        return f"{self._summary(samples)}, {padding:.2%} padding"

    @property
    def brief(self) -> str:
        """The objective in a few words, for data/show.py."""
        return self.name

    def shown_parts(self, sample: Sample, pieces: Sequence[Piece]) -> Iterator[ShownPart]:
        """Yield the parts of a sample in the order to print: its pieces of documents, then the tokens of each segment."""
        for piece in pieces:
            yield ShownPart(piece, "", [])
        for number in range(1, int(np.abs(sample.segments).max()) + 1):
            texts = []
            if sample.source is not None and sample.source_segments is not None:
                texts.append(("source", sample.source[sample.source_segments == number]))
            is_target = (np.abs(sample.segments) == number) & (sample.targets != IGNORED)
            texts += [("prefix", sample.tokens[sample.segments == -number]), ("read", sample.tokens[sample.segments == number])]
            texts.append(("predicted", sample.targets[is_target]))
            yield ShownPart(None, "", [(name, tokens) for name, tokens in texts if len(tokens)])

    def _summary(self, samples: Sequence[Samples]) -> str:
        """Return the beginning of `describe`, without the padding."""
        raise NotImplementedError

    @property
    def _visibility(self) -> str:
        """Whether the documents of a sample see one another."""
        return "separated by mask" if self.model.document_mask else "seeing one another"

    @property
    def _packing(self) -> str:
        """How documents fill samples."""
        return {"packed": "documents joined and cut", "best_fit": "documents packed by best fit, not cut if they fit"}[
            self.settings.packing
        ]
