"""Counted activations equal what autograd keeps in a real forward pass."""

import dataclasses

import pytest
import torch

from launch.ranks.layout import Layout
from launch.training.planning.activations import DTYPES, block_bytes, block_input_bytes
from launch.training.planning.memory import activation_bytes, stack_bytes
from model.config import ModelConfig
from model.layers import Stream
from model.transformer import Block, Transformer

SMALL = ModelConfig(vocab_size=100, sequence_length=128, hidden_size=64, num_layers=2, num_attention_heads=4, intermediate_size=160)


def kept_bytes(module: torch.nn.Module, *inputs: object) -> int:
    """Bytes of the distinct storages that a real forward pass keeps, without weights and tables."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = module(*inputs)
    assert outputs is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def real_block(model: ModelConfig, sequences: int, tokens: int, precision: str) -> int:
    part = "encoder" if model.architecture == "encoder" else "decoder"
    block = Block(model, 0, 0, part=part).to(DTYPES[precision])
    hidden = torch.randn(sequences, tokens, model.hidden_size, dtype=DTYPES[precision], requires_grad=True)
    stream = Stream(hidden, torch.ones(sequences, tokens, dtype=torch.int32))
    if model.architecture == "encoder_decoder":
        stream = stream._replace(encoding=torch.randn_like(hidden, requires_grad=True), source_segments=stream.segments)
    return kept_bytes(block, stream)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 2},
        {"dropout": 0.1},
        {"qk_norm": True},
        {"norm_position": "post"},
        {"document_mask": True},
        {"positions": "alibi"},
        {"activation": "geglu"},
        {"activation": "relu", "biases": True},
        {"architecture": "encoder"},
        {"architecture": "encoder_decoder"},
    ],
    ids=str,
)
def test_counted_bytes_of_a_block_are_those_of_a_real_forward_pass(options, precision):
    model = dataclasses.replace(SMALL, **options)
    for sequences in (1, 3):
        assert block_bytes(model, sequences, 128, "cpu", precision) == real_block(model, sequences, 128, precision)


def test_counted_bytes_of_a_long_sequence_are_those_of_fused_attention():
    model = dataclasses.replace(SMALL, sequence_length=1536, num_key_value_heads=2)
    assert block_bytes(model, 1, 1536, "cpu") == real_block(model, 1, 1536, "bf16")


def test_statistics_of_layernorm_differ_by_little():
    """On a CPU they are bf16, in the count float32, as on a GPU."""
    model = dataclasses.replace(SMALL, norm="layernorm", biases=True)
    assert block_bytes(model, 2, 128, "cpu") == pytest.approx(real_block(model, 2, 128, "bf16"), rel=0.005)


def test_gpu_count_of_a_block_by_hand():
    """A block of Llama in bf16. The same sum for llama3-8b is 43.03 bytes a token over the hidden size."""
    h, heads, keys, inner = 64, 4, 2, 160
    model = dataclasses.replace(SMALL, num_key_value_heads=keys)
    norms = 2 * (2 * h + 2 * h + 4)  # input and output of each norm, and the inverse root of the mean square in float32
    attention = 2 * (h + 2 * h * keys // heads) + 2 * 2 * h + 4 * heads  # queries, keys, values; result, also with heads last; sums
    feed_forward = 4 * 2 * inner  # gate, its activation, up, and their product
    assert block_bytes(model, 1, 2048) == 2048 * (norms + attention + feed_forward)


def test_tensor_parallelism_divides_heads_and_feed_forward_only():
    whole, half = (block_bytes(SMALL, 1, 2048, tensor_parallel_size=size) for size in (1, 2))
    inputs_and_norms = 2048 * 2 * (2 * 64 + 2 * 64 + 4)
    assert half - inputs_and_norms == (whole - inputs_and_norms) / 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_keeps_its_blocks_and_little_more(tied):
    model = dataclasses.replace(SMALL, num_layers=3, tie_embeddings=tied)
    network = Transformer(model).to(torch.bfloat16)
    tokens = torch.zeros(2, 128, dtype=torch.int64)
    kept = kept_bytes(network, tokens, torch.ones(2, 128, dtype=torch.int32))
    counted = activation_bytes(model, 2, 128, "cpu", "bf16")
    around = 2 * 128 * (8 + 64 * (4 + 4 + 2))  # token ids; the final norm in float32, twice, and its result
    assert counted <= kept <= counted + around + 4096


def test_recomputation_keeps_the_inputs_of_blocks_and_one_block():
    model = dataclasses.replace(SMALL, num_layers=3)
    network, inputs = Transformer(model, recompute=True).to(torch.bfloat16), []
    for block in network.blocks():
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].hidden))
    network(torch.zeros(2, 128, dtype=torch.int64), torch.ones(2, 128, dtype=torch.int32))
    stored = sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in inputs}.values())
    assert stack_bytes(model, 2, 128, "cpu", "bf16", True, 1) == stored == 3 * block_input_bytes(model, 2, 128)
    assert activation_bytes(model, 2, 128, "cpu", "bf16", True) == stored + block_bytes(model, 2, 128, "cpu")


def test_sequence_parallelism_gives_each_rank_its_part():
    whole = activation_bytes(SMALL, 1, 4096, "cuda", "bf16")
    assert activation_bytes(SMALL, 1, 4096, "cuda", "bf16", layout=Layout(4, sequence_parallel_size=4)) == whole / 4
