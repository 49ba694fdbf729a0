import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.t5.modeling_t5 import T5Attention

from model.attention import Attention
from model.cache import KeyValueCache
from model.layers import FeedForward, LayerNorm, RMSNorm, Stream
from model.positions import SinusoidalPositions, alibi_slopes, distances, relative_buckets, rotate
from model.transformer import Block, Transformer, layers

KINDS_OF_POSITIONS = ("learned", "sinusoidal", "rotary", "alibi")
BERT = {
    "architecture": "encoder",
    "norm": "layernorm",
    "norm_position": "post",
    "positions": "learned",
    "activation": "gelu",
    "biases": True,
    "token_types": 2,
}
MODERN_BERT = {"architecture": "encoder", "norm": "layernorm", "activation": "geglu"}
TRANSFORMER = {
    "architecture": "encoder_decoder",
    "norm": "layernorm",
    "norm_position": "post",
    "positions": "sinusoidal",
    "activation": "relu",
    "biases": True,
    "num_decoder_layers": 1,
}
T5 = {"architecture": "encoder_decoder", "positions": "relative", "activation": "geglu", "tie_embeddings": False, "head_size": 6}
SOURCE = torch.tensor([[11, 12, 13, 21, 22, 0, 0]])
SOURCE_SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0]])
TARGET = torch.tensor([[1, 31, 32, 1, 41, 42, 43, 44, 0]])
TARGET_SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2, 0]])


def changed_positions(model, inputs: tuple, which: int, place: int) -> list[int]:
    """Return the positions of the output's first row that change if one input has another token at one position."""
    changed = [tensor.clone() for tensor in inputs]
    changed[which][0, place] = 60
    return (model(*inputs) != model(*changed))[0].any(dim=1).nonzero().flatten().tolist()


def attention_in_numpy(x: np.ndarray, weights: dict[str, np.ndarray], heads: int, key_value_heads: int) -> np.ndarray:
    seq, head = len(x), weights["query"].shape[0] // heads
    query = (x @ weights["query"].T).reshape(seq, heads, head)
    key = (x @ weights["key"].T).reshape(seq, key_value_heads, head)
    value = (x @ weights["value"].T).reshape(seq, key_value_heads, head)
    mixed = np.zeros_like(query)
    for h, place in itertools.product(range(heads), range(seq)):
        group = h // (heads // key_value_heads)
        scores = np.exp(key[: place + 1, group] @ query[place, h] / math.sqrt(head))
        mixed[place, h] = scores / scores.sum() @ value[: place + 1, group]
    return mixed.reshape(seq, -1) @ weights["output"].T


