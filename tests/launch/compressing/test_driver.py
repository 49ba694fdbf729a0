"""Tests of the pass that compresses, on small networks with known results."""

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
def compress_network(tmp_path):
    """Return a function that compresses a network of random weights, and returns the network, the layer store and the printed lines."""

    def run(config: ModelConfig, method: BlockMethod, stored_as=torch.float32, state_type=dict):
        network, printed = Transformer(config), []
        state = {name: parameter.detach() for name, parameter in network.named_parameters()}
        inputs = random_inputs(config)
        samples = samples_of(inputs)
        store = LayerStore(tmp_path / "out", {})
        store.open()
        compress(config, state_type(state), method, samples, store, find_workers([]), stored_as, printed.append)
        store.close()
        return network, store, printed

    return run


def test_block_gets_the_outputs_of_the_changed_blocks_before_it(compress_network):
    """The gathered statistics are those of the finished network."""
    config, moments = ModelConfig(**SMALL), {}

    def halved(block, linear, weight, statistics):
        moments[f"{block + 1}.{linear}.weight"] = statistics.second_moment
        return Changed(weight / 2)

    network, store, printed = compress_network(config, BlockMethod(halved))
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
    before = {"1.attention.query.weight", "2.attention.query.weight"}  # in a block, the other matrices read the outputs of unchanged ones
    for name in before:
        torch.testing.assert_close(moments[name], seen[name].T @ seen[name], rtol=1e-4, atol=1e-4)
    assert len(moments) == 14 and "block 2 of 2 | 7 matrices | output error: 0.5000 to 0.5000" in printed[-1]


def test_scales_move_between_layers_without_changing_the_network(compress_network):
    config = ModelConfig(**SMALL, **MARIAN)
    scaled = []

    def scales(block, group, weights, statistics):
        scaled.append(group)
        return None if group.producer is None else statistics.magnitude.clamp(min=0.1)

    method = BlockMethod(lambda block, linear, weight, statistics: None, scales)
    network, store, _ = compress_network(config, method)
    other = Transformer(config)
    other.load_state_dict(DequantizedWeights(store))
    inputs = random_inputs(config)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs), network(*inputs), rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(one, two) for one, two in zip(other.parameters(), network.parameters(), strict=True)) and scaled


def test_codes_are_read_back_and_unchanged_weights_rounded_once(compress_network):
    grid = Grid("int", 4, 32, symmetric=False)

    def change(block, linear, weight, statistics):
        codes = round_to(weight, grid, torch.bfloat16)
        return Changed(codes.weight(), codes) if linear == "feed_forward.up" else None

    network, store, _ = compress_network(ModelConfig(**SMALL), BlockMethod(change), torch.bfloat16)
    assert set(store) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        stored = store[name]
        if isinstance(stored, Quantized):
            assert name.endswith("feed_forward.up.weight")
            wanted = round_to(parameter.bfloat16().float(), grid, torch.bfloat16)
            assert all(torch.equal(getattr(stored, piece), getattr(wanted, piece)) for piece in ("codes", "scale", "zero_point"))
        else:
            assert torch.equal(stored, parameter.bfloat16())


def test_one_layer_is_in_memory_at_a_time(compress_network):
    alive: list[weakref.ref] = []

    class Watched:
        """Keeps a weak reference to each layer."""

        def __init__(self, step):
            self.module = step.module

        def __enter__(self):
            alive.append(weakref.ref(self.module))

        def __exit__(self, *_):
            del self.module

    class Read(dict):
        def __getitem__(self, name):
            assert all(other() is None for other in alive), f"a layer was still in memory when {name} was read"
            return super().__getitem__(name)

    gc.disable()  # layers must be freed by their reference counts
    try:
        method = BlockMethod(lambda block, linear, weight, statistics: Changed(weight), watch=Watched)
        compress_network(ModelConfig(**SMALL | {"num_layers": 10}), method, state_type=Read)
    finally:
        gc.enable()
    assert len(alive) == 12  # with the embedding and the norm before the head


def test_single_process_is_rank_0_of_1():
    workers = find_workers([])
    assert workers.process == Process(0, 1, 0, 1) and workers.is_first and workers.share([1, 2, 3]) == [1, 2, 3]
