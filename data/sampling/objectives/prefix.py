"""Prefix-LM: a causal sample whose documents begin with tokens that see one another and are not asked for."""

from collections.abc import Sequence

import numpy as np

from data.sampling.objectives.base import Objective
from data.sampling.order import sample_generator
from data.sampling.packing import CausalSamples, PackedSamples, causal_samples
from data.sampling.samples import IGNORED, Piece, Sample, Samples
from data.shards import PreparedData


class Prefix(Objective):
    """Predict the next token after a prefix of each document, whose tokens see one another."""

    name = "prefix"
    architecture = "decoder"
    own_settings = ("packing",)

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        model, kind = self.model, causal_samples(self.settings.packing)
        stream = folder.splits[split]
        return PrefixSamples(kind(stream, model.sequence_length, self.end_of_text, model.document_mask, None, seed, source))

    def evaluation_samples(self, folder: PreparedData, split: str) -> Samples:
        """Return samples of joined and cut documents, each with a prefix."""
        model = self.model
        return PrefixSamples(PackedSamples(folder.splits[split], model.sequence_length, self.end_of_text, model.document_mask))

    @property
    def brief(self) -> str:
        return f"{self.name}, documents {self._visibility}"

    def _summary(self, samples: Sequence[Samples]) -> str:
        return f"{self._packing}, {self._visibility}, each behind a prefix that is given"


class PrefixSamples(Samples):
    """Causal samples with a prefix in each segment, of one token to all of them, each length as likely (Raffel et al. 2019, arXiv
    1910.10683, section 3.2).

    The segments of a prefix are negative. Its last token's target counts, as the first that is said behind it: each segment has one.
    """

    def __init__(self, causal: CausalSamples) -> None:
        self._causal = causal
        self.stream, self.sequence_length, self.num_samples = causal.stream, causal.sequence_length, causal.num_samples

    def documents(self, number: int) -> list[Piece]:
        return self._causal.documents(number)

    def sample(self, number: int, epoch: int) -> Sample:
        sample = self._causal.sample(number, epoch)
        generator = sample_generator(self._causal.seed, epoch, number, self._causal.source)
        counts = np.bincount(sample.segments)[1:]
        starts = np.cumsum(counts) - counts
        prefixes = generator.integers(1, counts, endpoint=True)
        place = np.arange(counts.sum()) - np.repeat(starts, counts)  # inside its segment
        in_prefix = np.flatnonzero(place < np.repeat(prefixes, counts))
        sample.segments[in_prefix] *= -1
        sample.targets[in_prefix] = np.where(np.isin(in_prefix, starts + prefixes - 1), sample.targets[in_prefix], IGNORED)
        return sample
