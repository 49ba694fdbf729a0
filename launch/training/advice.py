"""Advice about a run's batch, learning rate, weight decay and epochs: its numbers next to published ones. Numbers in, rows out.

The laws were fitted to AdamW, on language models that were trained from scratch. They differ from one another by a factor of 2 to 6,
so each result is a band and no target.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from launch.ranks.layout import Layout

Rows = list[tuple[str, str]]
"""Lines of the plan: name and text."""

MIN_TOKENS = 1_000_000
"""Runs of fewer tokens are trials of a setting; the laws mean nothing for them."""
MIN_PARAMETERS = 20_000_000
"""Smaller models, counted without embeddings, are outside the range of every law."""
MAX_EXTRAPOLATED_RATE = 5e-3
"""Largest rate advised for a smaller model: Step Law gives 1.9e-2 for 0.8 million parameters and 20 million tokens, far too much."""
MAX_EPOCHS = 4
"""Epochs that cost nothing measurable (Muennighoff et al. 2023, arXiv 2305.16264)."""
TIMES_TOO_LARGE = 8
"""A batch is warned of above this multiple of the band. OLMo's critical batch of 16.8 million tokens (1 billion parameters, 608 billion
tokens; Merrill et al. 2025, arXiv 2505.23971), which is still useful, is 5 times its band."""


class Band(NamedTuple):
    """The range of published values."""

    low: float
    high: float

    def __str__(self) -> str:
        low, high = _short(self.low), _short(self.high)
        return low if low == high else f"{low} to {high}"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the laws need to know about a run. Batch and length are both in tokens."""

    parameters: int
    """All parameters, with embeddings."""
    parameters_in_blocks: int
    """Parameters without embeddings, head and final norm."""
    block_flops: float
    """Training FLOPs per token without the head's."""
    tokens: float
    """Tokens of the whole run."""
    batch_tokens: int
    """Tokens of a step of batch.global_batch_size."""
    learning_rate: float
    """Peak rate of a step of batch.global_batch_size."""
    decay: float
    """Share of a matrix that decays in a step, as a multiple of the rate."""
    sizes: tuple[int, ...] = ()
    """Tokens of a step over the run (default: always batch_tokens)."""

    @property
    def timescale(self) -> float | None:
        """AdamW's timescale B / (rate x decay x D): the part of the run over which updates are averaged. None without decay."""
        product = self.learning_rate * self.decay * self.tokens
        return self.batch_tokens / product if product else None


def batch_band(facts: Facts) -> Band:
    """Return the best batch in tokens by Step Law (Li et al. 2025, arXiv 2503.04715) and by DeepSeek LLM (2024, arXiv 2401.02954).

    Step Law depends on the tokens alone, DeepSeek's law on the FLOPs without those of the vocabulary.
    """
    return _band(0.58 * facts.tokens**0.571, 0.2920 * (facts.block_flops * facts.tokens) ** 0.3271)


def rate_band(facts: Facts) -> Band:
    """Return the best peak rate by the same two laws. Step Law counts parameters without the vocabulary."""
    step_law = 1.79 * facts.parameters_in_blocks**-0.713 * facts.tokens**0.307
    band = _band(step_law, 0.3118 * (facts.block_flops * facts.tokens) ** -0.1250)
    if facts.parameters_in_blocks < MIN_PARAMETERS:
        return Band(min(band.low, MAX_EXTRAPOLATED_RATE), min(band.high, MAX_EXTRAPOLATED_RATE))
    return band


def timescale_band(facts: Facts) -> Band:
    """Return half to twice the best timescale by Power Lines (Bergsma et al. 2025, arXiv 2505.13738), all parameters counted.

    The law was fitted with rates of muP, which ours only resemble; hence the factor of 2.
    """
    best = 1.084 * (facts.tokens / facts.parameters) ** -0.527
    return Band(best / 2, best * 2)


def advice_rows(facts: Facts, has_adamw_rates: bool) -> Rows:
    """Return the run's numbers next to the published ones, and a warning if the batch is far too large.

    Without `has_adamw_rates` the rates of the optimizer mean something else than AdamW's; rate and timescale are then left out.
    """
    if facts.tokens < MIN_TOKENS:
        return []
    batch = batch_band(facts)
    small = facts.parameters_in_blocks < MIN_PARAMETERS
    taken = facts.sizes or (facts.batch_tokens,)
    sizes = sorted({min(taken), max(taken)})
    texts = [f"batch {' to '.join(f'{size:,}' for size in sizes)} tokens (published: {batch})"]
    sources = f"arXiv 2503.04715 and 2401.02954{', extrapolated to so small a model' if small else ''}"
    if has_adamw_rates:
        texts.append(f"rate {facts.learning_rate:g} ({rate_band(facts)})")
    rows = [("advice", f"{', '.join(texts)}; {sources}")]
    ratio = (
        f"{_short(facts.tokens / facts.parameters)} tokens per parameter (about 20 is best for a given compute budget; arXiv 2203.15556)"
    )
    if has_adamw_rates and facts.timescale is not None:
        timescale = f"decay timescale {_short(facts.timescale)} of the run (published: {timescale_band(facts)}; arXiv 2505.13738)"
        ratio = f"{timescale}, {ratio}"
    rows.append(("advice", ratio))
    if sizes[-1] > TIMES_TOO_LARGE * batch.high:
        text = f"the batch of {sizes[-1]:,} tokens is {_short(sizes[-1] / batch.high)} times the largest published one; "
        setting = "batch.ramp and " if len(sizes) > 1 else ""
        rows.append(("warning", text + f"smaller batches reach a lower loss with the same tokens. Lower {setting}batch.global_batch_size"))
    return rows


def accumulation_rows(accumulation: int, layout: Layout, has_ramp: bool = False) -> Rows:
    """Return a note if micro-batches are accumulated without other replicas to wait for (Marek et al. 2025, arXiv 2507.07101).

    A pipeline needs its micro-batches. Whether one micro-batch could be larger depends on memory, which is not known here.
    """
    if accumulation == 1 or layout.data_parallel_size > 1 or layout.pipeline_stages > 1:
        return []
    smaller = "smaller sizes in batch.ramp" if has_ramp else "a smaller batch.global_batch_size"
    text = f"accumulation {accumulation} without data parallelism saves little time; {smaller}, with learning rate and beta2 to suit, "
    return [("note", f"{text}{'reach' if has_ramp else 'reaches'} an equal or lower loss in the same tokens (arXiv 2507.07101)")]


def epoch_rows(paths: Sequence[str], epochs: Mapping[str, float]) -> Rows:
    """Return a warning for each source that is read more than MAX_EPOCHS times. `epochs` are in the order of `paths`."""
    return [
        ("warning", f"{path} is read {number:,.1f} times; after {MAX_EPOCHS} times, each repetition helps less (arXiv 2305.16264)")
        for path, number in zip(paths, epochs.values(), strict=True)
        if number > MAX_EPOCHS
    ]


def _band(*values: float) -> Band:
    return Band(min(values), max(values))


def _short(value: float) -> str:
    """Return a number with two significant digits."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
