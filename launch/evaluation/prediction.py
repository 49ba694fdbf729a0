"""What an encoder or an encoder-decoder makes of texts, a line each: a target, the text with its masks filled, or its class."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.command_line import UserError
from data.tokenization.tokenizer import Tokenizer
from launch.checkpoints.opening import TrainedModel
from launch.checkpoints.run_record import json_in
from model.generation import beam_search, fill_mask, generate

_SORTED_BATCHES = 100  # whose texts are in memory at a time


@dataclasses.dataclass(frozen=True)
class Names:
    """What a model was trained with, as the files beside it say."""

    class_token: str = "[CLS]"
    mask_token: str = "[MASK]"
    labels: tuple[str, ...] = ()


def names_of(trained: TrainedModel) -> Names:
    """From the files of a Hugging Face folder, or from the recipe of the run."""
    found: dict
    if trained.step is None:
        labels = json_in(trained.folder / "config.json").get("id2label", {})
        special = json_in(trained.folder / "tokenizer_config.json")
        named = lambda key: token["content"] if isinstance(token := special.get(key), dict) else token  # noqa: E731
        found = {
            "class_token": named("cls_token"),
            "mask_token": named("mask_token"),
            "labels": [labels[number] for number in sorted(labels, key=int)],
        }
    else:
        found = trained.recipe.get("data", {})
    known: dict = {field.name: found[field.name] for field in dataclasses.fields(Names) if found.get(field.name)}
    return Names(**known | {"labels": tuple(known.get("labels", ()))})


class Answers:
    """Texts to ids, and a batch of ids to a line each."""

    def __init__(self, trained: TrainedModel, tokenizer: Tokenizer, device: str):
        self.model, self.config, self.tokenizer, self.device = trained.model.to(device), trained.config, tokenizer, device
        self.num_cut = 0
        """Texts that were longer than the model reads, and lost their end."""

    def ids(self, text: str) -> list[int]:
        """What the network reads of a text."""
        raise NotImplementedError

    def lines(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The answer to each row of ids."""
        raise NotImplementedError

    def in_full(self, text: str) -> str:
        """The answer to one text, with all that there is to say, in one line or several."""
        return self.lines([self.ids(text)])[0]

    def in_order(self, texts: Iterable[str], batch_size: int, progress: Callable[[int], object]) -> Iterator[str]:
        """A line for each text, in their order; those of like length go through the network together. An empty one has no answer."""
        texts = iter(texts)
        while some := list(itertools.islice(texts, _SORTED_BATCHES * batch_size)):
            answers = dict.fromkeys(range(len(some)), "")
            rows = {number: self.ids(text) for number, text in enumerate(some) if text.strip()}
            by_length = sorted(rows, key=lambda number: len(rows[number]), reverse=True)
            for first in range(0, len(by_length), batch_size):
                batch = by_length[first : first + batch_size]
                answers |= zip(batch, self.lines([rows[number] for number in batch]), strict=True)
                progress(len(batch))
            progress(len(some) - len(rows))
            yield from (re.sub(r"[\r\n]+", " ", answer) for answer in answers.values())

    def _framed(self, text: str, special: Mapping[str, int], before: Sequence[int] = ()) -> list[int]:
        """The ids of a text and end of text; a name of `special` in it is its id, and has the spaces before it for itself."""
        parts = re.split(rf"\s*({'|'.join(map(re.escape, special))})", text) if special else [text]
        ids = [id for part in parts if part for id in ([special[part]] if part in special else self.tokenizer.encode(part))]
        room = self.config.sequence_length - len(before) - 1
        self.num_cut += len(ids) > room
        return [*before, *ids[:room], self.tokenizer.end_of_text]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and segments, [batch, seq]."""
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        segments = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        return tokens.to(self.device), segments.to(self.device)


class Targets(Answers):
    """The target that an encoder-decoder writes for a source. Sentinels of T5's spans are read and written by their names."""

    def __init__(self, trained: TrainedModel, tokenizer: Tokenizer, device: str, search: dict, drawing: dict | None = None):
        """`search` holds options of beam_search, and `drawing` those of generate, which has its place where they are given."""
        super().__init__(trained, tokenizer, device)
        self.search, self.drawing = search, drawing
        self.num_batches = 0
        self.start = trained.start_token(tokenizer)

    def ids(self, text: str) -> list[int]:
        return self._framed(text, self.tokenizer.sentinels)

    def lines(self, rows: Sequence[Sequence[int]]) -> list[str]:
        source, segments = self._padded(rows)
        end = self.tokenizer.end_of_text
        limits: dict = {"sequence_length": self.config.sequence_length, "vocab_size": self.tokenizer.vocab_size}
        if self.drawing is None:
            found = beam_search(self.model, source, segments, self.start, end, **self.search, **limits)
            return [self._text(hypothesis.tokens) for hypothesis in found]
        start = torch.full((len(rows), 1), self.start, device=self.device)
        how = self.drawing | {"seed": self.drawing["seed"] + self.num_batches, "stop": end}
        self.num_batches += 1
        drawn = generate(functools.partial(self.model, source, segments), start, **how, **limits)
        steps = itertools.islice(drawn, self.config.sequence_length)
        written = torch.stack(list(steps), dim=1).tolist()
        return [self._text(itertools.takewhile(lambda id: id != end, row)) for row in written]

    def _text(self, ids: Iterable[int]) -> str:
        names = {id: name for name, id in self.tokenizer.sentinels.items()}
        runs = itertools.groupby(ids, key=lambda id: id in names)
        return "".join("".join(names[id] for id in run) if is_name else self.tokenizer.decode(list(run)) for is_name, run in runs)


