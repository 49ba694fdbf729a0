"""Tokens hidden at random for an encoder to predict (Devlin et al. 2018, arXiv 1810.04805)."""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from data.sampling.samples import IGNORED


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """Masking of a share of the tokens, all of which are targets: 80 % become the mask token, 10 % a random token, 10 % stay.

    Section 3.1 of the paper. With `word_edges` (Tokenizer.word_edges) either all tokens of a word are chosen or none, and each draws
    its own replacement, as in the whole-word masking of BERT's later checkpoints.
    """

    rate: float
    class_token: int
    mask_token: int
    end_of_text: int
    is_text: NDArray[np.bool_]
    """True for each id that is not a special token.  [vocab]"""
    word_edges: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None

    @functools.cached_property
    def _text_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.is_text)

    def framed(self, text: NDArray) -> NDArray[np.int64]:
        """Return the class token, the text and end of text."""
        return np.concatenate([[self.class_token], self.ended(text)])

    def ended(self, text: NDArray) -> NDArray[np.int64]:
        """Return the text and end of text, which is not added again if the text ends with it."""
        end = [] if len(text) and text[-1] == self.end_of_text else [self.end_of_text]
        return np.concatenate([text, end]).astype(np.int64)

    def hide(self, tokens: NDArray[np.int64], generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens that the model reads, and the targets.  [n] -> [n], [n]"""
        hidden, targets = tokens.copy(), np.full_like(tokens, IGNORED)
        candidates = np.flatnonzero(self.is_text[tokens])
        if not len(candidates):
            return hidden, targets
        number = max(1, round(self.rate * len(candidates)))
        if self.word_edges:
            chosen = candidates[self._choose_words(tokens, candidates, number, generator)]
        else:
            chosen = generator.choice(candidates, number, replace=False, shuffle=False)
        targets[chosen] = tokens[chosen]
        draw = generator.random(len(chosen))
        hidden[chosen[draw < 0.8]] = self.mask_token
        changed = chosen[(draw >= 0.8) & (draw < 0.9)]
        hidden[changed] = self._text_ids[generator.integers(len(self._text_ids), size=len(changed))]
        return hidden, targets

    def _choose_words(
        self, tokens: NDArray[np.int64], candidates: NDArray[np.int64], number: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return the indices in `candidates` of random words that together have at most `number` tokens.  -> [chosen]

        If every word has more tokens than that, one of the shortest is chosen.
        """
        assert self.word_edges is not None
        begins, ends = self.word_edges
        before = tokens[candidates - 1]  # the class token is before the first
        firsts = np.flatnonzero(begins[tokens[candidates]] | ends[before] | ~self.is_text[before])
        lengths = np.diff(firsts, append=len(candidates))
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
