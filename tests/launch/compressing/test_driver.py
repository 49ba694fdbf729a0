"""The walk that compresses, on networks whose answer is known."""

import gc
import weakref

import pytest
import torch

from launch.compressing.driver import BlockMethod, compress
from launch.compressing.layer_store import DequantizedWeights, LayerStore
from launch.compressing.workers import find_workers
from launch.ranks.processes import Process
from model.compression.grids import Grid, Quantized, round_to
from model.compression.quantization import Changed
from model.config import ModelConfig
from model.transformer import Transformer
from tests.launch.compressing.conftest import SMALL
from tests.model.both_sides import MARIAN, random_inputs, samples_of


@pytest.fixture
def walked(tmp_path):
    """A function that compresses a network of fresh weights; its state before, the store, and what was said."""

    def run(config: ModelConfig, method: BlockMethod, stored_as=torch.float32, reading=dict):
        network, said = Transformer(config), []
        state = {name: parameter.detach() for name, parameter in network.named_parameters()}
        inputs = random_inputs(config)
        samples = samples_of(inputs)
        store = LayerStore(tmp_path / "out", {})
        store.open()
        compress(config, reading(state), method, samples, store, find_workers([]), stored_as, said.append)
        store.close()
        return network, store, said

    return run


def test_a_block_sees_the_inputs_that_the_changed_ones_before_it_give(walked):
    """What was gathered in the walk, and what passes through the finished network, are the same."""
    config, moments = ModelConfig(**SMALL), {}

    def halved(block, linear, weight, statistics):
        moments[f"{block + 1}.{linear}.weight"] = statistics.second_moment
        return Changed(weight / 2)

    network, store, said = walked(config, BlockMethod(halved))
    network.load_state_dict(DequantizedWeights(store))
    seen = {}

    def watch(name):
        def see(module, given):
            seen[name] = given[0].flatten(0, 1)

        return see

    for name in moments:
        network.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        network(*random_inputs(config))
    before = {"1.attention.query.weight", "2.attention.query.weight"}  # within a block the others read what its unchanged ones say
    for name in before:
        torch.testing.assert_close(moments[name], seen[name].T @ seen[name], rtol=1e-4, atol=1e-4)
    assert len(moments) == 14 and "block 2 of 2 | 7 matrices | output error: 0.5000 to 0.5000" in said[-1]


def test_scales_move_between_layers_and_the_network_stays(walked):
    config = ModelConfig(**SMALL, **MARIAN)
    scaled = []

    def scales(block, group, weights, statistics):
        scaled.append(group)
        return None if group.producer is None else statistics.magnitude.clamp(min=0.1)

    method = BlockMethod(lambda block, linear, weight, statistics: None, scales)
    network, store, _ = walked(config, method)
    other = Transformer(config)
    other.load_state_dict(DequantizedWeights(store))
    inputs = random_inputs(config)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs), network(*inputs), rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(one, two) for one, two in zip(other.parameters(), network.parameters(), strict=True)) and scaled


def test_codes_come_back_as_they_were_and_what_stays_is_rounded_once(walked):
    grid = Grid("int", 4, 32, symmetric=False)

    def change(block, linear, weight, statistics):
        codes = round_to(weight, grid, torch.bfloat16)
        return Changed(codes.weight(), codes) if linear == "feed_forward.up" else None

    network, store, _ = walked(ModelConfig(**SMALL), BlockMethod(change), torch.bfloat16)
    assert set(store) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        stored = store[name]
        if isinstance(stored, Quantized):
            assert name.endswith("feed_forward.up.weight")
            wanted = round_to(parameter.bfloat16().float(), grid, torch.bfloat16)
            assert all(torch.equal(getattr(stored, piece), getattr(wanted, piece)) for piece in ("codes", "scale", "zero_point"))
        else:
            assert torch.equal(stored, parameter.bfloat16())


def test_one_layer_is_in_memory_at_a_time_however_deep_the_network(walked):
    alive: list[weakref.ref] = []

    class Watched:
        """Notes each layer."""

        def __init__(self, step):
            self.module = step.module

        def __enter__(self):
            alive.append(weakref.ref(self.module))

        def __exit__(self, *_):
            del self.module

    class Read(dict):
        def __getitem__(self, name):
            assert all(other() is None for other in alive), f"a layer was there still when {name} was read"
            return super().__getitem__(name)

    gc.disable()  # what goes must go by itself
    try:
        method = BlockMethod(lambda block, linear, weight, statistics: Changed(weight), watch=Watched)
        walked(ModelConfig(**SMALL | {"num_layers": 10}), method, reading=Read)
    finally:
        gc.enable()
    assert len(alive) == 12  # with the embedding and the norm before the head


def test_a_person_alone_is_the_first_of_one():
    workers = find_workers([])
    assert workers.process == Process(0, 1, 0, 1) and workers.is_first and workers.share([1, 2, 3]) == [1, 2, 3]