@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_attention_matches_numpy(tiny, randomise, num_key_value_heads):
    config = tiny(positions="learned", num_key_value_heads=num_key_value_heads, head_size=6)
    attention = randomise(Attention(config, 0, seed=0)).double()
    hidden = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = attention(hidden, torch.ones(2, 9, dtype=torch.long)).detach()
    weights = {name: getattr(attention, name).weight.detach().numpy() for name in ("query", "key", "value", "output")}
    for row in range(2):
        by_hand = attention_in_numpy(hidden[row].numpy(), weights, 4, num_key_value_heads)
        np.testing.assert_allclose(mixed[row].numpy(), by_hand, rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_on_the_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(50, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    score = lambda m, n: (rotate(query, angles[m].cos(), angles[m].sin()) * rotate(key, angles[n].cos(), angles[n].sin())).sum().item()  # noqa: E731
    assert score(7, 3) == pytest.approx(score(44, 40), abs=1e-12)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    assert score(5, 5) == pytest.approx((query * key).sum().item(), abs=1e-12)


def test_sinusoidal_positions_match_the_formula(tiny):
    config = tiny(positions="sinusoidal", hidden_size=6, num_attention_heads=1)
    embedding = torch.zeros(1, 5, 6)
    added = SinusoidalPositions(config, seed=0).eval()(Stream(embedding, torch.ones(1, 5, dtype=torch.long))).hidden
    for place in range(5):
        for pair in range(3):
            angle = place / 10000 ** (2 * pair / 6)
            assert added[0, place, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert added[0, place, 3 + pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_alibi_slopes_match_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def test_alibi_subtracts_a_penalty_for_distance(tiny, randomise):
    attention = randomise(Attention(tiny(positions="alibi"), 0, seed=0)).double()
    with torch.no_grad():
        attention.query.weight.zero_()  # all scores alike but for the penalty
    hidden = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = attention.value(hidden).view(5, 4, 8)
    weights = torch.stack([(-slope * torch.arange(4, -1, -1.0, dtype=torch.float64)).softmax(dim=0) for slope in alibi_slopes(4)])
    by_hand = attention.output(torch.einsum("hk,khd->hd", weights, value).flatten())
    torch.testing.assert_close(attention(hidden, torch.ones(1, 5, dtype=torch.long))[0, -1], by_hand)


@pytest.mark.parametrize("both_sides", [True, False])
def test_relative_buckets_match_t5(both_sides):
    distance = distances(300, 300, torch.device("cpu"))
    theirs = T5Attention._relative_position_bucket(distance, bidirectional=both_sides, num_buckets=32, max_distance=128)
    assert torch.equal(relative_buckets(distance, both_sides), theirs)


def test_norms_match_numbers_by_hand():
    x = torch.tensor([1.0, 2.0, 6.0])
    norm = RMSNorm(3, epsilon=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    by_hand = torch.tensor([1.0, 4.0, 18.0]) / math.sqrt((1 + 4 + 36) / 3 + 0.5)
    torch.testing.assert_close(norm(x), by_hand)
    norm = LayerNorm(3, epsilon=0.5, bias=True)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    by_hand = torch.tensor([-2.0, -2.0, 9.0]) / math.sqrt((4 + 1 + 9) / 3 + 0.5) + torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close(norm(x), by_hand)


def test_feed_forward_matches_formula(tiny, randomise):
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    inner = {
        "relu": lambda up: up.clamp(min=0),
        "gelu": lambda up: up * 0.5 * (1 + torch.erf(up / math.sqrt(2))),
        "gelu_tanh": lambda up: 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))),
    }
    for activation, function in inner.items():
        module = randomise(FeedForward(tiny(activation=activation, biases=True), 0, seed=0))
        by_hand = function(x @ module.up.weight.T + module.up.bias) @ module.down.weight.T + module.down.bias
        torch.testing.assert_close(module(x), by_hand)
    for activation, function in {"swiglu": lambda gate: gate * torch.sigmoid(gate), "geglu": inner["gelu_tanh"]}.items():
        module = randomise(FeedForward(tiny(activation=activation), 0, seed=0))
        gate = x @ module.gate.weight.T
        torch.testing.assert_close(module(x), (function(gate) * (x @ module.up.weight.T)) @ module.down.weight.T)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_block_normalises_before_or_after(tiny, randomise, norm_position):
    block = randomise(Block(tiny(norm_position=norm_position), 0, seed=0))
    x, segments = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1, 5, dtype=torch.long)
    if norm_position == "pre":
        middle = x + block.attention(block.attention_norm(x), segments)
        by_hand = middle + block.feed_forward(block.feed_forward_norm(middle))
    else:
        middle = block.attention_norm(x + block.attention(x, segments))
        by_hand = block.feed_forward_norm(middle + block.feed_forward(middle))
    torch.testing.assert_close(block(Stream(x, segments)).hidden, by_hand)


@pytest.mark.parametrize("positions", KINDS_OF_POSITIONS)
def test_dropout_acts_in_training_only(tiny, positions):
    tokens = torch.arange(20).view(2, 10)
    segments = torch.ones_like(tokens)
    with_dropout, without = Transformer(tiny(dropout=0.5, positions=positions)), Transformer(tiny(positions=positions))
    assert not torch.equal(with_dropout.train()(tokens, segments), with_dropout(tokens, segments))
    assert torch.equal(with_dropout.eval()(tokens, segments), without.eval()(tokens, segments))
    assert torch.equal(without.train()(tokens, segments), without.eval()(tokens, segments))


@pytest.mark.parametrize("positions", KINDS_OF_POSITIONS)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_decoder_token_attends_to_earlier_tokens_only(tiny, network, positions, norm_position):
    model = network(tiny(positions=positions, norm_position=norm_position))
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7] = 60
    before, after = (model(row, torch.ones_like(row)) for row in (tokens, changed))
    assert torch.equal(before[0, :7], after[0, :7])
    assert (before[0, 7:] != after[0, 7:]).any(dim=1).all()


@pytest.mark.parametrize("positions", KINDS_OF_POSITIONS)
def test_documents_of_a_packed_sample_do_not_mix(tiny, network, positions):
    model = network(tiny(positions=positions, document_mask=True))
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    logits = model(tokens, segments)
    changed = tokens.clone()
    changed[0, :4] = torch.tensor([40, 41, 42, 43])
    assert torch.equal(model(changed, segments)[0, 4:9], logits[0, 4:9])
    alone = model(tokens[:, 4:9], torch.ones(1, 5, dtype=torch.long))
    # Rotated by other angles, the same relative ones: equal but for rounding.
    torch.testing.assert_close(logits[:, 4:9], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 20])
