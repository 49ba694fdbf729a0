"""Sequence to sequence: writing the second text of each document, given the first; several pairs share a sample."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.objectives.base import ModelShape, Objective
from data.sampling.order import permute
from data.sampling.samples import Piece, Sample, Samples, encoder_decoder_sample
from data.sampling.settings import SamplingSettings
from data.shards import PreparedData, TokenStream
from data.tokenization.tokenizer import Tokenizer


class Pairs(Objective):
    """The objective that writes the second text of each document, given the first."""

    name = "pairs"
    architecture = "encoder_decoder"
    own_settings = ("target_length", "start_token")
    reads_pairs = True

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        super().__init__(settings, model, tokenizer, end_of_text)
        self._start_token = tokenizer.start_token_id(settings.start_token)

    @classmethod
    def complaints(cls, settings: SamplingSettings, model: ModelShape) -> list[str]:
        """Return one sentence for each setting that contradicts another one or the model."""
        target, source = settings.target_length, model.sequence_length
        if target is None or target <= source:
            return []
        return [f"data.target_length is {target}; it must be at most model.sequence_length {source}, the longest target of the model."]

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """Return the training samples of a split."""
        stream, length, target = folder.splits[split], self.model.sequence_length, self.settings.target_length
        return PairSamples(stream, length, length if target is None else target, self.end_of_text, self._start_token, seed, source)

    def _summary(self, samples: Sequence[Samples]) -> str:
        pairs = sum(one.stream.num_documents for one in samples)
        return f"{pairs / sum(one.num_samples for one in samples):.1f} pairs in a sample on average, separated by mask"


class PairSamples(Samples):
    """Pairs of texts, as many in a sample as both sides have room for; each pair is a segment.

    The pairs that share a sample are drawn once from the whole source, because neighbours in a corpus are similar. Each text ends with
    end_of_text; a text that is too long for a sample is cut and gets that end too. The decoder reads `start_token` first in each pair.
    Memory: 4 bytes a pair and 8 a sample.
    """

    target_length: int
    start_token: int

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        target_length: int,
        end_of_text: int,
        start_token: int,
        seed: int = 0,
        source: int = 0,
    ) -> None:
        for name, length in (("model.sequence_length", sequence_length), ("data.target_length", target_length)):
            if length < 2:
                raise UserError(f"{name} is {length}; data.objective pairs needs room for a token and its end: at least 2.")
        self.stream, self.sequence_length, self.target_length = stream, sequence_length, target_length
        self._end_of_text, self.start_token = end_of_text, start_token
        self._most = np.array([sequence_length, target_length], np.int32)
        number = stream.num_documents
        self._order = permute(np.arange(number), number, seed, 0, source).astype(np.int32)
        lengths = stream.sequence_lengths[self._order]
        self.num_cut = int((lengths > self._most).any(axis=1).sum())
        taken = np.minimum(lengths, self._most)
        self._num_taken = int(taken.sum())
        self._firsts = _pack(taken, self._most)
        self.num_samples = len(self._firsts) - 1

    @property
    def padding_share(self) -> float:
        """Share of all positions that hold no token of a document."""
        return 1 - self._num_taken / (self.num_samples * int(self._most.sum()))

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        documents = self._documents(number)
        lengths = np.minimum(self.stream.sequences(documents)[1], self._most).sum(axis=1)
        return [Piece(document, 0, length) for document, length in zip(documents.tolist(), lengths.tolist(), strict=True)]

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        starts, lengths = self.stream.sequences(self._documents(number))
        taken = np.minimum(lengths, self._most)
        source, targets = (self._joined(starts[:, side], taken[:, side]) for side in (0, 1))
        segments = np.arange(1, len(taken) + 1)
        return encoder_decoder_sample(
            self.sequence_length,
            self.target_length,
            self.start_token,
            source,
            np.repeat(segments, taken[:, 0]),
            targets,
            np.repeat(segments, taken[:, 1]),
        )

    def _documents(self, number: int) -> NDArray[np.int64]:
        return self._order[self._firsts[number] : self._firsts[number + 1]].astype(np.int64)

    def _joined(self, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `counts` tokens from each start, the last of them replaced by end of text.  [pairs], [pairs] -> [tokens]"""
        ends = np.cumsum(counts)
        tokens = self.stream.gather(np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts))
        tokens[ends - 1] = self._end_of_text
        return tokens


def _pack(lengths: NDArray[np.int32], most: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the first pair of each sample, if each takes as many as fit, and the number of pairs.  [pairs, 2], [2] -> [samples + 1]"""
    after = np.minimum(*(_first_beyond(lengths[:, side], most[side]) for side in (0, 1))).data
    firsts = [0]
    while firsts[-1] < len(after):
        firsts.append(after[firsts[-1]])
    return np.array(firsts)


def _first_beyond(lengths: NDArray[np.int32], most: np.int32) -> NDArray[np.int64]:
    """Return, for each text, the first text that does not fit into a sample that begins with it.  [pairs] -> [pairs]"""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.searchsorted(ends, ends - lengths + most, side="right")
