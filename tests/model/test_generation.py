import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import KeyValueCache
from model.generation import beam_search, fill_mask, generate, sample


class Counting:
    """A replacement for a network that predicts n + 1 after token n, and records its inputs."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.shown: list[tuple[int, list[int]]] = []

    def __call__(self, tokens: torch.Tensor, segments: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        self.shown.append((cache.length, tokens[0].tolist()))
        cache.length += tokens.shape[1]
        return 100.0 * torch.nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size)


def drawn(*arguments, **settings) -> torch.Tensor:
    return torch.stack(list(generate(*arguments, **settings)), dim=1)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"qk_norm": True}, {"document_mask": True}, {"norm_position": "post"}, {"sliding_window": 4}],
)
@pytest.mark.parametrize("parts", [(1,) * 12, (5, 1, 1, 4, 1), (12,)])
def test_logits_with_a_cache_match_those_without(tiny, network, positions, changes, parts):
    model = network(tiny(positions=positions, **changes))
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    cache, pieces = KeyValueCache(), []
    for part in tokens.split(parts, dim=1):
        pieces.append(model(part, torch.ones_like(part), cache=cache))
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens, torch.ones_like(tokens)), rtol=0, atol=1e-5)


def test_greedy_takes_the_likeliest_token_each_time(tiny, network):
    model, tokens = network(tiny()), torch.tensor([[1, 2, 3], [4, 5, 6]])
    continued = tokens
    for _ in range(10):
        likeliest = model(continued, torch.ones_like(continued))[:, -1].argmax(dim=-1)
        continued = torch.cat((continued, likeliest[:, None]), dim=1)
    assert torch.equal(drawn(model, tokens, 10, sequence_length=24, temperature=0), continued[:, 3:])
    assert torch.equal(drawn(model, tokens, 10, sequence_length=24, top_k=1, seed=5), continued[:, 3:])
    assert torch.equal(drawn(model, tokens, 10, sequence_length=24, top_p=1e-9, seed=5), continued[:, 3:])


def test_generated_tokens_depend_on_the_seed_only(tiny, network):
    model, tokens = network(tiny()), torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    first = drawn(model, tokens, 15, sequence_length=24, seed=1)
    torch.manual_seed(1)  # the global generator has no effect
    assert torch.equal(first, drawn(model, tokens, 15, sequence_length=24, seed=1))
    assert not torch.equal(first, drawn(model, tokens, 15, sequence_length=24, seed=2))


def test_full_context_continues_from_its_last_half():
    model = Counting(100)
    assert drawn(model, torch.tensor([[0, 1, 2, 3, 4]]), 8, sequence_length=8, temperature=0).tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert model.shown == [
        (0, [0, 1, 2, 3, 4]),
        (5, [5]),
        (6, [6]),
        (7, [7]),  # eight tokens: full
        (0, [5, 6, 7, 8]),
        (4, [9]),
        (5, [10]),
        (6, [11]),
    ]


def test_only_the_end_of_a_long_prompt_is_read():
    model = Counting(100)
    assert drawn(model, torch.arange(20)[None], 2, sequence_length=8, temperature=0).tolist() == [[20, 21]]
    assert model.shown == [(0, list(range(12, 20))), (0, [17, 18, 19, 20])]


@pytest.mark.parametrize("sequence_length", [1, 2, 3])
def test_shortest_contexts_continue_when_full(sequence_length):
    assert drawn(Counting(100), torch.tensor([[7]]), 6, sequence_length=sequence_length, temperature=0).tolist() == [[8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_network_generates_beyond_its_context(tiny, network, positions):
    model, tokens = network(tiny(positions=positions, sequence_length=8)), torch.tensor([[1, 2, 3]])
    ids = drawn(model, tokens, 30, sequence_length=8, temperature=0)
    assert ids.shape == (1, 30)
    window = torch.cat((tokens, ids), dim=1)[:, 5:9]  # the first window after the context was full
    assert model(window, torch.ones_like(window))[0, -1].argmax() == ids[0, 6]


def test_stopped_row_keeps_yielding_the_stop_token():
    ids = drawn(Counting(100), torch.tensor([[3], [1]]), 50, sequence_length=64, temperature=0, stop=5)
    assert ids.tolist() == [[4, 5, 5, 5], [2, 3, 4, 5]]  # and the iterator ends with the last row


def test_each_token_is_generated_when_it_is_requested():
    model = Counting(100)
    stream = generate(model, torch.tensor([[1]]), 50, sequence_length=64, temperature=0)
    assert [next(stream).tolist(), next(stream).tolist()] == [[2], [3]]
    assert len(model.shown) == 2
    assert not torch.is_inference_mode_enabled()


def test_prompt_is_a_prefix_for_a_prefix_language_model(tiny, network):
    model, prompt = network(tiny(prefix_attention=True)), torch.tensor([[1, 2, 3], [4, 5, 6]])
    continued, segments = prompt, -torch.ones_like(prompt)
    for _ in range(6):
        continued = torch.cat((continued, model(continued, segments)[:, -1:].argmax(dim=-1)), dim=1)
        segments = torch.nn.functional.pad(segments, (0, 1), value=1)
    assert torch.equal(drawn(model, prompt, 6, sequence_length=24, temperature=0, prefix_attention=True), continued[:, 3:])


@settings(max_examples=50, deadline=None)
@given(logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12), top_p=st.floats(0.01, 1), seed=st.integers(0, 1000))
def test_top_p_draws_among_the_fewest_tokens_that_sum_to_p(logits, top_p, seed):
    row = torch.tensor([logits])
    ids = sample(row.expand(64, -1), top_p=top_p, generator=torch.Generator().manual_seed(seed))
    probabilities = row[0].double().softmax(dim=0)
    for id in ids.unique():
        likelier = probabilities[probabilities > probabilities[id] + 1e-6].sum().item()  # equal in float32 is equal
        assert likelier < top_p + 1e-6  # without it the likelier ones would not do; float32 sums


def test_sampling_frequencies_match_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = lambda **options: (  # noqa: E731
        sample(logits.expand(20000, -1), generator=torch.Generator().manual_seed(0), **options).bincount(minlength=4) / 20000
    )
    spread = {"rtol": 0, "atol": 0.015}  # four standard deviations of 20,000 draws
    torch.testing.assert_close(draws(), torch.tensor([0.5, 0.3, 0.15, 0.05]), **spread)
    torch.testing.assert_close(draws(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), **spread)
    torch.testing.assert_close(draws(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), **spread)
    torch.testing.assert_close(draws(top_p=0.9), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, **spread)
    torch.testing.assert_close(draws(top_k=3, top_p=0.84), torch.tensor([0.625, 0.375, 0, 0]), **spread)
    sharp = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    torch.testing.assert_close(draws(temperature=0.5), sharp / sharp.sum(), **spread)


def test_top_k_keeps_exactly_k_of_equal_logits():
    ids = sample(torch.zeros(500, 10), top_k=3, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == 3


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must be at least 0"),
        ("temperature", float("nan"), "temperature is nan; it must be at least 0"),
        ("top_k", 0, "top_k is 0; it must be at least 1."),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1."),
        ("top_p", 1.5, "top_p is 1.5; it must be above 0 and at most 1."),
        ("max_new_tokens", 0, "max_new_tokens is 0; it must be at least 1."),
        ("tokens", torch.zeros(1, 0, dtype=torch.long), "with at least one token"),
    ],
)
def test_invalid_value_is_refused_before_the_first_token(setting, value, message):
    arguments = {"model": Counting(9), "tokens": torch.tensor([[1]]), "max_new_tokens": 3, "sequence_length": 8}
    with pytest.raises(ValueError, match=message):
        generate(**(arguments | {setting: value}))


class Dice:
    """A replacement for an encoder-decoder. Its logits depend on the source and on all tokens so far, which it keeps in the cache."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.rows_shown: list[int] = []

    def __call__(self, source, source_segments, tokens, segments, cache: KeyValueCache) -> torch.Tensor:
        self.rows_shown.append(len(tokens))
        seen = so_far(tokens, cache)
        cache.length += 1
        return torch.stack(
            [self.logits(row[within > 0], target) for row, within, target in zip(source, source_segments, seen, strict=True)]
        )[:, None]

    def logits(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seed = hash((tuple(source.tolist()), tuple(target.tolist())))
        return 2 * torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))

    def log_probability(self, source: list[int], target: list[int]) -> float:
        """Return log P of a target after the start token 0."""
        steps = [
            self.logits(torch.tensor(source), torch.tensor([0, *target[:at]])).log_softmax(dim=0)[token] for at, token in enumerate(target)
        ]
        return float(sum(steps))


