"""Prefix-LM: a causal sample whose documents begin with tokens that see one another and are not asked for."""

import numpy as np

from data.sampling.order import sample_generator
from data.sampling.packing import IGNORED, CausalSamples, Piece, Sample, Samples


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
