import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation import generate, sample
from model.layers import KeyValueCache


class Counting:
    """A stand-in for a network: after token n comes n + 1; it keeps what it was shown."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.shown: list[tuple[int, list[int]]] = []

    def __call__(self, tokens: torch.Tensor, segments: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        self.shown.append((cache.length, tokens[0].tolist()))
        cache.length += tokens.shape[1]
        return 100.0 * torch.nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size)


def drawn(*arguments, **settings) -> torch.Tensor:
    return torch.stack(list(generate(*arguments, **settings)), dim=1)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"qk_norm": True}, {"document_mask": True}, {"norm_position": "post"}])
@pytest.mark.parametrize("parts", [(1,) * 12, (5, 1, 1, 4, 1), (12,)])
def test_the_cache_changes_no_logit(tiny, network, positions, changes, parts):
    model = network(tiny(positions=positions, **changes))
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    cache, pieces = KeyValueCache(), []
    for part in tokens.split(parts, dim=1):
        pieces.append(model(part, torch.ones_like(part), cache))
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens, torch.ones_like(tokens)), rtol=0, atol=1e-5)


def test_greedy_is_the_likeliest_token_each_time(tiny, network):
    model, tokens = network(tiny()), torch.tensor([[1, 2, 3], [4, 5, 6]])
    continued = tokens
    for _ in range(10):
        likeliest = model(continued, torch.ones_like(continued))[:, -1].argmax(dim=-1)
        continued = torch.cat((continued, likeliest[:, None]), dim=1)
    assert torch.equal(drawn(model, tokens, 10, sequence_length=24, temperature=0), continued[:, 3:])
    assert torch.equal(drawn(model, tokens, 10, sequence_length=24, top_k=1, seed=5), continued[:, 3:])
    assert torch.equal(drawn(model, tokens, 10, sequence_length=24, top_p=1e-9, seed=5), continued[:, 3:])


def test_the_seed_decides_the_tokens(tiny, network):
    model, tokens = network(tiny()), torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    first = drawn(model, tokens, 15, sequence_length=24, seed=1)
    torch.manual_seed(1)  # the global generator has no say
    assert torch.equal(first, drawn(model, tokens, 15, sequence_length=24, seed=1))
    assert not torch.equal(first, drawn(model, tokens, 15, sequence_length=24, seed=2))


def test_a_full_context_goes_on_from_its_last_half():
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


def test_of_a_long_prompt_the_end_is_seen():
    model = Counting(100)
    assert drawn(model, torch.arange(20)[None], 2, sequence_length=8, temperature=0).tolist() == [[20, 21]]
    assert model.shown == [(0, list(range(12, 20))), (0, [17, 18, 19, 20])]


@pytest.mark.parametrize("sequence_length", [1, 2, 3])
def test_the_shortest_contexts_go_on_too(sequence_length):
    assert drawn(Counting(100), torch.tensor([[7]]), 6, sequence_length=sequence_length, temperature=0).tolist() == [[8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_a_network_goes_on_beyond_its_context(tiny, network, positions):
    model, tokens = network(tiny(positions=positions, sequence_length=8)), torch.tensor([[1, 2, 3]])
    ids = drawn(model, tokens, 30, sequence_length=8, temperature=0)
    assert ids.shape == (1, 30)
    window = torch.cat((tokens, ids), dim=1)[:, 5:9]  # the first window behind the roll-over
    assert model(window, torch.ones_like(window))[0, -1].argmax() == ids[0, 6]


def test_a_stopped_row_goes_on_yielding_the_stop_token():
    ids = drawn(Counting(100), torch.tensor([[3], [1]]), 50, sequence_length=64, temperature=0, stop=5)
    assert ids.tolist() == [[4, 5, 5, 5], [2, 3, 4, 5]]  # and the iterator ends with the last row


def test_tokens_come_one_at_a_time():
    model = Counting(100)
    stream = generate(model, torch.tensor([[1]]), 50, sequence_length=64, temperature=0)
    assert [next(stream).tolist(), next(stream).tolist()] == [[2], [3]]
    assert len(model.shown) == 2
    assert not torch.is_inference_mode_enabled()


@settings(max_examples=50, deadline=None)
@given(logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12), top_p=st.floats(0.01, 1), seed=st.integers(0, 1000))
def test_top_p_draws_among_the_fewest_that_sum_to_p(logits, top_p, seed):
    row = torch.tensor([logits])
    ids = sample(row.expand(64, -1), top_p=top_p, generator=torch.Generator().manual_seed(seed))
    probabilities = row[0].double().softmax(dim=0)
    for id in ids.unique():
        likelier = probabilities[probabilities > probabilities[id] + 1e-6].sum().item()  # equal in float32 is equal
        assert likelier < top_p + 1e-6  # without it the likelier ones would not do; float32 sums


def test_sampling_follows_the_probabilities():
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


def test_top_k_keeps_exactly_k_of_equals():
    ids = sample(torch.zeros(500, 10), top_k=3, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == 3


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
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
def test_a_bad_value_is_refused_before_the_first_token(setting, value, sentence):
    arguments = {"model": Counting(9), "tokens": torch.tensor([[1]]), "max_new_tokens": 3, "sequence_length": 8}
    with pytest.raises(ValueError, match=sentence):
        generate(**(arguments | {setting: value}))
