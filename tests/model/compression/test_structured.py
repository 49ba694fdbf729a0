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


def assert_says_the_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def blocks_of(config, state):
    return [step.name for step in walk(config, state) if step.block is not None]


def zeroed(config, state, units, linear, unit=1):
    """The state with zero columns: in each block other units, and in cross-attention others again."""
    state, generator = dict(state), torch.Generator().manual_seed(0)
    for name in state:
        if name.endswith(f"{linear}.weight"):
            count = state[name].shape[1] // unit
            gone = torch.randperm(count, generator=generator)[: count - units]
            columns = (gone[:, None] * unit + torch.arange(unit)).flatten()
            state[name] = state[name].index_fill(1, columns, 0.0)
    return state


def channels(config, state, samples):
    found, passed = Channels(), list(samples)
    for step in walk(config, state):
        with found.watching(step):
            passed = [step(sample) for sample in passed]
    return found


def statistics(inputs):
    moment = inputs.T @ inputs
    return InputStatistics(len(inputs), moment, inputs.abs().mean(dim=0), inputs.abs().amax(dim=0))


def test_columns_stay_that_add_most_and_take_over_the_others_by_least_squares():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    changed = remove_inputs(weight, statistics(inputs), keep=2, unit=3, damping=1e-7).weight
    added = [(inputs[:, start : start + 3] @ weight[:, start : start + 3].T).norm() for start in range(0, 12, 3)]
    kept = sorted(unit * 3 + place for unit in torch.tensor(added).topk(2).indices.tolist() for place in range(3))
    assert changed.abs().sum(dim=0).nonzero().flatten().tolist() == kept
    fitted = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    torch.testing.assert_close(changed[:, kept], fitted, rtol=1e-3, atol=1e-3)


def test_inputs_that_repeat_others_go_without_loss():
    inputs = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat((inputs, inputs), dim=1)
    weight = torch.cat((torch.ones(3, 6), 2 * torch.ones(3, 6)), dim=1)
    changed = remove_inputs(weight, statistics(inputs), keep=6, damping=1e-6).weight
    torch.testing.assert_close(inputs @ changed.T, inputs @ weight.T, rtol=1e-3, atol=1e-3)
    assert remove_inputs(weight, statistics(0 * inputs), keep=6).weight.isfinite().all()


def test_neurons_with_columns_of_zeros_go_and_no_logit_changes(model):
    config, state = model
    smaller = dataclasses.replace(config, intermediate_size=24)
    state = zeroed(config, state, 24, "feed_forward.down")
    cut = reduce_widths(config, state, smaller)
    assert sum(tensor.numel() for tensor in cut.values()) == count_parameters(smaller)
    assert_says_the_same(logits(smaller, cut), logits(config, state))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "marian"])
def test_groups_of_heads_with_columns_of_zeros_go_and_no_logit_changes(tiny, network, name):
    config = tiny(**(SIZES | MODELS[name]))
    state, group = network(config).state_dict(), config.num_attention_heads // config.num_key_value_heads
    heads = config.num_key_value_heads - 1
    smaller = dataclasses.replace(config, num_key_value_heads=heads, num_attention_heads=heads * group)
    state = zeroed(config, state, heads, "attention.output", group * config.head_size)
    cut = reduce_widths(config, state, smaller)
    assert sum(tensor.numel() for tensor in cut.values()) == count_parameters(smaller)
    assert_says_the_same(logits(smaller, cut), logits(config, state))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3"])
def test_channels_of_zeros_go_and_no_logit_changes(tiny, network, name):
    """The root mean square over fewer channels is larger: the norms' gains make up for that."""
    config = tiny(**(SIZES | MODELS[name] | {"hidden_size": 32, "norm_epsilon": 1e-9}))
    state, gone = network(config).state_dict(), [0, 5, 6, 20, 30, 31, 7, 9]
    for name, tensor in state.items():
        if any(name.endswith(f"{writer}.{kind}") for writer in ("output", "down") for kind in ("weight", "bias")):
            state[name] = tensor.index_fill(0, torch.tensor(gone), 0.0)
    first = next(iter(walk(config, state))).name
    state[f"{first}.weight"] = state[f"{first}.weight"].index_fill(1, torch.tensor(gone), 0.0)
    found = channels(config, state, [Stream.from_tensors(random_inputs(config))])
    assert sorted(set(range(32)) - set(found.kept(24).tolist())) == sorted(gone)
    smaller = dataclasses.replace(config, hidden_size=24)
    cut = reduce_widths(config, state, smaller, found)
    assert sum(tensor.numel() for tensor in cut.values()) == count_parameters(smaller)
    assert_says_the_same(logits(smaller, cut), logits(config, state))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "marian"])  # whose waves depend on the width
def test_every_axis_of_the_hidden_width_is_cut(tiny, network, name):
    config = tiny(**(SIZES | MODELS[name]))
    state = network(config).state_dict()
    smaller = dataclasses.replace(config, hidden_size=24)
    cut = reduce_widths(config, state, smaller, channels(config, state, [Stream.from_tensors(random_inputs(config))]))
    assert all(one.isfinite().all() for one in logits(smaller, cut))


