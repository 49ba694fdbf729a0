"""What an encoder learns: hidden tokens, whether one text follows another (Devlin et al. 2018, arXiv 1810.04805), and labels."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError
from data.sampling.order import sample_generator
from data.sampling.packing import IGNORED, BestFit, Cuts, PackedSamples, Piece, Sample, Samples, encoder_sample
from data.shards import TokenStream


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """Hides a share of the tokens: 80 of 100 become the mask token, 10 any other token, 10 stay, and all are to be told.

    Section 3.1 of the paper. With `word_edges` (Tokenizer.word_edges) all tokens of a word are hidden or none, each drawing for
    itself what it becomes, as in the whole-word masking of BERT's later checkpoints.
    """

    rate: float
    class_token: int
    mask_token: int
    end_of_text: int
    is_text: NDArray[np.bool_]
    """Which ids are no special tokens.  [vocab]"""
    word_edges: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None

    @functools.cached_property
    def _text_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.is_text)

    def framed(self, text: NDArray) -> NDArray[np.int64]:
        """The text behind the class token and before end of text."""
        return np.concatenate([[self.class_token], self.ended(text)])

    def ended(self, text: NDArray) -> NDArray[np.int64]:
        """The text and end of text, which is written once where the text has it."""
        end = [] if len(text) and text[-1] == self.end_of_text else [self.end_of_text]
        return np.concatenate([text, end]).astype(np.int64)

    def hide(self, tokens: NDArray[np.int64], generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What is read in the place of the tokens, and the targets.  [n] -> [n], [n]"""
        hidden, targets = tokens.copy(), np.full_like(tokens, IGNORED)
        places = np.flatnonzero(self.is_text[tokens])
        if not len(places):
            return hidden, targets
        number = max(1, round(self.rate * len(places)))
        if self.word_edges:
            chosen = places[self._of_whole_words(tokens, places, number, generator)]
        else:
            chosen = generator.choice(places, number, replace=False, shuffle=False)
        targets[chosen] = tokens[chosen]
        draw = generator.random(len(chosen))
        hidden[chosen[draw < 0.8]] = self.mask_token
        changed = chosen[(draw >= 0.8) & (draw < 0.9)]
        hidden[changed] = self._text_ids[generator.integers(len(self._text_ids), size=len(changed))]
        return hidden, targets

    def _of_whole_words(
        self, tokens: NDArray[np.int64], places: NDArray[np.int64], number: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Words in random order, passing over what would exceed the number; one of the shortest where each does.  -> numbers of places"""
        begins, ends = self.word_edges
        before = tokens[places - 1]  # the class token is before the first
        firsts = np.flatnonzero(begins[tokens[places]] | ends[before] | ~self.is_text[before])
        lengths = np.diff(firsts, append=len(places))
        sizes, order = lengths.tolist(), generator.permutation(len(firsts)).tolist()
        is_chosen = np.zeros(len(firsts), bool)
        for word in order:
            if sizes[word] <= number:
                is_chosen[word] = True
                number -= sizes[word]
                if not number:
                    break
        if not is_chosen.any():
            is_chosen[min(order, key=sizes.__getitem__)] = True
        return np.flatnonzero(np.repeat(is_chosen, lengths))


class MaskedSamples(Samples):
    """Texts, each `[CLS] text [SEP]`, with tokens hidden, others every epoch; SEP is the end of text. No token is lost over an epoch.

    "packed" joins documents and cuts them, one text a sample, in which documents see one another. "best_fit" packs documents
    without cuts, apart with `document_mask`.
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
        _refuse_short(sequence_length, 3, "masked", "[CLS], a token and [SEP]")
        self.stream, self.sequence_length = stream, sequence_length
        self._masking, self._document_mask, self._token_types = masking, document_mask, token_types
        self._seed, self._source = seed, source
        content, end = sequence_length - 2, masking.end_of_text
        self._is_packed = packing == "packed"
        self._packed = PackedSamples(stream, content, end) if self._is_packed else BestFit(stream, content, marks=2, ends=1)
        self.num_samples = self._packed.num_samples

    def documents(self, number: int) -> list[Piece]:
        return self._packed.documents(number)

    def sample(self, number: int, epoch: int) -> Sample:
        masking = self._masking
        if self._is_packed:
            start = number * (self.sequence_length - 2)
            texts = [self.stream.read(start, min(self.sequence_length - 2, len(self.stream) - start))]
        else:
            pieces = self.documents(number)
            texts = [self.stream.read(self.stream.document_start(piece.document) + piece.first, piece.count) for piece in pieces]
        framed = [masking.framed(text) for text in texts]
        tokens, targets = masking.hide(np.concatenate(framed), sample_generator(self._seed, epoch, number, self._source))
        numbers = np.arange(1, len(framed) + 1) if self._document_mask else np.ones(len(framed), np.int64)
        segments = np.repeat(numbers, [len(one) for one in framed])
        return encoder_sample(self.sequence_length, tokens, segments, targets, np.zeros_like(tokens) if self._token_types else None)


class NextSentenceSamples(Samples):
    """`[CLS] A [SEP] B [SEP]` with tokens hidden: a piece of a document, cut in two at a random place; half of the second parts are
    from another document of the source, and which half is the class: 0 where B follows, 1 where it is another's.

    Token types are 0 up to the first SEP, then 1. What another document takes the place of is not read in that epoch. The other's
    part is as long as what it replaces, or all that there is. A piece of one token has nothing that follows.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, masking: Masking, seed: int = 0, source: int = 0) -> None:
        _refuse_short(sequence_length, 5, "masked with data.next_sentence", "[CLS], a token, [SEP], a token and [SEP]")
        self.stream, self.sequence_length = stream, sequence_length
        self._masking, self._seed, self._source = masking, seed, source
        self._cuts = Cuts(stream, sequence_length - 3)
        self.num_samples = self._cuts.num_pieces
        if self._cuts.num_documents < 2:
            raise UserError(
                f"data.next_sentence takes half of the second parts from another document, but "
                f"{Path(stream.shards[0].prefix).parent} has {self._cuts.num_documents} with text; prepare at least 2."
            )

    def documents(self, number: int) -> list[Piece]:
        return [self._cuts.piece(number)]

    def sample(self, number: int, epoch: int) -> Sample:
        generator = sample_generator(self._seed, epoch, number, self._source)
        piece = self._cuts.piece(number)
        text = self.stream.read(self.stream.document_start(piece.document) + piece.first, piece.count)
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
        length = 0
        while length < 1:  # a document may be without text
            other = int(generator.integers(self.stream.num_documents - 1))
            other += other >= document
            start = self.stream.document_start(other)
            length = self.stream.document_start(other + 1) - 1 - start
        taken = min(most, length)
        return self.stream.read(start + int(generator.integers(length - taken + 1)), taken)


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
        _refuse_short(sequence_length, 3, "classification", "[CLS], a token and [SEP]")
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


def _refuse_short(sequence_length: int, least: int, objective: str, what: str) -> None:
    if sequence_length < least:
        raise UserError(f"model.sequence_length is {sequence_length}; data.objective {objective} needs room for {what}: at least {least}.")
