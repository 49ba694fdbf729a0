"""Generation of tokens, beam search for the best target of a source, and prediction of masked tokens.

A model here is a callable (its inputs, cache=) -> logits [batch, seq, vocab], such as a Transformer in its eval mode.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.cache import KeyValueCache
from model.transformer import Transformer

Network = Callable[..., Tensor]

LONGER_THAN_ITS_SOURCE = 50
"""Number of tokens by which a target of beam search may be longer than its source.

Vaswani et al. 2017, arXiv 1706.03762, section 6.1.
"""


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id a row from softmax(logits / temperature).  [batch, vocab] -> [batch]

    Temperature 0 takes the likeliest id. top_k draws among the k likeliest only; top_p among the smallest set of likeliest ids whose
    probabilities sum to at least p (Holtzman et al. 2019, arXiv 1904.09751), after top_k if both are given. Raises ValueError for
    values out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, ids = logits.topk(top_k, dim=-1)  # exactly k; a threshold would keep more if logits are equal
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # sum of the likelier ids' probabilities; 0 for the first, which is always kept
        probabilities = probabilities.scatter(-1, ids, ordered.masked_fill(likelier >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate(
    model: Network,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
    *,
    sequence_length: int,
    vocab_size: int | None = None,
    prefix_attention: bool = False,
) -> Iterator[Tensor]:
    """Continue each row of `tokens` [batch, seq]: yield one id a row [batch] at every step, on the device of `tokens`.

    `model` takes (tokens, segments, cache=). Each token is computed once until the model's `sequence_length` is full; then the last
    half of the tokens is read again as a new beginning, and so on. Only the last `sequence_length` tokens of a longer prompt are read.
    With `prefix_attention` the tokens that are read together (the prompt, or a new beginning) are a prefix.
    For an encoder-decoder pass functools.partial(model, source, source_segments), and each target's start token as `tokens`.
    Ids from `vocab_size` on are never drawn: a model may have more rows than the tokenizer has ids.
    A row that has drawn `stop` keeps yielding it; when all rows have, the iterator ends. The same seed gives the same tokens.
    Raises ValueError for values out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"The prompt has shape {list(tokens.shape)}; it must be [batch, seq] with at least one token.")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    draw = lambda logits: sample(logits[:, :vocab_size], temperature, top_k, top_p, generator)  # noqa: E731
    return _steps(model, tokens, max_new_tokens, sequence_length, draw, stop, -1 if prefix_attention else 1)


