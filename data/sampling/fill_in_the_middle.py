"""Fill-in-the-middle: a document is told out of order, so that a model learns to write between two texts (arXiv 2207.14255)."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

MARKS = 3
"""The tokens that a transformed piece has more: prefix, suffix, middle."""

_DRAWS = 100
"""How often the choice of each sample that is looked at is drawn, to see how much room it takes."""


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Cuts a share of the pieces of documents at two random places and moves the middle to the end.

    A document is one piece where it lies in one sample, and several where samples divide it: each is chosen for itself.

    Half of the chosen become `<PRE> prefix <SUF> suffix <MID> middle` (PSM), half `<PRE> <SUF> suffix <MID> prefix middle` (SPM), as in
    Bavarian et al. 2022, arXiv 2207.14255, sections 3 and 4.3. No token is lost: the piece gets longer by the three marks.
    """

    rate: float
    """Share of the pieces, 0 to 1."""
    prefix: int
    suffix: int
    middle: int

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UserError(f"The rate of fill-in-the-middle is {self.rate}; it must be at least 0 and at most 1.")

    def spare(self, sequence_length: int, num_pieces: NDArray[np.int64]) -> int:
        """How many pieces of a sample shall have room for their marks, given how many pieces some samples have.  [samples] -> a number

        The least, from one on, with which 98 of 100 chosen pieces find room; in a quarter of a sample at most.
        """
        most = sequence_length // (4 * MARKS)
        if most < 1:
            raise UserError(
                f"sequence_length {sequence_length} is too short for fill-in-the-middle, whose marks may take a quarter of a sample. "
                f"Least: {4 * MARKS}."
            )
        with_room = self._with_room(num_pieces)
        return min(most, max(1, int(np.searchsorted(with_room, 0.98 * with_room[-1]))))

    def filled_share(self, spare: int, num_pieces: NDArray[np.int64]) -> float:
        """The share of all pieces that is expected to be transformed: the rate, less what finds no room.  [samples] -> 0 to 1"""
        with_room = self._with_room(num_pieces)
        without = with_room[-1] - with_room[min(spare, len(with_room) - 1)]
        return float(self.rate - without / (_DRAWS * num_pieces.sum()))

    def _with_room(self, num_pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many chosen pieces find room if a sample has it for none, one, two, ...: all with the last.  [samples] -> [numbers]"""
        chosen = np.random.default_rng(0).binomial(num_pieces, self.rate, (_DRAWS, len(num_pieces)))
        at_least = np.cumsum(np.bincount(chosen.ravel())[::-1])[::-1]  # samples that choose so many or more
        return np.cumsum(at_least) - at_least[0]

    def transform(self, piece: NDArray[np.int64], end_of_text: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """The piece out of order, an end_of_text at its end left there.  [n] -> [n + 3]"""
        ends = len(piece) > 0 and piece[-1] == end_of_text
        text, end = (piece[:-1], piece[-1:]) if ends else (piece, piece[:0])
        before, middle, after = np.split(text, np.sort(generator.integers(len(text) + 1, size=2)))
        if generator.random() < 0.5:
            return np.concatenate([[self.prefix], before, [self.suffix], after, [self.middle], middle, end])
        return np.concatenate([[self.prefix, self.suffix], after, [self.middle], before, middle, end])
