"""The walk over the list of layers gives the network's outputs with one layer in memory."""

import gc
import weakref

import pytest
import torch

from model.layers import Stream
from model.transformer import Block
from model.walk import outputs, walk
from tests.model.both_sides import BERT, GPT2, MARIAN, T5, random_inputs, samples_of

FAMILIES = {"llama": {}, "gpt2": GPT2, "bert": BERT | {"num_classes": 3}, "marian": MARIAN, "t5": T5}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_outputs_layer_by_layer_match_the_whole_network(tiny, network, options):
    config = tiny(**options)
    whole, inputs = network(config), random_inputs(config)
    samples = samples_of(inputs)
    with torch.no_grad():
        for said, sample in zip(outputs(config, dict(whole.named_parameters()), samples), samples, strict=True):
            wanted = whole(*sample.tensors())
            for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (said, wanted)), strict=True):
                assert torch.equal(one, other)


def test_walk_rounds_weights_and_turns_dropout_off(tiny, network):
    config = tiny(dropout=0.5)
    whole = network(config)
    inputs = random_inputs(config)
    (said,) = outputs(config, dict(whole.named_parameters()), [Stream.from_tensors(inputs)], stored_as=torch.bfloat16)
    with torch.no_grad():
        assert not torch.equal(said, whole(*inputs))
        for parameter in whole.parameters():
            parameter.copy_(parameter.bfloat16())
        assert torch.equal(said, whole(*inputs))


def test_walk_holds_one_layer_in_memory_at_a_time(tiny, network):
    config, alive = tiny(num_layers=12), []
    state, read = dict(network(config).named_parameters()), []

    class Read(dict):
        def __getitem__(self, name):
            assert all(other() is None for other in alive), f"a layer was still in memory when {name} was read"
            read.append(name)
            return state[name].detach().clone()

    gc.disable()  # a layer must be freed without it
    try:
        for step in walk(config, Read(state)):
            assert {name.partition(".")[0] for name in read} == {step.name.partition(".")[0]}
            alive.append(weakref.ref(step.module))
            assert (step.block is not None) == isinstance(step.module, Block)
            read.clear()
            del step
    finally:
        gc.enable()
    assert len(alive) == 15
