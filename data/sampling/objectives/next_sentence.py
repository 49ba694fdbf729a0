"""Pairs of text parts of which the second follows the first or is from another document (Devlin et al. 2018, arXiv 1810.04805)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.masking import Masking
from data.sampling.order import sample_generator
from data.sampling.samples import Piece, Sample, Samples, encoder_sample, require_length
from data.shards import TokenStream

_SUMMED_AT_ONCE = 64
"""Number of documents between two stored sums; finding a piece reads the lengths of this many documents."""


class NextSentenceSamples(Samples):
    """Samples `[CLS] A [SEP] B [SEP]` with hidden tokens. A and B are a piece of a document, cut at a random position.

    In half of the samples B is replaced by text of another document of the source. The class is 0 if B follows A, and 1 if it is from
    another document. Token types are 0 up to the first SEP, then 1. The replaced text is not read in that epoch. The replacement is as
    long as the text that it replaces, or shorter if its document is. A piece of one token always gets a B from another document.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, masking: Masking, seed: int = 0, source: int = 0) -> None:
        require_length(sequence_length, 5, "masked with data.next_sentence", "[CLS], a token, [SEP], a token and [SEP]")
        self.stream, self.sequence_length = stream, sequence_length
        self._masking, self._seed, self._source = masking, seed, source
        self._pieces = DocumentPieces(stream, sequence_length - 3)
        self.num_samples = self._pieces.num_pieces
        if self._pieces.num_documents < 2:
            raise UserError(
                f"data.next_sentence takes half of the second parts from another document, but "
                f"{Path(stream.shards[0].prefix).parent} has {self._pieces.num_documents} with text; prepare at least 2."
            )

    def documents(self, number: int) -> list[Piece]:
        """Return the pieces of documents that a sample holds, in order."""
        return [self._pieces.piece(number)]

    def sample(self, number: int, epoch: int) -> Sample:
        """Return sample `number`, counted from 0, as it is in an epoch."""
        generator = sample_generator(self._seed, epoch, number, self._source)
        piece = self._pieces.piece(number)
        text = self.stream.read(self.stream.document_start(piece.document) + piece.first, piece.num_tokens)
        cut = int(generator.integers(1, max(2, len(text))))
        second = text[cut:]
        is_another = generator.random() < 0.5 or not len(second)
        if is_another:
            second = self._from_another(piece.document, len(second) or self.sequence_length - 4, generator)
        parts = self._masking.framed(text[:cut]), self._masking.ended(second)
        tokens, targets = self._masking.hide(np.concatenate(parts), generator)
        token_types = np.repeat([0, 1], [len(part) for part in parts])
        return encoder_sample(self.sequence_length, tokens, np.ones_like(tokens), targets, token_types, np.int64(is_another))

    def _from_another(self, document: int, most: int, generator: np.random.Generator) -> NDArray:
        """Return at most `most` consecutive tokens of a random other document."""
        length = 0
        while length < 1:  # a document may have no text
            other = int(generator.integers(self.stream.num_documents - 1))
            other += other >= document
            start = self.stream.document_start(other)
            length = self.stream.document_start(other + 1) - 1 - start
        taken = min(most, length)
        return self.stream.read(start + int(generator.integers(length - taken + 1)), taken)


class DocumentPieces:
    """All documents without their ends, cut into pieces of `content` tokens and a shorter last piece; pieces are found by number.

    Memory: 8 bytes for every _SUMMED_AT_ONCE documents.
    """

    def __init__(self, stream: TokenStream, content: int) -> None:
        self._stream, self._content = stream, content
        counts = self._counts(0, stream.num_documents)
        sums = np.add.reduceat(counts, np.arange(0, len(counts), _SUMMED_AT_ONCE))
        self._before = np.cumsum(sums) - sums
        self.num_pieces = int(counts.sum())
        self.num_documents = int((counts > 0).sum())
        """Number of documents that have text."""

    def piece(self, number: int) -> Piece:
        """Return a piece by its number."""
        block = int(np.searchsorted(self._before, number, side="right")) - 1
        first = block * _SUMMED_AT_ONCE
        ends = np.cumsum(self._counts(first, first + _SUMMED_AT_ONCE))
        number -= int(self._before[block])
        document = int(np.searchsorted(ends, number, side="right"))
        start = (number - (int(ends[document - 1]) if document else 0)) * self._content
        length = int(self._stream.document_lengths(first + document, first + document + 1)[0]) - 1
        return Piece(first + document, start, min(self._content, length - start))

    def _counts(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the number of pieces of each document.  -> [documents]"""
        return -(-np.maximum(self._stream.document_lengths(first, last) - 1, 0) // self._content)
