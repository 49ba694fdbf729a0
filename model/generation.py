"""New tokens from a model, one at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.layers import KeyValueCache


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id a row, drawn from softmax(logits / temperature).  [batch, vocab] -> [batch]

    Temperature 0 takes the likeliest. top_k draws among the k likeliest alone; top_p among the fewest likeliest whose
    probabilities sum to at least p (Holtzman et al. 2019, arXiv 1904.09751), after top_k where both are given.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, ids = logits.topk(top_k, dim=-1)  # exactly k, where a threshold would keep more in a tie
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # the sum of what stands before each id: 0 for the first, which always stays
        probabilities = probabilities.scatter(-1, ids, ordered.masked_fill(likelier >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate(
    model: Callable[[Tensor, Tensor, KeyValueCache], Tensor],
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
) -> Iterator[Tensor]:
    """Continue each row of `tokens` [batch, seq], yielding one id a row [batch] at every step, on the device of `tokens`.

    `model` is (tokens, segments, cache) -> logits [batch, seq, vocab], in its eval mode. Each token is computed once, until
    tokens fill the `sequence_length` that the model knows: then the last half of them is read again as a new beginning, and so
    on. Of a longer prompt only the last `sequence_length` tokens are seen.
    Ids from `vocab_size` on, where the model has more rows than the tokenizer ids, are never drawn.
    A row that has drawn `stop` goes on yielding it; when all have, the iterator ends. The same seed gives the same tokens.
    """
    _check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"The prompt has shape {list(tokens.shape)}; it must be [batch, seq] with at least one token.")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    draw = lambda logits: sample(logits[:, :vocab_size], temperature, top_k, top_p, generator)  # noqa: E731
    return _steps(model, tokens, max_new_tokens, sequence_length, draw, stop)


def _steps(
    model: Callable[[Tensor, Tensor, KeyValueCache], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    sequence_length: int,
    draw: Callable[[Tensor], Tensor],
    stop: int | None,
) -> Iterator[Tensor]:
    window = unread = tokens[:, -sequence_length:]
    cache = KeyValueCache()
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > sequence_length:
            window = unread = window[:, -max(1, sequence_length // 2) :]
            cache = KeyValueCache()
        with torch.no_grad():  # not inference_mode: what ZeRO-3 gathers under it could not be trained any more
            logits = model(unread, torch.ones_like(unread), cache)[:, -1]
            ids = draw(logits)
            if stop is not None:
                ids = torch.where(stopped, stop, ids)
                stopped = stopped | (ids == stop)
            window, unread = torch.cat((window, ids[:, None]), dim=1), ids[:, None]
        yield ids
        if stop is not None and stopped.all():
            return


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
