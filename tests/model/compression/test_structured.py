"""Tests of structured pruning: which parts are chosen, and that the smaller network computes the same without the removed parts."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from model.compression.statistics import InputStatistics
from model.compression.structured import (
    Channels,
    influences,
    losses_without_each_block,
    reduce_widths,
    remove_blocks,
    remove_inputs,
    sizes_for,
)
from model.config import count_parameters
from model.huggingface import export, verify
from model.layers import Stream
from model.transformer import Transformer, select_outputs
from model.walk import walk
from tests.model.both_sides import BERT, GPT2, MARIAN, T5, our_logits, random_inputs, samples_of, without_padding

SIZES = {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 8}
MODELS = {
    "llama": {},
    "llama, biases": {"biases": True, "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "num_attention_heads": 6, "num_key_value_heads": 3},
    "gpt2": GPT2 | {"num_key_value_heads": 4},
    "bert": BERT | {"num_key_value_heads": 4, "num_classes": 2},
    "marian": MARIAN | {"num_key_value_heads": 4, "num_layers": 3, "num_decoder_layers": 2},
    "t5": T5 | {"num_key_value_heads": 4},
}


@pytest.fixture(params=MODELS)
def model(request, tiny, network):
    config = tiny(**(SIZES | MODELS[request.param]))
    return config, network(config).state_dict()


@pytest.fixture
def llama(tiny, network):
    config = tiny(**SIZES, num_layers=4)
    return config, network(config).state_dict()


def logits(config, state):
    network = Transformer(config).eval()
    network.load_state_dict(dict(state))
    inputs = random_inputs(config)
    with torch.no_grad():
        return without_padding(our_logits(network(*inputs), config), config, inputs)


def assert_equal_logits(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def blocks_of(config, state):
    return [step.name for step in walk(config, state) if step.block is not None]


def with_zero_columns(config, state, units, linear, unit=1):
    """Return the state with zero columns of random units, different for each weight."""
    state, generator = dict(state), torch.Generator().manual_seed(0)
    for name in state:
        if name.endswith(f"{linear}.weight"):
            count = state[name].shape[1] // unit
            removed = torch.randperm(count, generator=generator)[: count - units]
            columns = (removed[:, None] * unit + torch.arange(unit)).flatten()
            state[name] = state[name].index_fill(1, columns, 0.0)
    return state


def channels(config, state, samples):
    sums, streams = Channels(), list(samples)
    for step in walk(config, state):
        with sums.watching(step):
            streams = [step(sample) for sample in streams]
    return sums


def statistics(inputs):
    moment = inputs.T @ inputs
    return InputStatistics(len(inputs), moment, inputs.abs().mean(dim=0), inputs.abs().amax(dim=0))


def test_most_important_columns_are_kept_and_compensate_the_others():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    changed = remove_inputs(weight, statistics(inputs), keep=2, unit=3, damping=1e-7).weight
    added = [(inputs[:, start : start + 3] @ weight[:, start : start + 3].T).norm() for start in range(0, 12, 3)]
    kept = sorted(unit * 3 + index for unit in torch.tensor(added).topk(2).indices.tolist() for index in range(3))
    assert changed.abs().sum(dim=0).nonzero().flatten().tolist() == kept
    fitted = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    torch.testing.assert_close(changed[:, kept], fitted, rtol=1e-3, atol=1e-3)


def test_duplicate_inputs_are_removed_without_loss():
    inputs = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat((inputs, inputs), dim=1)
    weight = torch.cat((torch.ones(3, 6), 2 * torch.ones(3, 6)), dim=1)
    changed = remove_inputs(weight, statistics(inputs), keep=6, damping=1e-6).weight
    torch.testing.assert_close(inputs @ changed.T, inputs @ weight.T, rtol=1e-3, atol=1e-3)
    assert remove_inputs(weight, statistics(0 * inputs), keep=6).weight.isfinite().all()


def test_removing_neurons_with_zero_columns_keeps_all_logits(model):
    config, state = model
    smaller = dataclasses.replace(config, intermediate_size=24)
    state = with_zero_columns(config, state, 24, "feed_forward.down")
    cut = reduce_widths(config, state, smaller)
    assert sum(tensor.numel() for tensor in cut.values()) == count_parameters(smaller)
    assert_equal_logits(logits(smaller, cut), logits(config, state))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "marian"])
def test_removing_head_groups_with_zero_columns_keeps_all_logits(tiny, network, name):
    config = tiny(**(SIZES | MODELS[name]))
    state, group = network(config).state_dict(), config.num_attention_heads // config.num_key_value_heads
    heads = config.num_key_value_heads - 1
    smaller = dataclasses.replace(config, num_key_value_heads=heads, num_attention_heads=heads * group)
    state = with_zero_columns(config, state, heads, "attention.output", group * config.head_size)
    cut = reduce_widths(config, state, smaller)
    assert sum(tensor.numel() for tensor in cut.values()) == count_parameters(smaller)
    assert_equal_logits(logits(smaller, cut), logits(config, state))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3"])
def test_removing_zero_channels_keeps_all_logits(tiny, network, name):
    """The root mean square over fewer channels is larger, which the norms' gains compensate."""
    config = tiny(**(SIZES | MODELS[name] | {"hidden_size": 32, "norm_epsilon": 1e-9}))
    state, removed = network(config).state_dict(), [0, 5, 6, 20, 30, 31, 7, 9]
    for name, tensor in state.items():
        if any(name.endswith(f"{writer}.{kind}") for writer in ("output", "down") for kind in ("weight", "bias")):
            state[name] = tensor.index_fill(0, torch.tensor(removed), 0.0)
    first = next(iter(walk(config, state))).name
    state[f"{first}.weight"] = state[f"{first}.weight"].index_fill(1, torch.tensor(removed), 0.0)
    sums = channels(config, state, [Stream.from_tensors(random_inputs(config))])
    assert sorted(set(range(32)) - set(sums.kept(24).tolist())) == sorted(removed)
    smaller = dataclasses.replace(config, hidden_size=24)
    cut = reduce_widths(config, state, smaller, sums)
    assert sum(tensor.numel() for tensor in cut.values()) == count_parameters(smaller)
    assert_equal_logits(logits(smaller, cut), logits(config, state))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "marian"])  # its positions depend on the width
