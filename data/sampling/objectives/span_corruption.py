"""Span corruption: writing the spans that were cut out of a text (T5; Raffel et al. 2019, arXiv 1910.10683)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.objectives.base import ModelShape, Objective
from data.sampling.order import sample_generator
from data.sampling.packing import PackedSamples
from data.sampling.samples import Piece, Sample, Samples, encoder_decoder_sample
from data.sampling.settings import SamplingSettings
from data.shards import PreparedData, TokenStream
from data.tokenization.tokenizer import Tokenizer


class SpanCorruption(Objective):
    """The objective that writes the spans that were cut out of a text, given the rest of it."""

    name = "span_corruption"
    architecture = "encoder_decoder"
    own_settings = ("mask_rate", "span_length", "start_token")

    def __init__(self, settings: SamplingSettings, model: ModelShape, tokenizer: Tokenizer, end_of_text: int) -> None:
        super().__init__(settings, model, tokenizer, end_of_text)
        self._start_token = tokenizer.start_token_id(settings.start_token)
        self._sentinels = _sentinels(settings, model.sequence_length, tokenizer)

    @classmethod
    def complaints(cls, settings: SamplingSettings, model: ModelShape) -> list[str]:
        """Return one sentence for each setting that contradicts another one or the model."""
        if not model.document_mask:
            return []
        return ["model.document_mask is on; a sample of data.objective span_corruption is one text of joined documents. Set it false."]

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """Return the training samples of a split."""
        settings = self.settings
        return SpanCorruptionSamples(
            folder.splits[split],
            self.model.sequence_length,
            settings.mask_rate,
            settings.span_length,
            self._sentinels,
            self.end_of_text,
            self._start_token,
            seed,
            source,
        )

    def _summary(self, samples: Sequence[Samples]) -> str:
        settings = self.settings
        return f"documents joined and cut, {settings.mask_rate:.3g} of the tokens cut out in spans of {settings.span_length:g} on average"


def num_noise(num_tokens: int, rate: float, span_length: float) -> tuple[int, int]:
    """Return how many of `num_tokens` tokens are cut out, and in how many spans. Some token is always kept, the first one too."""
    noise = min(max(round(num_tokens * rate), 1), num_tokens - 1)
    return noise, min(max(round(noise / span_length), 1), noise, num_tokens - noise)


def lengths_of(num_tokens: int, rate: float, span_length: float) -> tuple[int, int]:
    """Return the lengths of source and target of `num_tokens` tokens: both have a sentinel a span and end with end of text."""
    noise, spans = num_noise(num_tokens, rate, span_length)
    return num_tokens - noise + spans + 1, noise + spans + 1


def text_length(source_length: int, rate: float, span_length: float) -> int:
    """Return the largest number of tokens whose source has at most `source_length` tokens. Raises UserError if even one is too many."""
    if lengths_of(1, rate, span_length)[0] > source_length:
        raise UserError(
            f"model.sequence_length is {source_length}; data.objective span_corruption needs room for a token and its end: at least 2."
        )
    fits, too_many = 1, 2
    while lengths_of(too_many, rate, span_length)[0] <= source_length:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:  # bisection: a source grows with its text
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if lengths_of(middle, rate, span_length)[0] <= source_length else (fits, middle)
    return fits


class SpanCorruptionSamples(Samples):
    """Documents joined and cut into texts of one length, whose source fills a sample: section 3.1.4 of the paper, figure 2.

    The source is the text with a sentinel in place of each span. The target is each sentinel followed by its span. Both end with
    end_of_text, and the decoder reads `start_token` first. The lengths of the spans and of the text between them are random, but their
    numbers and sums are not, so that all sources and all targets are equally long. The exception is a text that ends with a document:
    its end of text is written once. A text of a single token is kept.
    """

    target_length: int
    start_token: int

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        rate: float,
        span_length: float,
        sentinels: Sequence[int],
        end_of_text: int,
        start_token: int,
        seed: int = 0,
        source: int = 0,
    ) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self._rate, self._span_length = rate, span_length
        self._sentinels, self._end_of_text, self.start_token = np.array(sentinels, np.int64), end_of_text, start_token
        self._seed, self._source = seed, source
        self._content = text_length(sequence_length, rate, span_length)
        self.target_length = lengths_of(self._content, rate, span_length)[1]
        self._windows = PackedSamples(stream, self._content, end_of_text)
        self.num_samples = self._windows.num_samples

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        return self._windows.documents(number)

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        start = number * self._content
        text = self.stream.read(start, min(self._content, len(self.stream) - start)).astype(np.int64)
        if len(text) > 1 and text[-1] == self._end_of_text:
            text = text[:-1]
        generator = sample_generator(self._seed, epoch, number, self._source)
        noise, spans = num_noise(len(text), self._rate, self._span_length)
        kept, cut = _partition(len(text) - noise, spans, generator), _partition(noise, spans, generator)
        parts = np.split(text, np.cumsum(np.stack([kept, cut], axis=1))[:-1])  # kept, cut, kept, cut, ...
        sentinels, rest, end = self._sentinels[:spans, None], parts[2 * spans :], [[self._end_of_text]]
        source = np.concatenate([part for pair in zip(parts[0::2], sentinels, strict=False) for part in pair] + rest + end)
        targets = np.concatenate([part for pair in zip(sentinels, parts[1::2], strict=True) for part in pair] + end)
        ones = np.ones_like
        return encoder_decoder_sample(
            self.sequence_length, self.target_length, self.start_token, source, ones(source), targets, ones(targets)
        )


def _partition(num_tokens: int, num_parts: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return random lengths of non-empty parts; every division is equally likely.  -> [num_parts]"""
    if not num_parts:
        return np.zeros(0, np.int64)
    cuts = np.sort(generator.choice(num_tokens - 1, num_parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts, prepend=0, append=num_tokens)


def _sentinels(settings: SamplingSettings, sequence_length: int, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of as many sentinels as a sample has spans, by T5's names."""
    needed = num_noise(text_length(sequence_length, settings.mask_rate, settings.span_length), settings.mask_rate, settings.span_length)[1]
    known = tokenizer.sentinels
    ids = [known[name] for number in range(needed) if (name := f"<extra_id_{number}>") in known]
    if len(ids) < needed:
        last = needed - 1
        raise UserError(
            f"data.objective span_corruption needs {needed} sentinels for model.sequence_length {sequence_length}, <extra_id_0> to "
            f"<extra_id_{last}>; {tokenizer.path} has {len(ids)} of them. Prepare with T5's tokenizer, which has 100, or learn one "
            f"with --special_tokens '<extra_id_'{{0..{last}}}'>'; or set a larger data.span_length."
        )
    return ids
