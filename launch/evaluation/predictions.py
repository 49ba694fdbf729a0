"""Predictions for texts: a continuation, the target of a source, a text with its masks filled, or a class."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.command_line import UserError
from data.tokenization.configuration import read_configuration, read_json_object, token_content
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import LoadedModel, OpenedModel
from model.generation import beam_search, fill_mask, generate

_SORTED_BATCHES = 100  # number of batches whose texts are in memory, sorted by length, at a time


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of special tokens and labels that a model was trained with."""

    class_token: str = "[CLS]"
    mask_token: str = "[MASK]"
    labels: tuple[str, ...] = ()


def names_of(opened: OpenedModel) -> Names:
    """Return the names from the files of a Hugging Face folder, or from the recipe of the run."""
    given: dict
    if opened.step is None:
        labels = read_json_object(opened.folder / "config.json").get("id2label", {})
        special = read_configuration(opened.folder)
        given = {
            "class_token": token_content(special.get("cls_token")),
            "mask_token": token_content(special.get("mask_token")),
            "labels": [labels[index] for index in sorted(labels, key=int)],
        }
    else:
        given = opened.recipe.get("data", {})
    known: dict = {field.name: given[field.name] for field in dataclasses.fields(Names) if given.get(field.name)}
    return Names(**known | {"labels": tuple(known.get("labels", ()))})


