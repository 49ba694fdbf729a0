"""Tests of GGUF files: transformers computes our logits from them, they are read back exactly, and unsupported models are refused."""

import dataclasses
import errno
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from data.files import new_file
from model.compression import gguf_file
from tests.model.both_sides import BERT, GPT2

pytest.importorskip("transformers", reason="the independent reference is transformers")

TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"word{number}" for number in range(61)],
    "tokenizer.ggml.scores": [0.0] * 61,
    "tokenizer.ggml.token_type": [1] * 61,
}
# The cases cover a feed-forward width of 96 (3 blocks of 32), grouped heads of size 8, and rope factors in a tensor.
NETWORKS = {
    "llama": {"hidden_size": 64, "num_key_value_heads": 2, "tie_embeddings": False},
    "llama, biases, Llama 3.1's rope scaling": {
        "hidden_size": 64,
        "biases": True,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
        "rope_original_length": 16,
    },
    "qwen3": {"qk_norm": True, "hidden_size": 64, "head_size": 8},
    "gpt2": GPT2 | {"hidden_size": 64, "intermediate_size": 96},
}


@pytest.fixture
def written(tiny, network, tmp_path):
    def write(kind: str, **options):
        config = tiny(**options)
        state = {name: weight.detach() for name, weight in network(config).named_parameters()}
        gguf_file.write(config, state, TOKENIZER, tmp_path / "model.gguf", kind)
        return config, state, tmp_path / "model.gguf"

    return write


def test_lists_of_the_tokenizer_are_skipped(tiny, network, tmp_path, monkeypatch):
    config, path = tiny(), tmp_path / "model.gguf"
    state = {name: weight.detach() for name, weight in network(config).named_parameters()}
    lists = {
        "tokens": [f"é{number}" for number in range(5000)],
        "scores": 5000 * [0.5],
        "token_type": 5000 * [1],
        "flags": [True, False, True],
    }
    gguf_file.write(config, state, TOKENIZER | {f"tokenizer.ggml.{name}": values for name, values in lists.items()}, path, "f32")
    num_read, read = [], gguf.GGUFReader._get
    monkeypatch.setattr(gguf.GGUFReader, "_get", lambda *arguments, **options: (num_read.append(1), read(*arguments, **options))[1])
    assert gguf_file.verify(path, config) < 1e-5 and gguf_file.types(path).total() > 10
    assert 0 < len(num_read) < 3000
    assert all(torch.equal(weight, state[name]) for name, weight in gguf_file.GGUFState(path, config).items())


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_transformers_gives_our_logits_and_all_weights_are_read_back(written, options):
    config, state, path = written("f32", **options)
    assert gguf_file.verify(path, config) < 1e-5
    read = gguf_file.GGUFState(path, config)
    assert set(read) == set(state) and all(torch.equal(read[name], weight) for name, weight in state.items())
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="logits of transformers differ from ours"):
        gguf_file.verify(path, dataclasses.replace(config, norm_epsilon=0.1))
    assert gguf_file.logits(config, read, tokens).shape == (2, 24, 61)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16"])
def test_weights_read_back_equal_those_quantized_by_the_gguf_package(written, kind):
    config, state, path = written(kind, **NETWORKS["llama"])
    assert gguf_file.verify(path, config) < 1e-5
    head = next(name for name, weight in reversed(state.items()) if weight.ndim == 2)
    for name, weight in gguf_file.GGUFState(path, config).items():
        stored = gguf.GGMLQuantizationType[("q8_0" if kind == "q4_0" and name == head else kind).upper() if weight.ndim == 2 else "F32"]
        assert np.array_equal(weight.numpy(), gguf.dequantize(gguf.quantize(state[name].numpy(), stored), stored)), name
    # 8 bits: the error is at most half a step, which is the largest weight of a block / 127; the largest weight of all bounds every block.
    if kind == "q8_0":
        assert all(
            (weight - state[name]).abs().max() <= 0.51 * state[name].abs().max() / 127
            for name, weight in gguf_file.GGUFState(path, config).items()
        )


def test_rows_that_blocks_do_not_divide_are_stored_as_float16(written):
    config, _, path = written("q4_0", **NETWORKS["gpt2"] | {"intermediate_size": 80})
    assert gguf_file.indivisible(config, 32) == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert gguf_file.types(path)["f16"] == 2 and gguf_file.verify(path, config) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BERT, "GGUF supports decoders only"),
        ({"qk_norm": True, "sliding_window": 8}, "model.sliding_window 8 is not supported by llama.cpp's qwen3"),
        (GPT2 | {"activation": "relu"}, 'model.activation "relu" is not supported by llama.cpp\'s gpt2'),
        (
            {"qk_norm": True, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 16},
            'model.rope_scaling "llama3" is not supported by',
        ),
    ],
)
def test_option_that_llama_cpp_lacks_is_refused_by_name(written, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        written("f16", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "value"), [("f32", float("nan")), ("f16", 1e5)])
def test_nan_or_too_large_weight_is_named_and_leaves_no_file(tiny, network, tmp_path, kind, value):
    config = tiny()
    state = {name: weight.detach().clone() for name, weight in network(config).named_parameters()}
    name = "2.feed_forward.up.weight"
    state[name][1, 2] = value
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=name), new_file(path) as unfinished:
        gguf_file.write(config, state, TOKENIZER, unfinished, kind)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_refused_before_anything_is_written(tiny, network, tmp_path, monkeypatch):
    config = tiny()
    state = {name: weight.detach() for name, weight in network(config).named_parameters()}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ValueError, match=r"model\.gguf needs [\d,]+ bytes; its disk has 5 free"):
        gguf_file.write(config, state, TOKENIZER, tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("message", "number"), [("512 requested and 8 written", errno.ENOSPC), ("not a file", None)])
def test_only_a_write_that_was_cut_short_is_reported_as_a_full_disk(tiny, network, tmp_path, monkeypatch, message, number):
    def failing(self, tensor):
        raise OSError(message)

    config = tiny()
    state = {name: weight.detach() for name, weight in network(config).named_parameters()}
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    with pytest.raises(OSError) as error:
        gguf_file.write(config, state, TOKENIZER, tmp_path / "model.gguf", "f32")
    assert error.value.errno == number


def test_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="nothing is overwritten"), new_file(path) as unfinished:
        unfinished.write_bytes(b"new")
        path.write_bytes(b"old")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
