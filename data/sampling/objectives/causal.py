"""Causal language modelling: each token is predicted from the tokens before it."""

from collections.abc import Iterator, Sequence

import numpy as np

from data.command_line import UserError
from data.sampling.fill_in_the_middle import MARKS, FillInTheMiddle
from data.sampling.objectives.base import ModelShape, Objective, ShownPart
from data.sampling.packing import CausalSamples, PackedSamples, causal_samples
from data.sampling.samples import IGNORED, Piece, Sample, Samples
from data.sampling.settings import SamplingSettings
from data.shards import PreparedData
from data.tokenization.tokenizer import Tokenizer


class Causal(Objective):
    """The objective that predicts the next token at every position of joined or packed documents."""

    name = "causal"
    architecture = "decoder"
    own_settings = ("packing", "fim_rate")  # fim_tokens is only read if fim_rate is above 0
    predicts_every_token = True
    reads_begin_of_text = True

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        super().__init__(settings, model, tokenizer, end_of_text)
        self.fill = _fill_in_the_middle(settings, tokenizer, end_of_text)

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> CausalSamples:
        """Return the training samples of a split, with fill-in-the-middle."""
        stream, model = folder.splits[split], self.model
        kind = causal_samples(self.settings.packing)
        return kind(stream, model.sequence_length, self.end_of_text, model.document_mask, self.fill, seed, source)

    def evaluation_samples(self, folder: PreparedData, split: str) -> CausalSamples:
        """Return samples of joined and cut documents, without fill-in-the-middle."""
        return PackedSamples(folder.splits[split], self.model.sequence_length, self.end_of_text, self.model.document_mask)

    def describe(self, samples: Sequence[Samples], shares: Sequence[float]) -> str:
        """Return a line for the plan of a run, with the share of the pieces that fill-in-the-middle transforms."""
        text = super().describe(samples, shares)
        if self.fill is None:
            return text
        filled = sum(share * one.filled_share for share, one in zip(shares, samples, strict=True))
        return f"{text} and special tokens; {filled:.1%} of the pieces transformed by fill-in-the-middle"

    @property
    def brief(self) -> str:
        """Packing and visibility of documents, for data/show.py."""
        return f"{self.settings.packing}, documents {self._visibility}"

    def shown_parts(self, sample: Sample, pieces: Sequence[Piece]) -> Iterator[ShownPart]:
        """Yield each piece of a document with its tokens, in the order in which the model reads them."""
        beginning, start = np.array(self.tokenizer.beginning, np.int64), 0
        for piece in pieces:
            is_filled = self.fill is not None and int(sample.targets[start]) == self.fill.prefix
            end = start + piece.num_tokens + (MARKS if is_filled else 0)
            targets = sample.targets[start:end]
            tokens = np.concatenate([beginning, targets[targets != IGNORED]])
            yield ShownPart(piece, ", transformed by fill-in-the-middle" if is_filled else "", [("", tokens)])
            start = end

    def _summary(self, samples: Sequence[Samples]) -> str:
        return f"{self._packing}, {self._visibility}"


def _fill_in_the_middle(settings: SamplingSettings, tokenizer: Tokenizer, end_of_text: int) -> FillInTheMiddle | None:
    if settings.fim_rate == 0:
        return None
    if len(settings.fim_tokens) != 3:
        raise UserError(f"data.fim_tokens has {len(settings.fim_tokens)} tokens; it must have three: before prefix, suffix and middle.")
    fill = FillInTheMiddle(settings.fim_rate, *(tokenizer.special_token_id(token) for token in settings.fim_tokens))
    if len({fill.prefix, fill.suffix, fill.middle, end_of_text}) != 4:
        raise UserError(
            f"data.fim_tokens is {' '.join(settings.fim_tokens)}; it must be three different tokens, "
            f"none of them the one that ends a document (number {end_of_text})."
        )
    return fill
