"""Prefix language modelling: causal samples whose documents begin with a prefix that is given, not predicted."""

from collections.abc import Sequence

import numpy as np

from data.sampling.objectives.base import Objective
from data.sampling.order import sample_generator
from data.sampling.packing import CausalSamples, PackedSamples, causal_samples
from data.sampling.samples import IGNORED, Piece, Sample, Samples
from data.shards import PreparedData


class Prefix(Objective):
    """The objective that predicts the next token after a prefix of each document; the tokens of a prefix see one another."""

    name = "prefix"
    architecture = "decoder"
    own_settings = ("packing",)
    reads_begin_of_text = True

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """Return the training samples of a split."""
        model, kind = self.model, causal_samples(self.settings.packing)
        stream = folder.splits[split]
        return PrefixSamples(kind(stream, model.sequence_length, self.end_of_text, model.document_mask, None, seed, source))

    def evaluation_samples(self, folder: PreparedData, split: str) -> Samples:
        """Return samples of joined and cut documents, each with a prefix."""
        model = self.model
        return PrefixSamples(PackedSamples(folder.splits[split], model.sequence_length, self.end_of_text, model.document_mask))

    @property
    def brief(self) -> str:
        """Name and visibility of documents, for data/show.py."""
        return f"{self.name}, documents {self._visibility}"

    def _summary(self, samples: Sequence[Samples]) -> str:
        return f"{self._packing}, {self._visibility}, each after a given prefix"


class PrefixSamples(Samples):
    """Causal samples with a prefix in each segment (Raffel et al. 2019, arXiv 1910.10683, section 3.2).

    The length of a prefix is uniform from one token to the whole segment. Segment numbers in a prefix are negative. The target of the
    prefix's last token is the first predicted token, so each segment has at least one target.
    """

    def __init__(self, causal: CausalSamples) -> None:
        self._causal = causal
        self.stream, self.sequence_length, self.num_samples = causal.stream, causal.sequence_length, causal.num_samples

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        return self._causal.documents(number)

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        sample = self._causal.sample(number, epoch)
        generator = sample_generator(self._causal.seed, epoch, number, self._causal.source)
        counts = np.bincount(sample.segments)[1:]
        starts = np.cumsum(counts) - counts
        prefixes = generator.integers(1, counts, endpoint=True)
        position = np.arange(counts.sum()) - np.repeat(starts, counts)  # inside its segment
        in_prefix = np.flatnonzero(position < np.repeat(prefixes, counts))
        sample.segments[in_prefix] *= -1
        sample.targets[in_prefix] = np.where(np.isin(in_prefix, starts + prefixes - 1), sample.targets[in_prefix], IGNORED)
        return sample
