"""Classification: the label of a text is predicted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.objectives.base import ModelShape, Objective
from data.sampling.samples import IGNORED, Piece, Sample, Samples, encoder_sample, require_length
from data.sampling.settings import SamplingSettings
from data.shards import PreparedData, TokenStream
from data.tokenization.tokenizer import Tokenizer

_SHOWN_LABELS = 10
"""Of the labels of the first _LOOKED_AT documents, to someone who named none."""
_LOOKED_AT = 1000


class Classification(Objective):
    """Predict the label of each document, which is the second text of a pair."""

    name = "classification"
    architecture = "encoder"
    own_settings = ("labels", "class_token")

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        super().__init__(settings, model, tokenizer, end_of_text)
        self._class_token = tokenizer.special_token_id(settings.class_token)

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        stream, model = self._pairs_of(folder, split), self.model
        classes = self._classes(folder, split)
        return ClassificationSamples(stream, model.sequence_length, classes, self._class_token, self.end_of_text, model.token_types > 0)

    def _summary(self, samples: Sequence[Samples]) -> str:
        return f"a text and one of {len(self.settings.labels)} labels"

    def _classes(self, folder: PreparedData, split: str) -> np.ndarray:
        """The class of each document.  -> [documents]"""
        labels, stream = self.settings.labels, folder.splits[split]
        if not labels:
            found = sorted({self._label(stream, document) for document in range(min(stream.num_documents, _LOOKED_AT))})
            raise UserError(
                f"data.objective classification needs data.labels, each label once; the first documents of {folder.folder} have: "
                f"{', '.join(found[:_SHOWN_LABELS])}{', ...' if len(found) > _SHOWN_LABELS else ''}."
            )
        spelt = [tuple(self.tokenizer.encode(label)) for label in labels]
        if alike := [label for number, label in enumerate(labels) if spelt.count(spelt[number]) > 1]:
            raise UserError(f"data.labels {', '.join(alike)} are the same tokens to {self.tokenizer.path}, and cannot be told apart.")
        classes = classes_of(stream, spelt)
        unknown = np.flatnonzero(classes < 0)
        if len(unknown):
            first = int(unknown[0])
            raise UserError(
                f'{folder.folder}, {folder.place_of(split, first)}: the label "{self._label(stream, first)}" is none of data.labels '
                f"({', '.join(labels)}); {len(unknown):,} documents have such a label."
            )
        return classes

    def _label(self, stream: TokenStream, document: int) -> str:
        starts, lengths = stream.sequences(np.array([document]))
        return self.tokenizer.decode(stream.read(int(starts[0, 1]), int(lengths[0, 1]) - 1).tolist())


class ClassificationSamples(Samples):
    """`[CLS] text [SEP]` of one document a sample, cut where it is too long, and the class that its label is."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        classes: NDArray[np.int64],
        class_token: int,
        end_of_text: int,
        token_types: bool = False,
    ) -> None:
        require_length(sequence_length, 3, "classification", "[CLS], a token and [SEP]")
        self.stream, self.sequence_length, self._classes = stream, sequence_length, classes
        self._class_token, self._end_of_text, self._token_types = class_token, end_of_text, token_types
        self.num_samples = stream.num_documents
        lengths = stream.sequence_lengths[:, 0]
        self.num_cut = int((lengths > sequence_length - 1).sum())
        self._taken = int(np.minimum(lengths, sequence_length - 1).sum())

    @property
    def padding_share(self) -> float:
        return 1 - self._taken / (self.num_samples * self.sequence_length)

    def documents(self, number: int) -> list[Piece]:
        return [Piece(number, 0, len(self._text(number)))]

    def sample(self, number: int, epoch: int) -> Sample:
        tokens = np.concatenate([[self._class_token], self._text(number)]).astype(np.int64)
        tokens[-1] = self._end_of_text
        token_types = np.zeros_like(tokens) if self._token_types else None
        targets = np.full_like(tokens, IGNORED)
        return encoder_sample(self.sequence_length, tokens, np.ones_like(tokens), targets, token_types, self._classes[number])

    def _text(self, number: int) -> NDArray:
        starts, lengths = self.stream.sequences(np.array([number]))
        return self.stream.read(int(starts[0, 0]), min(int(lengths[0, 0]), self.sequence_length - 1))


def classes_of(stream: TokenStream, labels: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Which of the labels each document's second sequence is, without its end; -1 for none of them.  -> [documents]"""
    lengths = stream.sequence_lengths[:, 1]
    classes = np.full(len(lengths), -1, np.int64)
    for number, label in enumerate(labels):
        candidates = np.flatnonzero(lengths == len(label) + 1)
        for place, token in enumerate(label):
            starts = stream.sequences(candidates)[0][:, 1]
            candidates = candidates[stream.gather(starts + place) == token]
        classes[candidates] = number
    return classes
