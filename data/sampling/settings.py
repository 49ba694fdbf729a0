"""The settings that decide which samples a run reads."""

import dataclasses
from typing import Literal

ObjectiveName = Literal["causal", "prefix", "masked", "span_corruption", "pairs", "classification"]
Architecture = Literal["decoder", "encoder", "encoder_decoder"]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    path: tuple[str, ...] = ("prepared",)
    """Folder that data/prepare.py wrote, or several to blend."""
    weights: tuple[float, ...] = ()
    """Share of each folder in the samples, in any unit (default: what each holds)."""
    packing: Literal["packed", "best_fit"] = "packed"
    """How documents fill samples: joined and cut where a sample is full, or, for a little padding, none cut that fits into one.
    Without model.document_mask those of a sample see one another either way."""
    fim_rate: float = 0.0
    """Share of the pieces of documents whose middle is moved to their end, to be filled in (Bavarian et al. 2022, arXiv 2207.14255).
    A document is one piece if it lies in one sample, and several if samples divide it."""
    fim_tokens: tuple[str, ...] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    """Special tokens of the tokenizer before prefix, suffix and middle of such a document."""
    objective: ObjectiveName | None = None
    """What a sample asks for (default: causal for a decoder, masked for an encoder, span_corruption for an encoder_decoder). causal: the
    next token; prefix: the same behind a prefix whose tokens see one another; masked: tokens that were hidden; span_corruption: spans
    that were cut out; pairs: the second text of each document, given the first; classification: its label (--pair_field of
    data/prepare.py)."""
    mask_rate: float = 0.15
    """Share of the tokens that masked hides (ModernBERT: 0.3) or span_corruption cuts out, above 0 and below 1."""
    whole_words: bool = False
    """masked hides all tokens of a word or none."""
    next_sentence: bool = False
    """Beside masked: whether the second part of a sample follows the first, or is from another document, is its class (1: another)."""
    span_length: float = 3.0
    """Tokens of a span that span_corruption cuts out, on average; at least 1."""
    target_length: int | None = None
    """Tokens of the second texts in a sample of pairs (default: model.sequence_length, which is that of the first texts)."""
    labels: tuple[str, ...] = ()
    """Labels of classification, as they stand in the data; a label's place, from 0, is its class."""
    start_token: str | None = None
    """Special token that a decoder reads before the first target of span_corruption and pairs (default: the one that ends a text).
    Weights of published T5 and Marian models need <pad>."""
    class_token: str = "[CLS]"
    """Special token before each text that an encoder reads."""
    mask_token: str = "[MASK]"
    """Special token in the place of a hidden one."""
