"""Fill-in-the-middle: a document is told out of order, so that a model learns to write between two texts (arXiv 2207.14255)."""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from data.command_line import UserError

MARKS = 3
"""The tokens that a transformed fragment has more: prefix, suffix, middle."""


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Cuts a share of the fragments of documents at two random places and moves the middle to the end.

    Half of them become `<PRE> prefix <SUF> suffix <MID> middle` (PSM), half `<PRE> <SUF> suffix <MID> prefix middle` (SPM), as in
    Bavarian et al. 2022, arXiv 2207.14255, sections 3 and 4.3. No token is lost: the fragment gets longer by the three marks.
    """

    rate: float
    """Share of the fragments, 0 to 1."""
    prefix: int
    suffix: int
    middle: int

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UserError(f"The rate of fill-in-the-middle is {self.rate}; it must be at least 0 and at most 1.")

    def spare(self, sequence_length: int, mean_document_tokens: float) -> int:
        """How many fragments of a sample can be transformed: as many as are likely to be chosen, in at most a quarter of the sample."""
        if self.rate == 0:
            return 0
        most = sequence_length // (4 * MARKS)
        if most < 1:
            raise UserError(
                f"sequence_length {sequence_length} is too short for fill-in-the-middle, whose marks may take a quarter of a sample. "
                f"Least: {4 * MARKS}."
            )
        return min(most, math.ceil(self.rate * (1 + sequence_length / mean_document_tokens)) + 1)

    def transform(self, fragment: NDArray[np.int64], end_of_text: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """The fragment out of order, an end_of_text at its end left there.  [n] -> [n + 3]"""
        ends = len(fragment) > 0 and fragment[-1] == end_of_text
        text, end = (fragment[:-1], fragment[-1:]) if ends else (fragment, fragment[:0])
        before, middle, after = np.split(text, np.sort(generator.integers(len(text) + 1, size=2)))
        if generator.random() < 0.5:
            return np.concatenate([[self.prefix], before, [self.suffix], after, [self.middle], middle, end])
        return np.concatenate([[self.prefix, self.suffix], after, [self.middle], before, middle, end])


def sample_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The draws of one sample: the same on any rank and after any resume, others in the next epoch."""
    # The two low words of the counter are left to the draws.
    key, counter = [seed % 2**64, epoch], [0, 0, sample, 0]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))