def test_sliding_window_limits_the_visible_tokens(tiny, network, window):
    model, tokens = network(tiny(sliding_window=window, num_layers=1)), torch.arange(12)[None]
    assert changed_positions(model, (tokens, torch.ones_like(tokens)), 0, 4) == list(range(4, min(12, 4 + window)))


def test_encoder_window_has_half_on_each_side(tiny, network):
    model, tokens = network(tiny(**MODERN_BERT, sliding_window=5, num_layers=1)), torch.arange(12)[None]
    assert changed_positions(model, (tokens, torch.ones_like(tokens)), 0, 4) == [2, 3, 4, 5, 6]


def test_prefix_tokens_attend_to_one_another(tiny, network):
    model = network(tiny(prefix_attention=True, document_mask=True))
    tokens, segments = torch.arange(10)[None], torch.tensor([[-1, -1, -1, 1, 1, -2, -2, 2, 2, 0]])
    assert changed_positions(model, (tokens, segments), 0, 2) == [0, 1, 2, 3, 4]
    assert changed_positions(model, (tokens, segments), 0, 3) == [3, 4]
    assert changed_positions(model, (tokens, segments), 0, 6) == [5, 6, 7, 8]


def test_sliding_window_also_limits_a_prefix(tiny, network):
    model = network(tiny(prefix_attention=True, sliding_window=3, num_layers=1))
    tokens, segments = torch.arange(9)[None], torch.tensor([[-1, -1, -1, -1, -1, 1, 1, 1, 1]])
    assert changed_positions(model, (tokens, segments), 0, 4) == [0, 1, 2, 3, 4, 5, 6]
    assert changed_positions(model, (tokens, segments), 0, 1) == [0, 1, 2, 3]


@pytest.mark.parametrize("window", [None, 3])
def test_prefix_logits_with_a_cache_match_those_without(tiny, network, window):
    model, tokens = network(tiny(prefix_attention=True, sliding_window=window)), torch.arange(9)[None]
    segments = torch.tensor([[-1, -1, -1, -1, 1, 1, 1, 1, 1]])
    cache = KeyValueCache()
    read = [model(tokens[:, some], segments[:, some], cache=cache) for some in (slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 9))]
    torch.testing.assert_close(torch.cat(read, dim=1), model(tokens, segments))


@pytest.mark.parametrize("options", [BERT, MODERN_BERT], ids=["bert", "modern"])
def test_encoder_token_attends_to_its_document_without_padding(tiny, network, options):
    model = network(tiny(**options, document_mask=True))
    tokens, segments = torch.arange(10)[None], torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]])
    inputs = (tokens, segments) + ((torch.zeros_like(tokens),) if "token_types" in options else ())
    assert changed_positions(model, inputs, 0, 1) == [0, 1, 2, 3]
    assert changed_positions(model, inputs, 0, 6) == [4, 5, 6, 7]
    assert changed_positions(model, inputs, 0, 8) == [8, 9]


def test_token_types_change_logits_and_class_logits(tiny, network):
    model = network(tiny(**BERT, num_classes=3))
    tokens, types = torch.arange(8).view(2, 4), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    logits, classes = model(tokens, torch.ones_like(tokens), types)
    assert (logits.shape, classes.shape) == ((2, 4, 61), (2, 3))
    other_logits, other_classes = model(tokens, torch.ones_like(tokens), torch.zeros_like(types))
    assert (logits != other_logits).any() and (classes != other_classes).all()
    headless = network(tiny(**BERT, num_classes=3, token_head=False))
    assert headless(tokens, torch.ones_like(tokens), types)[1].shape == (2, 3)
    assert not any(parameter.shape == (61,) for parameter in headless.parameters())


@pytest.mark.parametrize("options", [TRANSFORMER, T5], ids=["transformer", "t5"])
def test_target_attends_to_its_past_and_its_own_source(tiny, network, options):
    model = network(tiny(**options))
    inputs = SOURCE, SOURCE_SEGMENTS, TARGET, TARGET_SEGMENTS
    assert changed_positions(model, inputs, 0, 2)[:3] == [0, 1, 2] and not set(changed_positions(model, inputs, 0, 2)) & set(range(3, 8))
    assert set(changed_positions(model, inputs, 0, 3)) - {8} == set(range(3, 8))
    assert not set(changed_positions(model, inputs, 0, 6)) & set(range(8))  # padding
    assert changed_positions(model, inputs, 2, 4) == [4, 5, 6, 7]


@pytest.mark.parametrize("options", [TRANSFORMER, T5], ids=["transformer", "t5"])
def test_packed_pairs_match_single_pairs(tiny, network, options):
    model = network(tiny(**options))
    packed = model(SOURCE, SOURCE_SEGMENTS, TARGET, TARGET_SEGMENTS)
    alone = model(SOURCE[:, 3:5], torch.ones(1, 2, dtype=torch.long), TARGET[:, 3:8], torch.ones(1, 5, dtype=torch.long))
    torch.testing.assert_close(packed[:, 3:8], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [TRANSFORMER, T5], ids=["transformer", "t5"])
