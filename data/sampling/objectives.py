"""From settings to samples: what an objective asks of tokenizer, folders and model, and what it refuses."""

import dataclasses

import numpy as np

from data.command_line import UserError
from data.sampling.fill_in_the_middle import FillInTheMiddle
from data.sampling.masking import ClassificationSamples, MaskedSamples, Masking, NextSentenceSamples, classes_of
from data.sampling.packing import BestFitSamples, PackedSamples, Samples
from data.sampling.pairs import PairSamples
from data.sampling.prefix import PrefixSamples
from data.sampling.sources import OBJECTIVES, Architecture, SamplingSettings
from data.sampling.span_corruption import SpanCorruptionSamples, num_noise, text_length
from data.shards import PreparedData, TokenStream
from data.tokenization.tokenizer import Tokenizer

_MEANT_FOR = {
    "packing": ("causal", "prefix", "masked"),
    "fim_rate": ("causal",),
    "mask_rate": ("masked", "span_corruption"),
    "whole_words": ("masked",),
    "next_sentence": ("masked",),
    "span_length": ("span_corruption",),
    "target_length": ("pairs",),
    "labels": ("classification",),
    "start_token": ("span_corruption", "pairs"),
    "class_token": ("masked", "classification"),
    "mask_token": ("masked",),
}
"""The objectives that read a setting; another refuses any value but the default."""
_SHOWN_LABELS = 10
"""Of the labels of the first _LOOKED_AT documents, to someone who named none."""
_LOOKED_AT = 1000


class Objective:
    """What the samples of a run ask for, in whichever folder and split. Raises UserError where settings, model and tokenizer do not fit."""

    def __init__(
        self,
        settings: SamplingSettings,
        sequence_length: int,
        document_mask: bool,
        architecture: Architecture,
        token_types: int,
        tokenizer: Tokenizer,
        end_of_text: int,
    ) -> None:
        self.name = settings.objective or OBJECTIVES[architecture][0]
        self._settings, self._tokenizer, self._end_of_text = settings, tokenizer, end_of_text
        self._sequence_length, self._document_mask, self._token_types = sequence_length, document_mask, token_types > 0
        _refuse(settings, self.name, architecture, document_mask, token_types)
        self.fill = _fill_in_the_middle(settings, tokenizer, end_of_text)
        self._start_token = tokenizer.start_token_id(settings.start_token)
        if self.name == "masked":
            self._masking = _masking(settings, tokenizer, end_of_text)
        elif self.name == "span_corruption":
            self._sentinels = _sentinels(settings, sequence_length, tokenizer)
        elif self.name == "classification":
            self._class_token = tokenizer.special_token_id(settings.class_token)

    def samples(self, folder: PreparedData, split: str, seed: int, source: int) -> Samples:
        """To train on."""
        stream, length, end, mask = folder.splits[split], self._sequence_length, self._end_of_text, self._document_mask
        settings, start = self._settings, self._start_token
        if self.name in ("causal", "prefix"):
            kind = {"packed": PackedSamples, "best_fit": BestFitSamples}[settings.packing]
            causal = kind(stream, length, end, mask, self.fill, seed, source)
            return causal if self.name == "causal" else PrefixSamples(causal)
        if self.name == "masked" and settings.next_sentence:
            return NextSentenceSamples(stream, length, self._masking, seed, source)
        if self.name == "masked":
            return MaskedSamples(stream, length, self._masking, settings.packing, mask, self._token_types, seed, source)
        if self.name == "span_corruption":
            return SpanCorruptionSamples(
                stream, length, settings.mask_rate, settings.span_length, self._sentinels, end, start, seed, source
            )
        if not stream.holds_pairs:
            raise UserError(f"{folder.folder} holds single texts; data.objective {self.name} needs pairs: prepare it with --pair_field.")
        if self.name == "pairs":
            target_length = length if settings.target_length is None else settings.target_length
            if target_length > length:
                raise UserError(
                    f"data.target_length is {target_length}; it must be at most model.sequence_length {length}, the longest target that "
                    "the network knows."
                )
            return PairSamples(stream, length, target_length, end, start, seed, source)
        return ClassificationSamples(stream, length, self._classes(folder, split), self._class_token, end, self._token_types)

    def held_out(self, folder: PreparedData, split: str) -> Samples:
        """To measure on: the same for every seed and in every blend; causal text is joined and cut, and none is told out of order."""
        if self.name not in ("causal", "prefix"):
            return self.samples(folder, split, seed=0, source=0)
        causal = PackedSamples(folder.splits[split], self._sequence_length, self._end_of_text, self._document_mask)
        return causal if self.name == "causal" else PrefixSamples(causal)

    def _classes(self, folder: PreparedData, split: str) -> np.ndarray:
        """The class of each document.  -> [documents]"""
        labels, stream = self._settings.labels, folder.splits[split]
        if not labels:
            found = sorted({self._label(stream, document) for document in range(min(stream.num_documents, _LOOKED_AT))})
            raise UserError(
                f"data.objective classification needs data.labels, each label once; the first documents of {folder.folder} have: "
                f"{', '.join(found[:_SHOWN_LABELS])}{', ...' if len(found) > _SHOWN_LABELS else ''}."
            )
        spelt = [tuple(self._tokenizer.encode(label)) for label in labels]
        if alike := [label for number, label in enumerate(labels) if spelt.count(spelt[number]) > 1]:
            raise UserError(f"data.labels {', '.join(alike)} are the same tokens to {self._tokenizer.path}, and cannot be told apart.")
        classes = classes_of(stream, spelt)
        unknown = np.flatnonzero(classes < 0)
        if len(unknown):
            first = int(unknown[0])
            raise UserError(
                f'{folder.folder}, {folder.place_of(split, first)}: the label "{self._label(stream, first)}" is none of data.labels '
                f"({', '.join(labels)}); {len(unknown):,} documents have such a label."
            )
        return classes

    def _label(self, stream: TokenStream, document: int) -> str:
        starts, lengths = stream.sequences(np.array([document]))
        return self._tokenizer.decode(stream.read(int(starts[0, 1]), int(lengths[0, 1]) - 1).tolist())


