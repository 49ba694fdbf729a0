"""The settings that decide which samples a run reads."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

ObjectiveName = Literal["causal", "prefix", "masked", "span_corruption", "pairs", "classification"]
Architecture = Literal["decoder", "encoder", "encoder_decoder"]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """The prepared folders that a run reads, and how their documents become samples."""

    path: tuple[str, ...] = ("prepared",)
    """Folder that data/prepare.py wrote, or several folders to blend."""
    weights: tuple[float, ...] = ()
    """Share of each folder in the samples, in any unit (default: proportional to the number of samples of each folder)."""
    packing: Literal["packed", "best_fit"] = "packed"
    """How documents fill samples. packed: joined, and cut where a sample is full; best_fit: a document that fits into one sample is
    not cut, which costs a little padding. Without model.document_mask the documents of a sample see one another either way."""
    fim_rate: Annotated[float, Ge(0), Le(1)] = 0.0
    """Fill-in-the-middle: share of the pieces of documents whose middle is moved to their end (Bavarian et al. 2022, arXiv 2207.14255).
    A document is one piece if it lies in one sample, and several pieces if samples divide it."""
    fim_tokens: tuple[str, ...] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    """Fill-in-the-middle: special tokens before the prefix, the suffix and the middle of a piece."""
    objective: ObjectiveName | None = None
    """Training objective (default: causal for a decoder, masked for an encoder, span_corruption for an encoder_decoder). causal: predict
    the next token; prefix: the same after a prefix whose tokens see one another; masked: predict hidden tokens; span_corruption: write
    the spans that were cut out; pairs: write the second text of each document, given the first; classification: predict the label of
    each document (--pair_field of data/prepare.py)."""
    mask_rate: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of the tokens that masked hides (ModernBERT: 0.3) or span_corruption cuts out, above 0 and below 1."""
    whole_words: bool = False
    """masked: hide either all tokens of a word or none."""
    next_sentence: bool = False
    """masked: also predict whether the second part of a sample follows the first (class 0) or comes from another document (class 1)."""
    span_length: Annotated[float, Ge(1)] = 3.0
    """span_corruption: mean length of a span in tokens, at least 1."""
    target_length: int | None = None
    """pairs: tokens of the second texts in a sample (default: model.sequence_length, which is the length of the first texts)."""
    labels: tuple[str, ...] = ()
    """classification: the labels, spelled as in the data. The index of a label, from 0, is its class."""
    start_token: str | None = None
    """span_corruption and pairs: special token that the decoder reads before the first target (default: the end-of-text token).
    Weights of published T5 and Marian models need <pad>."""
    class_token: str = "[CLS]"
    """masked and classification: special token before each text."""
    mask_token: str = "[MASK]"
    """masked: special token that replaces a hidden token."""