class Chain(Dice):
    """A table of each token's probabilities, which depend on the previous token only."""

    def __init__(self, table: list[list[float]]):
        super().__init__(len(table))
        self.table = torch.tensor(table)

    def logits(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.table[target[-1]].log()


def so_far(tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    as_key = tokens[:, None, :, None]
    return cache.append(0, as_key, as_key)[0][:, 0, :, 0]


def padded(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sources of different lengths, padded, and their segments."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    segments = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return tokens, segments


def searched(model, *sources: list[int], **settings):
    return beam_search(model, *padded(*sources), start=0, stop=0, **({"sequence_length": 24} | settings))


@pytest.mark.parametrize("length_penalty", [0, 0.6, 2])
def test_exhaustive_beam_finds_the_best_target(length_penalty):
    model, sources, longest = Dice(4), ([5], [6, 7], [8, 9, 8]), 4
    targets = [[*text, 0] for length in range(longest) for text in itertools.product([1, 2, 3], repeat=length)]
    for source, found in zip(
        sources, searched(model, *sources, beam_size=256, length_penalty=length_penalty, max_new_tokens=longest), strict=True
    ):
        scores = {
            tuple(target[:-1]): model.log_probability(source, target) / ((5 + len(target)) / 6) ** length_penalty for target in targets
        }
        best = max(scores, key=scores.__getitem__)
        assert tuple(found.tokens) == best
        assert found.score == pytest.approx(scores[best], rel=1e-5)  # float32 sums


def test_beam_size_one_is_greedy():
    model, sources = Dice(5), [[number] for number in range(1, 9)]
    source, segments = padded(*sources)
    start = torch.zeros(len(sources), 1, dtype=torch.long)
    greedy = drawn(functools.partial(model, source, segments), start, 20, temperature=0, stop=0, sequence_length=24)
    for row, found in zip(greedy.tolist(), searched(model, *sources, beam_size=1, max_new_tokens=20), strict=True):
        assert found.tokens == (row[: row.index(0)] if 0 in row else row)


def test_wider_beams_find_better_targets_in_total():
    scores = [sum(found.score for found in searched(Dice(5), *([n] for n in range(1, 21)), beam_size=beams)) for beams in (1, 4, 16)]
    assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize(
    "changes", [{"positions": "sinusoidal", "norm_position": "post"}, {"positions": "relative"}, {"positions": "rotary"}]
)
def test_beam_search_is_the_same_without_cache_and_for_single_sources(tiny, network, changes):
    model = network(tiny(architecture="encoder_decoder", vocab_size=9, **changes))
    sources = [[1, 2, 3, 4, 5], [6], [7, 8, 1]]
    together = searched(model, *sources, max_new_tokens=12)
    alone = [found for source in sources for found in searched(model, source, max_new_tokens=12)]

    def without_cache(source, source_segments, tokens, segments, cache):
        seen = so_far(tokens, cache)
        return model(source, source_segments, seen, torch.ones_like(seen))

    for others in (alone, searched(without_cache, *sources, max_new_tokens=12)):
        assert [found.tokens for found in others] == [found.tokens for found in together]
        assert [found.score for found in others] == pytest.approx([found.score for found in together], abs=1e-5)


@pytest.mark.parametrize(("length_penalty", "tokens", "score"), [(0, [], math.log(0.4)), (0.6, [1, 2, 3], math.log(0.36) / 1.5**0.6)])
def test_length_penalty_by_hand(length_penalty, tokens, score):
    """The empty target has probability 0.4. Target 1, 2, 3 has 0.6 x 0.6, and with its stop token a length of 4."""
    chain = Chain([[0.4, 0.6, 0, 0], [0.2, 0, 0.6, 0.2], [0, 0, 0, 1], [1, 0, 0, 0]])
    (found,) = searched(chain, [5], length_penalty=length_penalty)
    assert found == (tokens, pytest.approx(score))


def test_finished_source_is_removed_from_the_batch():
    sure = Chain(
        [[0.9, 0.1], [0.1, 0.9]]
    )  # after the empty target with 0.9, a target with 0.1 can reach log(0.1) / (30 / 6) ** 0.6 = -0.88
    assert searched(sure, [5], [6], max_new_tokens=25) == [([], pytest.approx(math.log(0.9)))] * 2
    assert sure.rows_shown == [2]
    lengths_differ = Chain([[0, 1], [0.5, 0.5]])
    searched(lengths_differ, [5], [6, 6, 6], length_penalty=0, beam_size=2)
    assert lengths_differ.rows_shown[:2] == [2, 4]


def test_endless_target_is_cut_at_the_longest_length():
    endless = Chain([[0, 1, 0], [0, 0.4, 0.6], [0, 0.4, 0.6]])
    two, three = searched(endless, [5, 6], [5, 6, 7], sequence_length=100)
    assert two.tokens == [1] + [2] * 51 and three.tokens == [1] + [2] * 52  # source + 50
    assert [len(found.tokens) for found in searched(endless, [5, 6], max_new_tokens=7)] == [7]
    assert [len(found.tokens) for found in searched(endless, [5, 6], sequence_length=9)] == [9]


def test_ids_outside_the_tokenizer_are_never_in_a_target():
    endless = Chain([[0, 0.1, 0.9], [0.5, 0, 0.5], [0, 0, 1]])
    assert searched(endless, [5], vocab_size=2)[0].tokens == [1]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("beam_size", 0, "beam_size is 0; it must be at least 1"),
        ("length_penalty", -0.5, "length_penalty is -0.5; it must be at least 0"),
        ("length_penalty", math.nan, "length_penalty is nan; it must be at least 0"),
        ("max_new_tokens", 0, "max_new_tokens is 0; it must be at least 1."),
    ],
)
def test_invalid_beam_search_settings_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        searched(Dice(4), [5], **{setting: value})


def test_each_mask_has_its_likeliest_ids_in_order():
    probabilities = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.5, 0.3, 0.1, 0.1], [0.0, 0.1, 0.2, 0.7]])
    with_classes = lambda tokens, segments: (probabilities.log()[tokens.cumsum(dim=1) % 3], torch.zeros(len(tokens), 2))  # noqa: E731
    tokens = torch.tensor([[3, 1, 3], [1, 3, 1]])  # rows of the table: 0 1 1, 1 1 2
    filled = fill_mask(with_classes, tokens, torch.ones_like(tokens), mask=3, top_k=2)
    assert filled.ids.tolist() == [[2, 1], [0, 1], [0, 1]]
    torch.testing.assert_close(filled.probabilities, torch.tensor([[0.7, 0.2], [0.5, 0.3], [0.5, 0.3]]))
    assert fill_mask(with_classes, tokens, torch.ones_like(tokens), mask=3, top_k=9, vocab_size=2).ids.shape == (3, 2)