def test_every_axis_of_the_hidden_width_is_cut(tiny, network, name):
    config = tiny(**(SIZES | MODELS[name]))
    state = network(config).state_dict()
    smaller = dataclasses.replace(config, hidden_size=24)
    cut = reduce_widths(config, state, smaller, channels(config, state, [Stream.from_tensors(random_inputs(config))]))
    assert all(one.isfinite().all() for one in logits(smaller, cut))


def test_model_with_all_sizes_reduced_loads_in_transformers(llama, tmp_path):
    config, state = llama
    samples = [Stream.from_tensors(random_inputs(config))]
    smaller = sizes_for(config, parameters=0.3, num_key_value_heads=1, hidden_size=24, num_layers=2)
    shallow = dataclasses.replace(config, num_layers=2)
    state = remove_blocks(config, state, shallow, influences(config, state, samples))
    cut = reduce_widths(shallow, state, smaller, channels(shallow, state, samples))
    export(smaller, cut, tmp_path / "smaller")
    verify(tmp_path / "smaller", smaller, cut)


def test_sums_equal_those_of_all_samples_without_padding(tiny, network):
    config = tiny(**(SIZES | MODELS["bert"]))
    state, (tokens, segments, types) = network(config).state_dict(), random_inputs(config)
    samples = samples_of((tokens, segments, types))
    whole = channels(config, state, [Stream(tokens, segments, types)])
    for name, sums in channels(config, state, samples).sums.items():
        torch.testing.assert_close(sums, whole.sums[name], rtol=1e-5, atol=1e-4)  # the sum within a sample is float32
    other = Stream(tokens.where(segments != 0, 7), segments, types)
    torch.testing.assert_close(influences(config, state, samples), influences(config, state, [other]))


def test_block_that_adds_nothing_has_no_influence_and_can_be_removed(llama):
    config, state = llama
    unused = blocks_of(config, state)[1]
    for linear in ("attention.output", "feed_forward.down"):
        state[f"{unused}.{linear}.weight"] = torch.zeros_like(state[f"{unused}.{linear}.weight"])
    smaller = dataclasses.replace(config, num_layers=3)
    importance = influences(config, state, [Stream.from_tensors(random_inputs(config))])
    assert importance.argmin() == 1 and abs(importance[1]) < 1e-4
    cut = remove_blocks(config, state, smaller, importance)
    assert_equal_logits(logits(smaller, cut), logits(config, state))


