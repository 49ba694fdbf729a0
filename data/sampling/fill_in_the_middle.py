"""Fill-in-the-middle: the parts of a document are reordered, so that a model learns to write between two texts (arXiv 2207.14255)."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

MARKS = 3
"""Number of special tokens that are added to a transformed piece: prefix, suffix, middle."""

_DRAWS = 100
"""Number of times that the choice of pieces is drawn for each probed sample, to estimate the room that it takes."""


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """The transformation that cuts a share of the pieces of documents at two random positions and moves the middle to the end.

    A document is one piece if it lies in one sample, and several pieces if samples divide it; each piece is chosen independently.

    Half of the chosen pieces become `<PRE> prefix <SUF> suffix <MID> middle` (PSM), the other half
    `<PRE> <SUF> suffix <MID> prefix middle` (SPM), as in Bavarian et al. 2022, arXiv 2207.14255, sections 3 and 4.3. No token is lost:
    the piece gets longer by the three special tokens.
    """

    rate: float
    """Share of the pieces, 0 to 1."""
    prefix: int
    """Id of the special token before the prefix."""
    suffix: int
    """Id of the special token before the suffix."""
    middle: int
    """Id of the special token before the middle."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UserError(f"The rate of fill-in-the-middle is {self.rate}; it must be at least 0 and at most 1.")

    def spare(self, sequence_length: int, num_pieces: NDArray[np.int64]) -> int:
        """Return for how many pieces a sample keeps room for special tokens, given the pieces of some samples.  [samples] -> a number

        It is the smallest number, from 1, with which 98 % of the chosen pieces find room, and at most a quarter of a sample.
        """
        most = sequence_length // (4 * MARKS)
        if most < 1:
            raise UserError(
                f"model.sequence_length {sequence_length} is too short for fill-in-the-middle (data.fim_rate), whose special tokens "
                f"may take a quarter of a sample. Use {4 * MARKS} or more."
            )
        with_room = self._with_room(num_pieces)
        return min(most, max(1, int(np.searchsorted(with_room, 0.98 * with_room[-1]))))

    def filled_share(self, spare: int, num_pieces: NDArray[np.int64]) -> float:
        """Return the expected share of transformed pieces: the rate less the pieces without room.  [samples] -> 0 to 1"""
        with_room = self._with_room(num_pieces)
        without = with_room[-1] - with_room[min(spare, len(with_room) - 1)]
        return float(self.rate - without / (_DRAWS * num_pieces.sum()))

    def _with_room(self, num_pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many chosen pieces find room if each sample has room for 0, 1, 2, ... of them.  [samples] -> [numbers]

        With the last number all find room.
        """
        chosen = np.random.default_rng(0).binomial(num_pieces, self.rate, (_DRAWS, len(num_pieces)))
        at_least = np.cumsum(np.bincount(chosen.ravel())[::-1])[::-1]  # samples that choose this many or more
        return np.cumsum(at_least) - at_least[0]

    def transform(self, piece: NDArray[np.int64], end_of_text: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return the piece in the new order; end_of_text stays at its end.  [n] -> [n + 3]"""
        ends = len(piece) > 0 and piece[-1] == end_of_text
        text, end = (piece[:-1], piece[-1:]) if ends else (piece, piece[:0])
        before, middle, after = np.split(text, np.sort(generator.integers(len(text) + 1, size=2)))
        if generator.random() < 0.5:
            return np.concatenate([[self.prefix], before, [self.suffix], after, [self.middle], middle, end])
        return np.concatenate([[self.prefix, self.suffix], after, [self.middle], before, middle, end])