def _steps(
    model: Network,
    tokens: Tensor,
    max_new_tokens: int,
    sequence_length: int,
    draw: Callable[[Tensor], Tensor],
    stop: int | None,
    first_segment: int,
) -> Iterator[Tensor]:
    window = unread = tokens[:, -sequence_length:]
    cache = KeyValueCache()
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > sequence_length:
            window = unread = window[:, -max(1, sequence_length // 2) :]
            cache = KeyValueCache()
        segments = torch.full_like(unread, 1 if cache.length else first_segment)
        with torch.no_grad():  # not inference_mode: weights that ZeRO-3 gathers under it could not be trained afterwards
            ids = draw(model(unread, segments, cache=cache)[:, -1])
            if stop is not None:
                ids = torch.where(stopped, stop, ids)
                stopped = stopped | (ids == stop)
            window, unread = torch.cat((window, ids[:, None]), dim=1), ids[:, None]
        yield ids
        if stop is not None and stopped.all():
            return


class Hypothesis(NamedTuple):
    """A target found by beam search."""

    tokens: list[int]
    """Token ids, without the start and the stop token."""
    score: float
    """log P divided by the length penalty."""


def beam_search(
    model: Network,
    source: Tensor,
    source_segments: Tensor,
    start: int,
    stop: int,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    max_new_tokens: int | None = None,
    *,
    sequence_length: int,
    vocab_size: int | None = None,
) -> list[Hypothesis]:
    """Return for each source the target with the highest log P / ((5 + length) / 6) ** length_penalty.  source [batch, seq]

    Wu et al. 2016, arXiv 1609.08144, equation 14, with the settings of Vaswani et al. 2017, section 6.1. `source_segments` is 0 for
    padding. The length includes the stop token; the longest length is max_new_tokens (default: the source's length + 50), and at most
    sequence_length. `model` is an encoder-decoder: (source, source_segments, tokens, segments, cache=).

    Each step keeps the beam_size likeliest continuations; an ended one is replaced in the next step. A source is removed from the
    batch when no live hypothesis can beat its best ended one, even if all further tokens had probability 1. If no hypothesis has ended
    at the longest length, the likeliest live one is the target. beam_size 1 is greedy. Raises ValueError for values out of range.
    """
    _check_beams(beam_size, length_penalty, max_new_tokens)
    penalty = lambda length: ((5 + length) / 6) ** length_penalty  # noqa: E731
    longest = source_segments.ne(0).sum(dim=1) + LONGER_THAN_ITS_SOURCE
    longest = (longest if max_new_tokens is None else torch.full_like(longest, max_new_tokens)).clamp(max=sequence_length)
    found = [Hypothesis([], -math.inf)] * len(source)
    searched = torch.arange(len(source), device=source.device)  # indices of the sources that are not finished
    best = torch.full_like(searched, -math.inf, dtype=torch.float32)  # [searched], the score of each in `found`
    hypotheses = torch.full((len(source), 1, 1), start, device=source.device)  # [searched, beam, 1 + length]
    log_p = torch.zeros(len(source), 1, device=source.device)  # [searched, beam]; -inf for an ended hypothesis
    cache, length = KeyValueCache(), 0
    while len(searched):
        last, length = hypotheses[:, :, -1:].flatten(0, 1), length + 1
        with torch.no_grad():
            logits = model(source, source_segments, last, torch.ones_like(last), cache=cache)[:, -1, :vocab_size]
        continued = log_p[:, :, None] + logits.float().log_softmax(dim=-1).unflatten(0, log_p.shape)  # [searched, beam, vocab]
        log_p, indices = continued.flatten(1).topk(min(beam_size, continued[0].numel()))
        parents, ids = indices // continued.shape[2], indices % continued.shape[2]
        hypotheses = torch.cat((hypotheses.take_along_dim(parents[:, :, None], dim=1), ids[:, :, None]), dim=2)

        ended = ids == stop
        cut = (length == longest) & best.isneginf() & ~ended.any(dim=1)
        scores, which = (log_p / penalty(length)).masked_fill(~(ended | cut[:, None]), -math.inf).max(dim=1)
        for row in (scores > best).nonzero().flatten().tolist():
            tokens = hypotheses[row, which[row], 1:].tolist()
            found[searched[row]] = Hypothesis(tokens[:-1] if tokens[-1] == stop else tokens, float(scores[row]))
        best = torch.maximum(best, scores)

        log_p = log_p.masked_fill(ended, -math.inf)
        is_live = (length < longest) & (log_p.max(dim=1).values / penalty(longest) > best)
        rows = torch.arange(len(searched), device=source.device)[:, None] * continued.shape[1] + parents
        rows = rows[is_live].flatten()
        cache.select(rows)
        source, source_segments = source[rows], source_segments[rows]
        searched, longest, best, hypotheses, log_p = (x[is_live] for x in (searched, longest, best, hypotheses, log_p))
    return found


class Fillings(NamedTuple):
    """The likeliest ids for each mask, likeliest first; masks are in reading order, row by row.  [masks, top_k]"""

    ids: Tensor
    probabilities: Tensor


def fill_mask(model: Network, *inputs: Tensor, mask: int, top_k: int = 5, vocab_size: int | None = None) -> Fillings:
    """Predict the tokens at each `mask` id of the first input, with an encoder."""
    with torch.no_grad():
        outputs = model(*inputs)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    probabilities = logits[inputs[0] == mask][:, :vocab_size].float().softmax(dim=-1)
    largest, ids = probabilities.topk(min(top_k, probabilities.shape[1]))
    return Fillings(ids, largest)


def _check_beams(beam_size: int, length_penalty: float, max_new_tokens: int | None) -> None:
    complaints = []
    if beam_size < 1:
        complaints.append(f"beam_size is {beam_size}; it must be at least 1 (1 is greedy).")
    if not 0 <= length_penalty < math.inf:
        complaints.append(f"length_penalty is {length_penalty}; it must be at least 0 (0 ignores the length).")
    if max_new_tokens is not None and max_new_tokens < 1:
        complaints.append(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if complaints:
        raise ValueError("\n".join(complaints))


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    complaints = []
    if not temperature >= 0:
        complaints.append(f"temperature is {temperature}; it must be at least 0 (0 takes the likeliest token).")
    if top_k is not None and top_k < 1:
        complaints.append(f"top_k is {top_k}; it must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        complaints.append(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if complaints:
        raise ValueError("\n".join(complaints))


def tokens_per_second(network: Transformer, new_tokens: int = 64, prompt_tokens: int = 16) -> float:
    """Measure the speed of greedy generation with the cache, without the time for the prompt."""
    prompt = torch.arange(prompt_tokens)[None] % network.config.vocab_size
    generated = generate(network, prompt, new_tokens + 1, temperature=0, sequence_length=network.config.sequence_length)
    next(generated)
    start = time.perf_counter()
    for _ in generated:
        pass
    return new_tokens / (time.perf_counter() - start)
