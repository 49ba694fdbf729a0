import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.layers import Attention, Block, FeedForward, LayerNorm, Positions, RMSNorm, rotate
from model.transformer import Transformer, layers

KINDS_OF_POSITIONS = ("learned", "sinusoidal", "rotary")


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
def test_attention_is_ten_lines_of_numpy(tiny, randomise, num_key_value_heads):
    config = tiny(positions="learned", num_key_value_heads=num_key_value_heads, head_size=6)
    attention = randomise(Attention(config, 0, seed=0)).double()
    hidden = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = attention(hidden, torch.ones(2, 9, dtype=torch.long)).detach()
    weights = {name: getattr(attention, name).weight.detach().numpy() for name in ("query", "key", "value", "output")}
    for row in range(2):
        by_hand = attention_in_numpy(hidden[row].numpy(), weights, 4, num_key_value_heads)
        np.testing.assert_allclose(mixed[row].numpy(), by_hand, rtol=1e-12, atol=1e-12)


def test_rotary_positions_are_relative():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(50, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    score = lambda m, n: (rotate(query, angles[m].cos(), angles[m].sin()) * rotate(key, angles[n].cos(), angles[n].sin())).sum().item()  # noqa: E731
    assert score(7, 3) == pytest.approx(score(44, 40), abs=1e-12)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    assert score(5, 5) == pytest.approx((query * key).sum().item(), abs=1e-12)


def test_sinusoidal_positions_are_the_formula(tiny):
    config = tiny(positions="sinusoidal", hidden_size=6, num_attention_heads=1)
    embedding = torch.zeros(1, 5, 6)
    added, _ = Positions(config, seed=0).eval()((embedding, torch.ones(1, 5, dtype=torch.long)))
    for place in range(5):
        for pair in range(3):
            angle = place / 10000 ** (2 * pair / 6)
            assert added[0, place, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert added[0, place, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_norms_by_hand():
    x = torch.tensor([1.0, 2.0, 6.0])
    norm = RMSNorm(3, epsilon=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    by_hand = torch.tensor([1.0, 4.0, 18.0]) / math.sqrt((1 + 4 + 36) / 3 + 0.5)
    torch.testing.assert_close(norm(x), by_hand)
    norm = LayerNorm(3, epsilon=0.5, bias=True)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    by_hand = torch.tensor([-2.0, -2.0, 9.0]) / math.sqrt((4 + 1 + 9) / 3 + 0.5) + torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close(norm(x), by_hand)


def test_feed_forward_by_hand(tiny, randomise):
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
    module = randomise(FeedForward(tiny(activation="swiglu"), 0, seed=0))
    gate = x @ module.gate.weight.T
    torch.testing.assert_close(module(x), (gate * torch.sigmoid(gate) * (x @ module.up.weight.T)) @ module.down.weight.T)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_block_normalises_before_or_behind(tiny, randomise, norm_position):
    block = randomise(Block(tiny(norm_position=norm_position), 0, seed=0))
    x, segments = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1, 5, dtype=torch.long)
    if norm_position == "pre":
        middle = x + block.attention(block.attention_norm(x), segments)
        by_hand = middle + block.feed_forward(block.feed_forward_norm(middle))
    else:
        middle = block.attention_norm(x + block.attention(x, segments))
        by_hand = block.feed_forward_norm(middle + block.feed_forward(middle))
    torch.testing.assert_close(block((x, segments))[0], by_hand)


@pytest.mark.parametrize("positions", KINDS_OF_POSITIONS)
def test_dropout_acts_in_training_alone(tiny, positions):
    tokens = torch.arange(20).view(2, 10)
    segments = torch.ones_like(tokens)
    with_dropout, without = Transformer(tiny(dropout=0.5, positions=positions)), Transformer(tiny(positions=positions))
    assert not torch.equal(with_dropout.train()(tokens, segments), with_dropout(tokens, segments))
    assert torch.equal(with_dropout.eval()(tokens, segments), without.eval()(tokens, segments))
    assert torch.equal(without.train()(tokens, segments), without.eval()(tokens, segments))


@pytest.mark.parametrize("positions", KINDS_OF_POSITIONS)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_token_sees_only_what_stands_before_it(tiny, network, positions, norm_position):
    model = network(tiny(positions=positions, norm_position=norm_position))
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7] = 60
    before, after = (model(row, torch.ones_like(row)) for row in (tokens, changed))
    assert torch.equal(before[0, :7], after[0, :7])
    assert (before[0, 7:] != after[0, 7:]).any(dim=1).all()


@pytest.mark.parametrize("positions", KINDS_OF_POSITIONS)
def test_documents_of_a_packed_sample_do_not_touch(tiny, network, positions):
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


def test_without_a_document_mask_the_segments_are_not_read(tiny, network):
    model, tokens = network(tiny()), torch.arange(8)[None]
    assert torch.equal(model(tokens, torch.ones_like(tokens)), model(tokens, torch.tensor([[1, 1, 1, 2, 2, 2, 0, 0]])))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("document_mask", [False, True])
def test_recomputation_changes_no_bit_of_loss_or_gradient(tiny, dropout, document_mask):
    config = tiny(dropout=dropout, document_mask=document_mask)
    tokens = torch.arange(20).view(2, 10)
    segments = torch.tensor([[1] * 5 + [2] * 5] * 2)
    answers = []
    for recompute in (False, True):
        model = Transformer(config, recompute=recompute).train()
        torch.manual_seed(3)
        loss = F.cross_entropy(model(tokens, segments).flatten(0, 1), tokens.flatten())
        loss.backward()
        answers.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain_loss, plain), (recomputed_loss, recomputed) = answers
    assert torch.equal(plain_loss, recomputed_loss)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_weights_do_not_depend_on_the_order_of_building(tiny, tie_embeddings):
    config = tiny(positions="learned", tie_embeddings=tie_embeddings)
    state = Transformer(config, seed=7).state_dict()
    torch.manual_seed(99)  # nor on the global generator
    for number, layer in reversed(list(enumerate(layers(config, seed=7)))):
        place = str(number) if layer.tied_key is None else f"tied_modules.{layer.tied_key}"
        for name, parameter in layer.module(*layer.arguments).named_parameters():
            assert torch.equal(state[f"{place}.{name}"], parameter)


def test_every_matrix_has_numbers_of_its_own(tiny):
    config = tiny(positions="learned", tie_embeddings=False, sequence_length=61)
    matrices = {
        f"{seed} {name}": weight for seed in (0, 1) for name, weight in Transformer(config, seed).named_parameters() if weight.ndim == 2
    }
    for (one, first), (other, second) in itertools.combinations(matrices.items(), 2):
        assert first.shape != second.shape or not torch.equal(first, second), (one, other)


def test_what_writes_to_the_residual_stream_starts_smaller(tiny):
    model = Transformer(tiny(hidden_size=128, num_layers=8, initializer_range=0.05))
    for block in model.blocks():
        for module in (block.attention.output, block.feed_forward.down):
            assert module.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
        for module in (block.attention.query, block.attention.key, block.attention.value, block.feed_forward.up):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_tied_embeddings_are_one_parameter(tiny):
    assert sum(weight.shape == (61, 32) for _, weight in Transformer(tiny(tie_embeddings=True)).named_parameters()) == 1
    assert sum(weight.shape == (61, 32) for _, weight in Transformer(tiny(tie_embeddings=False)).named_parameters()) == 2