class Encoded(Answers):
    """What an encoder reads: the class token, a text, end of text; all of them of the first type."""

    def __init__(self, trained: TrainedModel, tokenizer: Tokenizer, device: str, names: Names):
        super().__init__(trained, tokenizer, device)
        self.names = names
        self.class_token = tokenizer.special_token_id(names.class_token)

    def ids(self, text: str) -> list[int]:
        return self._framed(text, {}, [self.class_token])

    def inputs(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        tokens, segments = self._padded(rows)
        return (tokens, segments, torch.zeros_like(tokens)) if self.config.token_types else (tokens, segments)


class Masks(Encoded):
    """What an encoder expects in the place of each mask; a line is the text with its masks filled by the likeliest."""

    def __init__(self, trained: TrainedModel, tokenizer: Tokenizer, device: str, names: Names, top_k: int):
        super().__init__(trained, tokenizer, device, names)
        self.mask, self.top_k = tokenizer.special_token_id(names.mask_token), top_k

    def ids(self, text: str) -> list[int]:
        return self._framed(text, {self.names.mask_token: self.mask}, [self.class_token])

    def lines(self, rows: Sequence[Sequence[int]]) -> list[str]:
        filled = iter(self._filled(rows, 1)[0].flatten().tolist())
        return [self.tokenizer.decode([next(filled) if id == self.mask else id for id in row[1:-1]]) for row in rows]

    def in_full(self, text: str) -> str:
        """A block for each mask: probability and piece, likeliest first."""
        row = self.ids(text)
        if self.mask not in row:
            beyond = " that the model reads" if self.num_cut else ""
            raise UserError(f"The text{beyond} has no {self.names.mask_token} for the encoder to fill: {text[:80]!r}.")
        blocks = []
        for number, (ids, probabilities) in enumerate(zip(*map(Tensor.tolist, self._filled([row], self.top_k)), strict=True), start=1):
            likeliest = [f"{100 * p:5.1f} %  {self._piece(id)}" for id, p in zip(ids, probabilities, strict=True)]
            blocks.append("\n".join([f"{self.names.mask_token} {number}", *likeliest]))
        return "\n".join(blocks)

    def _piece(self, id: int) -> str:
        text = self.tokenizer.decode([id])
        return text.strip() or repr(text)

    def _filled(self, rows: Sequence[Sequence[int]], top_k: int) -> tuple[Tensor, Tensor]:
        return fill_mask(self.model, *self.inputs(rows), mask=self.mask, top_k=top_k, vocab_size=self.tokenizer.vocab_size)


class Classes(Encoded):
    """The class that an encoder tells of a text, by its label where there are labels, else by its number."""

    def lines(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self._labels[number] for number in self._probabilities(rows).argmax(dim=1).tolist()]

    def in_full(self, text: str) -> str:
        """Each class with its probability, likeliest first."""
        most, numbers = self._probabilities([self.ids(text)])[0].sort(descending=True)
        named = zip(most.tolist(), numbers.tolist(), strict=True)
        return "\n".join(f"{100 * p:5.1f} %  {self._labels[number]}" for p, number in named)

    @property
    def _labels(self) -> Sequence[str]:
        numbers = [str(number) for number in range(self.config.num_classes)]
        return self.names.labels if len(self.names.labels) == len(numbers) else numbers

    def _probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        with torch.no_grad():
            return self.model(*self.inputs(rows))[1].float().softmax(dim=-1)
