"""Masked language modelling: predicting hidden tokens from both sides (Devlin et al. 2018, arXiv 1810.04805)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from data.command_line import UserError
from data.sampling.best_fit import BestFit
from data.sampling.masking import Masking
from data.sampling.objectives.base import ModelShape, Objective
from data.sampling.objectives.next_sentence import NextSentenceSamples
from data.sampling.order import sample_generator
from data.sampling.packing import PackedSamples
from data.sampling.samples import Piece, Sample, Samples, encoder_sample, require_length
from data.sampling.settings import SamplingSettings
from data.shards import PreparedData, TokenStream
from data.tokenization.tokenizer import Tokenizer


class Masked(Objective):
    """The objective that predicts hidden tokens and, with data.next_sentence, whether the second part of a sample follows the first."""

    name = "masked"
    architecture = "encoder"
    own_settings = ("packing", "mask_rate", "whole_words", "next_sentence", "class_token", "mask_token")

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        super().__init__(settings, model, tokenizer, end_of_text)
        self._masking = _masking(settings, tokenizer, end_of_text)

    @classmethod
    def complaints(cls, settings: SamplingSettings, model: ModelShape) -> list[str]:
        """Return one sentence for each setting that contradicts another one or the model."""
        complaints = []
        if settings.next_sentence:
            if settings.packing == "best_fit":
                complaints.append(
                    "data.packing is best_fit; with data.next_sentence a sample is one piece of a document. Set data.packing packed."
                )
            if model.document_mask:
                complaints.append(
                    "model.document_mask is on; with data.next_sentence both parts of a sample must see one another: set it false."
                )
            if model.token_types < 2:
                complaints.append(
                    f"model.token_types is {model.token_types}; data.next_sentence needs 2 or more, one for each part of a sample."
                )
        elif model.document_mask and settings.packing == "packed":
            complaints.append(
                "model.document_mask is on, but data.packing packed joins documents without special tokens between them, so the mask "
                "cannot separate them. Set data.packing best_fit, or model.document_mask false."
            )
        return complaints

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """Return the training samples of a split."""
        stream, settings, model = folder.splits[split], self.settings, self.model
        if settings.next_sentence:
            return NextSentenceSamples(stream, model.sequence_length, self._masking, seed, source)
        return MaskedSamples(
            stream, model.sequence_length, self._masking, settings.packing, model.document_mask, model.token_types > 0, seed, source
        )

    @property
    def brief(self) -> str:
        """Name and visibility of documents, for data/show.py."""
        return f"{self.name}, documents {self._visibility}"

    def _summary(self, samples: Sequence[Samples]) -> str:
        settings = self.settings
        parts = (
            "two pieces of documents, half of the second ones from another document"
            if settings.next_sentence
            else f"{self._packing}, {self._visibility}"
        )
        return f"{parts}, {settings.mask_rate:.3g} of the tokens masked{' by whole words' if settings.whole_words else ''}"


class MaskedSamples(Samples):
    """Texts, each `[CLS] text [SEP]`, with hidden tokens. SEP is the end of text. An epoch reads every token.

    Each epoch hides other tokens. "packed" joins documents and cuts them, one text a sample, in which documents see one another.
    "best_fit" packs documents without cuts; `document_mask` separates them.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        masking: Masking,
        packing: Literal["packed", "best_fit"] = "packed",
        document_mask: bool = False,
        token_types: bool = False,
        seed: int = 0,
        source: int = 0,
    ) -> None:
        require_length(sequence_length, 3, "masked", "[CLS], a token and [SEP]")
        self.stream, self.sequence_length = stream, sequence_length
        self._masking, self._document_mask, self._token_types = masking, document_mask, token_types
        self._seed, self._source = seed, source
        content, end = sequence_length - 2, masking.end_of_text
        self._is_packed = packing == "packed"
        self._packed = PackedSamples(stream, content, end) if self._is_packed else BestFit(stream, content, marks=2, ends=1)
        self.num_samples = self._packed.num_samples

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        return self._packed.documents(number)

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        masking = self._masking
        if self._is_packed:
            start = number * (self.sequence_length - 2)
            texts = [self.stream.read(start, min(self.sequence_length - 2, len(self.stream) - start))]
        else:
            pieces = self.documents(number)
            texts = [self.stream.read(self.stream.document_start(piece.document) + piece.first, piece.num_tokens) for piece in pieces]
        framed = [masking.framed(text) for text in texts]
        tokens, targets = masking.hide(np.concatenate(framed), sample_generator(self._seed, epoch, number, self._source))
        numbers = np.arange(1, len(framed) + 1) if self._document_mask else np.ones(len(framed), np.int64)
        segments = np.repeat(numbers, [len(one) for one in framed])
        return encoder_sample(self.sequence_length, tokens, segments, targets, np.zeros_like(tokens) if self._token_types else None)


def _masking(settings: SamplingSettings, tokenizer: Tokenizer, end_of_text: int) -> Masking:
    class_token, mask_token = tokenizer.special_token_id(settings.class_token), tokenizer.special_token_id(settings.mask_token)
    if len({class_token, mask_token, end_of_text}) != 3:
        raise UserError(
            f"data.class_token is {settings.class_token} and data.mask_token {settings.mask_token}; they must be two different tokens, "
            f"neither of them the one that ends a document ({tokenizer.end_of_text_token})."
        )
    is_text = np.ones(tokenizer.vocab_size, bool)
    is_text[[*tokenizer.special_tokens.values(), end_of_text]] = False
    word_edges = tokenizer.word_edges() if settings.whole_words else None
    return Masking(settings.mask_rate, class_token, mask_token, end_of_text, is_text, word_edges)