def _refuse(settings: SamplingSettings, objective: str, architecture: Architecture, document_mask: bool, token_types: int) -> None:
    """Raise UserError where settings contradict one another or the model, with all that is wrong."""
    complaints = []
    if objective not in OBJECTIVES[architecture]:
        allowed = " or ".join(OBJECTIVES[architecture])
        complaints.append(f"data.objective is {objective}; a model.architecture {architecture} learns {allowed}.")
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingSettings)}
    for name, objectives in _MEANT_FOR.items():
        value = getattr(settings, name)
        if value != defaults[name] and objective not in objectives:
            shown = " ".join(value) if isinstance(value, tuple) else value
            complaints.append(f"data.{name} is {shown}; it is for data.objective {' or '.join(objectives)}, and this is {objective}.")
    if not 0 < settings.mask_rate < 1:
        complaints.append(f"data.mask_rate is {settings.mask_rate:g}; it must be above 0 and below 1.")
    if not settings.span_length >= 1:
        complaints.append(f"data.span_length is {settings.span_length:g}; it must be at least 1.")
    if len(set(settings.labels)) < len(settings.labels):
        complaints.append(f"data.labels names a label twice: {' '.join(settings.labels)}.")
    if objective == "masked" and settings.next_sentence:
        if settings.packing == "best_fit":
            complaints.append(
                "data.packing is best_fit; with data.next_sentence a sample is one piece of a document (packed, the default)."
            )
        if document_mask:
            complaints.append("model.document_mask is on; with data.next_sentence both parts of a sample must see one another.")
        if token_types < 2:
            complaints.append(f"model.token_types is {token_types}; data.next_sentence needs 2, to tell both parts of a sample apart.")
    elif objective == "masked" and document_mask and settings.packing == "packed":
        complaints.append(
            "model.document_mask is on, but data.packing packed joins and cuts documents, each of which would need marks of its own to be "
            "masked apart. Set data.packing best_fit, or model.document_mask false."
        )
    if objective == "span_corruption" and document_mask:
        complaints.append("model.document_mask is on; a sample of data.objective span_corruption is one text, whatever it holds.")
    if complaints:
        raise UserError("\n".join(complaints))


def _masking(settings: SamplingSettings, tokenizer: Tokenizer, end_of_text: int) -> Masking:
    ids = [tokenizer.special_token_id(token) for token in (settings.class_token, settings.mask_token)]
    if len({*ids, end_of_text}) != 3:
        raise UserError(
            f"data.class_token is {settings.class_token} and data.mask_token {settings.mask_token}; they must be two tokens, "
            f"neither of them the one that ends a document ({tokenizer.end_of_text_token})."
        )
    is_text = np.ones(tokenizer.vocab_size, bool)
    is_text[[*tokenizer.special_tokens.values(), end_of_text]] = False
    return Masking(settings.mask_rate, *ids, end_of_text, is_text, tokenizer.word_edges() if settings.whole_words else None)


def _sentinels(settings: SamplingSettings, sequence_length: int, tokenizer: Tokenizer) -> list[int]:
    """The ids of as many as a sample has spans, as T5 names them."""
    needed = num_noise(text_length(sequence_length, settings.mask_rate, settings.span_length), settings.mask_rate, settings.span_length)[1]
    known = tokenizer.sentinels
    there = [known[name] for number in range(needed) if (name := f"<extra_id_{number}>") in known]
    if len(there) < needed:
        last = needed - 1
        raise UserError(
            f"data.objective span_corruption needs {needed} sentinels for model.sequence_length {sequence_length}, <extra_id_0> to "
            f"<extra_id_{last}>; {tokenizer.path} has {len(there)} of them. Prepare with T5's tokenizer, which has 100, or have one learnt "
            f"with --special_tokens '<extra_id_'{{0..{last}}}'>'; or set a larger data.span_length."
        )
    return there


def _fill_in_the_middle(settings: SamplingSettings, tokenizer: Tokenizer, end_of_text: int) -> FillInTheMiddle | None:
    if settings.fim_rate == 0:
        return None
    if len(settings.fim_tokens) != 3:
        raise UserError(f"data.fim_tokens has {len(settings.fim_tokens)} tokens; it must be three: before prefix, suffix and middle.")
    fill = FillInTheMiddle(settings.fim_rate, *(tokenizer.special_token_id(token) for token in settings.fim_tokens))
    if len({fill.prefix, fill.suffix, fill.middle, end_of_text}) != 4:
        raise UserError(
            f"data.fim_tokens is {' '.join(settings.fim_tokens)}; it must be three different tokens, "
            f"none of them the one that ends a document (number {end_of_text})."
        )
    return fill