def test_target_read_in_pieces_with_a_cache_matches_the_whole(tiny, network, options):
    model = network(tiny(**options))
    source, source_segments = SOURCE.repeat(2, 1), torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    target = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 7, 8, 9, 10, 11]])
    whole, cache, rows = model(source, source_segments, target, torch.ones_like(target)), KeyValueCache(), torch.tensor([1, 0, 1])
    for some in (slice(0, 1), slice(1, 2), slice(2, 4)):
        read = model(source, source_segments, target[:, some], torch.ones_like(target[:, some]), cache=cache)
        torch.testing.assert_close(read, whole[:, some], rtol=0, atol=1e-5)
    cache.select(rows)
    last = target[rows, 4:]
    read = model(source[rows], source_segments[rows], last, torch.ones_like(last), cache=cache)
    torch.testing.assert_close(read, whole[rows, 4:], rtol=0, atol=1e-5)


def test_softcapped_logits_match_the_formula(tiny, network):
    tokens = torch.arange(8)[None]
    for tied in (True, False):
        free, capped = (network(tiny(tie_embeddings=tied, logit_softcap=cap))(tokens, torch.ones_like(tokens)) for cap in (None, 0.3))
        torch.testing.assert_close(capped, 0.3 * torch.tanh(free / 0.3))


def test_segments_have_no_effect_without_document_mask(tiny, network):
    model, tokens = network(tiny()), torch.arange(8)[None]
    assert torch.equal(model(tokens, torch.ones_like(tokens)), model(tokens, torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0]])))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"document_mask": True}, MODERN_BERT, T5], ids=["plain", "masked", "encoder", "t5"])
def test_recomputation_gives_identical_loss_and_gradients(tiny, dropout, options):
    config = tiny(dropout=dropout, **options)
    tokens = torch.arange(20).view(2, 10)
    segments = torch.tensor([[1] * 5 + [2] * 5] * 2)
    inputs = (tokens, segments) * (2 if config.architecture == "encoder_decoder" else 1)
    answers = []
    for recompute in (False, True):
        model = Transformer(config, recompute=recompute).train()
        torch.manual_seed(3)
        loss = F.cross_entropy(model(*inputs).flatten(0, 1), tokens.flatten())
        loss.backward()
        answers.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain_loss, plain), (recomputed_loss, recomputed) = answers
    assert torch.equal(plain_loss, recomputed_loss)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize(
    "options",
    [{"tie_embeddings": False}, {"tie_embeddings": True}, BERT | {"num_classes": 2}, T5],
    ids=["untied", "tied", "bert", "t5"],
)
def test_initial_weights_do_not_depend_on_build_order(tiny, options):
    config = tiny(**{"positions": "learned"} | options)
    state = Transformer(config, seed=7).state_dict()
    torch.manual_seed(99)  # nor on the global generator
    for number, layer in reversed(list(enumerate(layers(config, seed=7)))):
        place = str(number) if layer.tied_key is None else f"tied_modules.{layer.tied_key}"
        for name, parameter in layer.module(*layer.arguments).named_parameters():
            assert torch.equal(state[f"{place}.{name}"], parameter)


@pytest.mark.parametrize("options", [{}, BERT | {"num_classes": 61}, TRANSFORMER | {"positions": "learned"}, T5], ids=str)
def test_no_two_matrices_start_equal(tiny, options):
    config = tiny(**{"positions": "learned", "tie_embeddings": False, "sequence_length": 61} | options)
    matrices = {
        f"{seed} {name}": weight for seed in (0, 1) for name, weight in Transformer(config, seed).named_parameters() if weight.ndim == 2
    }
    for (one, first), (other, second) in itertools.combinations(matrices.items(), 2):
        assert first.shape != second.shape or not torch.equal(first, second), (one, other)


def test_layers_that_write_to_the_residual_stream_start_smaller(tiny):
    model = Transformer(tiny(hidden_size=128, num_layers=8, initializer_range=0.05))
    for block in model.blocks():
        for module in (block.attention.output, block.feed_forward.down):
            assert module.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
        for module in (block.attention.query, block.attention.key, block.attention.value, block.feed_forward.up):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_tied_embeddings_are_one_parameter(tiny):
    assert sum(weight.shape == (61, 32) for _, weight in Transformer(tiny(tie_embeddings=True)).named_parameters()) == 1
    assert sum(weight.shape == (61, 32) for _, weight in Transformer(tiny(tie_embeddings=False)).named_parameters()) == 2