def test_what_is_smaller_in_everything_loads_in_transformers(llama, tmp_path):
    config, state = llama
    samples = [Stream.from_tensors(random_inputs(config))]
    smaller = sizes_for(config, parameters=0.3, num_key_value_heads=1, hidden_size=24, num_layers=2)
    shallow = dataclasses.replace(config, num_layers=2)
    state = remove_blocks(config, state, shallow, influences(config, state, samples))
    cut = reduce_widths(shallow, state, smaller, channels(shallow, state, samples))
    export(smaller, cut, tmp_path / "smaller")
    verify(tmp_path / "smaller", smaller, cut)


def test_sums_are_those_of_all_samples_together_and_padding_does_not_count(tiny, network):
    config = tiny(**(SIZES | MODELS["bert"]))
    state, (tokens, segments, types) = network(config).state_dict(), random_inputs(config)
    samples = samples_of((tokens, segments, types))
    whole = channels(config, state, [Stream(tokens, segments, types)])
    for name, sums in channels(config, state, samples).sums.items():
        torch.testing.assert_close(sums, whole.sums[name], rtol=1e-5, atol=1e-4)  # a sample's own sum is float32
    other = Stream(tokens.where(segments != 0, 7), segments, types)
    torch.testing.assert_close(influences(config, state, samples), influences(config, state, [other]))


def test_a_block_that_adds_nothing_has_no_influence_and_goes_without_a_trace(llama):
    config, state = llama
    silent = blocks_of(config, state)[1]
    for linear in ("attention.output", "feed_forward.down"):
        state[f"{silent}.{linear}.weight"] = torch.zeros_like(state[f"{silent}.{linear}.weight"])
    smaller = dataclasses.replace(config, num_layers=3)
    found = influences(config, state, [Stream.from_tensors(random_inputs(config))])
    assert found.argmin() == 1 and abs(found[1]) < 1e-4
    cut = remove_blocks(config, state, smaller, found)
    assert_says_the_same(logits(smaller, cut), logits(config, state))


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_comes_out(llama):
    config, state = llama
    sample, wanted = Stream.from_tensors(random_inputs(config)), []
    stream = sample
    for step in walk(config, state):
        before, stream = stream.hidden, step(stream)
        if step.block is not None:
            wanted.append((1 - (before * stream.hidden).sum(-1) / before.norm(dim=-1) / stream.hidden.norm(dim=-1)).sum())
    torch.testing.assert_close(influences(config, state, [sample]).float(), torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "marian"])
def test_losses_without_blocks_are_those_of_the_networks_without_them(tiny, network, name):
    config = tiny(**(SIZES | MODELS[name]))
    state, inputs = network(config).state_dict(), random_inputs(config)
    target = inputs[2] if config.architecture == "encoder_decoder" else inputs[0]
    loss = lambda logits, number: F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")  # noqa: E731
    found = losses_without_each_block(config, state, [Stream.from_tensors(inputs)], loss)
    assert len(found) == 1 + config.total_blocks
    for left_out in range(-1, config.total_blocks):
        passed = Stream.from_tensors(inputs)
        for step in walk(config, state):
            passed = passed if step.block == left_out and left_out >= 0 else step(passed)
        assert math.isclose(found[1 + left_out], loss(select_outputs(config, passed), 0), rel_tol=1e-5)


def test_of_an_encoder_decoder_each_stack_loses_its_own_blocks(tiny, network):
    config = tiny(**(SIZES | MODELS["marian"]))
    state = network(config).state_dict()
    smaller = dataclasses.replace(config, num_layers=1, num_decoder_layers=1)
    cut = remove_blocks(config, state, smaller, torch.tensor([0.0, 2.0, 1.0, 0.5, 0.1]))
    names = blocks_of(config, state)
    for new, old in zip(blocks_of(smaller, cut), (names[1], names[3]), strict=True):
        assert torch.equal(cut[f"{new}.attention.query.weight"], state[f"{old}.attention.query.weight"])
    assert all(one.isfinite().all() for one in logits(smaller, cut))


@pytest.mark.parametrize("share", [0.95, 0.75])
def test_the_feed_forward_gets_so_narrow_that_a_share_of_the_parameters_is_left(tiny, share):
    config = tiny(intermediate_size=128)
    smaller = sizes_for(config, parameters=share)
    assert smaller == dataclasses.replace(config, intermediate_size=smaller.intermediate_size)
    wider = dataclasses.replace(config, intermediate_size=smaller.intermediate_size + 8)
    assert count_parameters(smaller) <= share * count_parameters(config) < count_parameters(wider)


def test_sizes_are_what_was_asked_and_query_heads_follow_theirs(tiny):
    config = tiny(**SIZES)
    smaller = sizes_for(config, num_key_value_heads=1, hidden_size=16, num_layers=1)
    assert (smaller.num_attention_heads, smaller.head_size, smaller.hidden_size, smaller.num_layers) == (2, 8, 16, 1)


@pytest.mark.parametrize(
    ("options", "asked", "sentence"),
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
def test_sizes_that_cannot_be_are_refused_by_name(tiny, options, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        sizes_for(tiny(**(SIZES | options)), **asked)