class Predictor:
    """Base class of predictors: it encodes texts to ids, and a subclass turns a batch of ids into one line of text each."""

    def __init__(self, trained: LoadedModel, tokenizer: Tokenizer, device: str):
        self.model, self.config, self.tokenizer, self.device = trained.model.to(device), trained.config, tokenizer, device
        self.num_cut = 0
        """Number of texts that were longer than the model's context and were cut at their end."""

    def encode(self, text: str) -> list[int]:
        """Return the ids that the network reads for a text."""
        raise NotImplementedError

    def predict(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the prediction for each row of ids, as one line."""
        raise NotImplementedError

    def describe(self, text: str) -> str:
        """Return the prediction for one text with its details, in one or several lines."""
        return self.predict([self.encode(text)])[0]

    def stream(self, text: str) -> Iterator[str]:
        """Yield the prediction for one text in pieces, as they are ready to print."""
        yield self.describe(text) + "\n"

    def predict_lines(self, texts: Iterable[str], batch_size: int, progress: Callable[[int], object]) -> Iterator[str]:
        """Yield a line for each text, in order; texts of similar length are in one batch. The line of an empty text is empty."""
        texts = iter(texts)
        while some := list(itertools.islice(texts, _SORTED_BATCHES * batch_size)):
            lines = dict.fromkeys(range(len(some)), "")
            rows = {index: self.encode(text) for index, text in enumerate(some) if text.strip()}
            by_length = sorted(rows, key=lambda index: len(rows[index]), reverse=True)
            for first in range(0, len(by_length), batch_size):
                batch = by_length[first : first + batch_size]
                lines |= zip(batch, self.predict([rows[index] for index in batch]), strict=True)
                progress(len(batch))
            progress(len(some) - len(rows))
            yield from (re.sub(r"[\r\n]+", " ", line) for line in lines.values())

    def _framed(self, text: str, special: Mapping[str, int], before: Sequence[int] = ()) -> list[int]:
        """Return `before`, the ids of a text, and end of text. A name of `special` in the text, with the spaces before it, is its id."""
        parts = re.split(rf"\s*({'|'.join(map(re.escape, special))})", text) if special else [text]
        ids = [id for part in parts if part for id in ([special[part]] if part in special else self.tokenizer.encode(part))]
        room = self.config.sequence_length - len(before) - 1
        self.num_cut += len(ids) > room
        return [*before, *ids[:room], self.tokenizer.end_of_text]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return tokens and segments, [batch, seq] each."""
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        segments = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        return tokens.to(self.device), segments.to(self.device)


class Continuation(Predictor):
    """Continuations of a prompt by a decoder."""

    def __init__(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, sampling: dict):
        """`sampling` holds options of model.generation.generate."""
        super().__init__(trained, tokenizer, device)
        self.sampling = sampling

    def encode(self, text: str) -> list[int]:
        """Return the ids of the prompt, which begins like a document; an empty prompt without a beginning is the end of the text before.

        The name of a special token in the prompt is encoded as text.
        """
        return self.tokenizer.encode_beginning(text) or [self.tokenizer.end_of_text]

    def stream(self, text: str) -> Iterator[str]:
        """Yield the prompt and its continuation as it is generated; the bytes of a character that is not complete yet are held back."""
        ids = self.encode(text)
        end = self.tokenizer.end_of_text
        new_ids = generate(
            self.model,
            torch.tensor([ids], device=self.device),
            **self.sampling,
            stop=end,
            sequence_length=self.config.sequence_length,
            vocab_size=self.tokenizer.vocab_size,
            prefix_attention=self.config.prefix_attention,
        )
        yield text
        printed = len(self.tokenizer.decode(ids))
        for id in new_ids:
            if int(id[0]) == end:
                break
            ids.append(int(id[0]))
            written = self.tokenizer.decode(ids)
            if not written.endswith("\N{REPLACEMENT CHARACTER}"):
                yield written[printed:]
                printed = len(written)
        yield "\n"


class TargetText(Predictor):
    """Targets that an encoder-decoder writes for sources. The sentinels of T5's spans are read and written by their names."""

    def __init__(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, search: dict, sampling: dict | None = None):
        """`search` holds options of beam_search; `sampling` holds options of generate, which is used instead if they are given."""
        super().__init__(trained, tokenizer, device)
        self.search, self.sampling = search, sampling
        self.num_batches = 0
        self.start = trained.start_token(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the source and end of text."""
        return self._framed(text, self.tokenizer.sentinels)

    def predict(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the target of each source."""
        source, segments = self._padded(rows)
        end = self.tokenizer.end_of_text
        limits: dict = {"sequence_length": self.config.sequence_length, "vocab_size": self.tokenizer.vocab_size}
        if self.sampling is None:
            hypotheses = beam_search(self.model, source, segments, self.start, end, **self.search, **limits)
            return [self._text(hypothesis.tokens) for hypothesis in hypotheses]
        start = torch.full((len(rows), 1), self.start, device=self.device)
        options = self.sampling | {"seed": self.sampling["seed"] + self.num_batches, "stop": end}
        self.num_batches += 1
        new_ids = generate(functools.partial(self.model, source, segments), start, **options, **limits)
        written = torch.stack(list(itertools.islice(new_ids, self.config.sequence_length)), dim=1).tolist()
        return [self._text(itertools.takewhile(lambda id: id != end, row)) for row in written]

    def _text(self, ids: Iterable[int]) -> str:
        names = {id: name for name, id in self.tokenizer.sentinels.items()}
        runs = itertools.groupby(ids, key=lambda id: id in names)
        return "".join("".join(names[id] for id in run) if is_name else self.tokenizer.decode(list(run)) for is_name, run in runs)


class EncoderPredictor(Predictor):
    """Base class for encoders, which read the class token, a text, and end of text, all with token type 0."""

    def __init__(self, trained: LoadedModel, tokenizer: Tokenizer, device: str):
        super().__init__(trained, tokenizer, device)
        self.names = names_of(trained)
        self.class_token = tokenizer.special_token_id(self.names.class_token)

    def encode(self, text: str) -> list[int]:
        """Return the class token, the ids of the text, and end of text."""
        return self._framed(text, {}, [self.class_token])

    def inputs(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Return what the network is called with: tokens, segments and, if the model has them, token types.  [batch, seq] each"""
        tokens, segments = self._padded(rows)
        return (tokens, segments, torch.zeros_like(tokens)) if self.config.token_types else (tokens, segments)


class FilledMasks(EncoderPredictor):
    """Texts whose masks an encoder fills with the most likely tokens."""

    def __init__(self, trained: LoadedModel, tokenizer: Tokenizer, device: str, top_k: int):
        """`top_k` is the number of tokens that describe() shows for each mask."""
        super().__init__(trained, tokenizer, device)
        self.mask, self.top_k = tokenizer.special_token_id(self.names.mask_token), top_k

    def encode(self, text: str) -> list[int]:
        """Return the class token, the ids of the text with its masks, and end of text."""
        return self._framed(text, {self.names.mask_token: self.mask}, [self.class_token])

    def predict(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return each text with its masks filled."""
        filled = iter(self._filled(rows, 1)[0].flatten().tolist())
        return [self.tokenizer.decode([next(filled) if id == self.mask else id for id in row[1:-1]]) for row in rows]

    def describe(self, text: str) -> str:
        """Return a block for each mask: probability and text of the most likely tokens, the most likely first."""
        row = self.encode(text)
        if self.mask not in row:
            part = " that fits the model's context" if self.num_cut else ""
            raise UserError(f"The text{part} has no {self.names.mask_token} for the encoder to fill: {text[:80]!r}.")
        blocks = []
        for number, (ids, probabilities) in enumerate(zip(*map(Tensor.tolist, self._filled([row], self.top_k)), strict=True), start=1):
            likeliest = [f"{100 * p:5.1f} %  {self._token_text(id)}" for id, p in zip(ids, probabilities, strict=True)]
            blocks.append("\n".join([f"{self.names.mask_token} {number}", *likeliest]))
        return "\n".join(blocks)

    def _token_text(self, id: int) -> str:
        text = self.tokenizer.decode([id])
        return text.strip() or repr(text)

    def _filled(self, rows: Sequence[Sequence[int]], top_k: int) -> tuple[Tensor, Tensor]:
        return fill_mask(self.model, *self.inputs(rows), mask=self.mask, top_k=top_k, vocab_size=self.tokenizer.vocab_size)


class Classes(EncoderPredictor):
    """Classes of texts, by label if the model has labels, otherwise by index."""

    def predict(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the most likely class of each text."""
        return [self._labels[index] for index in self._probabilities(rows).argmax(dim=1).tolist()]

    def describe(self, text: str) -> str:
        """Return each class with its probability, the most likely first."""
        probabilities, indices = self._probabilities([self.encode(text)])[0].sort(descending=True)
        ordered = zip(probabilities.tolist(), indices.tolist(), strict=True)
        return "\n".join(f"{100 * p:5.1f} %  {self._labels[index]}" for p, index in ordered)

    @property
    def _labels(self) -> Sequence[str]:
        indices = [str(index) for index in range(self.config.num_classes)]
        return self.names.labels if len(self.names.labels) == len(indices) else indices

    def _probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        with torch.no_grad():
            return self.model(*self.inputs(rows))[1].float().softmax(dim=-1)