def test_influence_is_one_minus_the_cosine_of_input_and_output(llama):
    config, state = llama
    sample, expected = Stream.from_tensors(random_inputs(config)), []
    stream = sample
    for step in walk(config, state):
        before, stream = stream.hidden, step(stream)
        if step.block is not None:
            expected.append((1 - (before * stream.hidden).sum(-1) / before.norm(dim=-1) / stream.hidden.norm(dim=-1)).sum())
    torch.testing.assert_close(influences(config, state, [sample]).float(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "marian"])
def test_losses_equal_those_of_networks_without_the_block(tiny, network, name):
    config = tiny(**(SIZES | MODELS[name]))
    state, inputs = network(config).state_dict(), random_inputs(config)
    target = inputs[2] if config.architecture == "encoder_decoder" else inputs[0]
    loss = lambda logits, number: F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")  # noqa: E731
    losses = losses_without_each_block(config, state, [Stream.from_tensors(inputs)], loss)
    assert len(losses) == 1 + config.total_blocks
    for removed_block in range(-1, config.total_blocks):
        stream = Stream.from_tensors(inputs)
        for step in walk(config, state):
            stream = stream if step.block == removed_block and removed_block >= 0 else step(stream)
        assert math.isclose(losses[1 + removed_block], loss(select_outputs(config, stream), 0), rel_tol=1e-5)


def test_blocks_of_encoder_and_decoder_are_chosen_separately(tiny, network):
    config = tiny(**(SIZES | MODELS["marian"]))
    state = network(config).state_dict()
    smaller = dataclasses.replace(config, num_layers=1, num_decoder_layers=1)
    cut = remove_blocks(config, state, smaller, torch.tensor([0.0, 2.0, 1.0, 0.5, 0.1]))
    names = blocks_of(config, state)
    for new, old in zip(blocks_of(smaller, cut), (names[1], names[3]), strict=True):
        assert torch.equal(cut[f"{new}.attention.query.weight"], state[f"{old}.attention.query.weight"])
    assert all(one.isfinite().all() for one in logits(smaller, cut))


@pytest.mark.parametrize("share", [0.95, 0.75])
def test_feed_forward_width_keeps_the_share_of_parameters(tiny, share):
    config = tiny(intermediate_size=128)
    smaller = sizes_for(config, parameters=share)
    assert smaller == dataclasses.replace(config, intermediate_size=smaller.intermediate_size)
    wider = dataclasses.replace(config, intermediate_size=smaller.intermediate_size + 8)
    assert count_parameters(smaller) <= share * count_parameters(config) < count_parameters(wider)


def test_sizes_are_as_given_and_query_heads_follow_key_value_heads(tiny):
    config = tiny(**SIZES)
    smaller = sizes_for(config, num_key_value_heads=1, hidden_size=16, num_layers=1)
    assert (smaller.num_attention_heads, smaller.head_size, smaller.hidden_size, smaller.num_layers) == (2, 8, 16, 1)


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({}, {}, "Nothing would be removed"),
        ({}, {"intermediate_size": 41}, "intermediate_size 41 is not possible: this model has 40"),
        ({}, {"hidden_size": 0}, "hidden_size 0 is not possible"),
        ({}, {"num_decoder_layers": 1}, "num_decoder_layers 1 is not possible: this model has None"),
        ({}, {"parameters": 1.5}, "above 0 and below 1"),
        ({}, {"parameters": 0.2}, "cannot be reached with the feed-forward width alone: intermediate_size 8 leaves 0."),
        ({}, {"parameters": 0.5, "intermediate_size": 8}, "give only one of them"),
        ({}, {"hidden_size": 30}, "not a multiple of num_attention_heads"),
        (GPT2 | {"num_key_value_heads": 4}, {"num_key_value_heads": 3}, "no counterpart in GPT-2"),
        (MARIAN | {"num_key_value_heads": 4}, {"hidden_size": 16}, 'with model.positions "sinusoidal"'),
        (T5 | {"num_key_value_heads": 4}, {"num_key_value_heads": 2}, 'with model.positions "relative"'),
    ],
)
def test_impossible_sizes_are_refused_by_name(tiny, options, sizes, message):
    with pytest.raises(ValueError, match=message):
        sizes_for(tiny(**(SIZES | options)), **sizes)
