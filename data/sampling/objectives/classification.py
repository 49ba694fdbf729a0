"""Classification: predicting the label of a text."""

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
"""Number of labels to show in the error message if data.labels is missing."""
_PROBED_DOCUMENTS = 1000
"""Number of documents whose labels are read for that message."""


class Classification(Objective):
    """The objective that predicts the label of each document, which is the second text of a pair."""

    name = "classification"
    architecture = "encoder"
    own_settings = ("labels", "class_token")
    reads_pairs = True

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        super().__init__(settings, model, tokenizer, end_of_text)
        self._class_token = tokenizer.special_token_id(settings.class_token)

    @classmethod
    def complaints(cls, settings: SamplingSettings, model: ModelShape) -> list[str]:
        """Return a sentence if a label is given twice."""
        if len(set(settings.labels)) == len(settings.labels):
            return []
        return [f"data.labels names a label twice: {' '.join(settings.labels)}."]

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """Return the training samples of a split."""
        stream, model = folder.splits[split], self.model
        classes = self._classes(folder, split)
        return ClassificationSamples(stream, model.sequence_length, classes, self._class_token, self.end_of_text, model.token_types > 0)

    def _summary(self, samples: Sequence[Samples]) -> str:
        return f"a text and one of {len(self.settings.labels)} labels"

    def _classes(self, folder: PreparedData, split: str) -> np.ndarray:
        """Return the class of each document.  -> [documents]"""
        labels, stream = self.settings.labels, folder.splits[split]
        if not labels:
            found = sorted({self._label(stream, document) for document in range(min(stream.num_documents, _PROBED_DOCUMENTS))})
            raise UserError(
                f"data.objective classification needs data.labels, each label once; the first documents of {folder.folder} have: "
                f"{', '.join(found[:_SHOWN_LABELS])}{', ...' if len(found) > _SHOWN_LABELS else ''}."
            )
        label_ids = [tuple(self.tokenizer.encode(label)) for label in labels]
        if alike := [label for number, label in enumerate(labels) if label_ids.count(label_ids[number]) > 1]:
            raise UserError(
                f"data.labels {', '.join(alike)} have the same tokens in {self.tokenizer.path}, so they cannot be distinguished."
            )
        classes = classes_of(stream, label_ids)
        unknown = np.flatnonzero(classes < 0)
        if len(unknown):
            first = int(unknown[0])
            raise UserError(
                f'{folder.folder}, {folder.place_of(split, first)}: the label "{self._label(stream, first)}" is not in data.labels '
                f"({', '.join(labels)}); {len(unknown):,} documents have unknown labels."
            )
        return classes

    def _label(self, stream: TokenStream, document: int) -> str:
        """Return the text of a document's label."""
        starts, lengths = stream.sequences(np.array([document]))
        return self.tokenizer.decode(stream.read(int(starts[0, 1]), int(lengths[0, 1]) - 1).tolist())


class ClassificationSamples(Samples):
    """Samples of one document each, `[CLS] text [SEP]`, cut if it is too long, with the class of its label."""

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
        """Share of all positions that hold no token of a document."""
        return 1 - self._taken / (self.num_samples * self.sequence_length)

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        return [Piece(number, 0, len(self._text(number)))]

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        tokens = np.concatenate([[self._class_token], self._text(number)]).astype(np.int64)
        tokens[-1] = self._end_of_text
        token_types = np.zeros_like(tokens) if self._token_types else None
        targets = np.full_like(tokens, IGNORED)
        return encoder_sample(self.sequence_length, tokens, np.ones_like(tokens), targets, token_types, self._classes[number])

    def _text(self, number: int) -> NDArray:
        """Return the first text of a document, cut to the length of a sample."""
        starts, lengths = self.stream.sequences(np.array([number]))
        return self.stream.read(int(starts[0, 0]), min(int(lengths[0, 0]), self.sequence_length - 1))


def classes_of(stream: TokenStream, labels: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return the index of the label that each document's second sequence equals, without its end; -1 for none.  -> [documents]"""
    lengths = stream.sequence_lengths[:, 1]
    classes = np.full(len(lengths), -1, np.int64)
    for number, label in enumerate(labels):
        candidates = np.flatnonzero(lengths == len(label) + 1)
        for position, token in enumerate(label):
            starts = stream.sequences(candidates)[0][:, 1]
            candidates = candidates[stream.gather(starts + position) == token]
        classes[candidates] = number
    return classes
