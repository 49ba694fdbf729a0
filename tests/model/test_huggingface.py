import json
import struct
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.generation import generate
from model.huggingface import architecture, export, from_huggingface, load, to_huggingface, verify
from model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")

GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "biases": True}
MODELS = {
    "gpt2": ("gpt2", GPT2 | {"dropout": 0.1}),
    "gpt2, untied, narrow": ("gpt2", GPT2 | {"tie_embeddings": False, "intermediate_size": 40, "activation": "relu"}),
    "llama": ("llama", {}),
    "llama, untied, grouped": ("llama", {"tie_embeddings": False, "num_key_value_heads": 2, "head_size": 6, "rope_theta": 500.0}),
    "llama, biases": ("llama", {"biases": True, "norm_epsilon": 1e-3}),
    "qwen3": ("qwen3", {"qk_norm": True, "num_key_value_heads": 1, "head_size": 10, "hidden_size": 30, "intermediate_size": 44}),
    "qwen3, untied": ("qwen3", {"qk_norm": True, "tie_embeddings": False}),
}


@pytest.fixture(params=MODELS)
def model(request, tiny, network):
    name, options = MODELS[request.param]
    config = tiny(**options)
    assert architecture(config) == name
    return config, network(config)


@pytest.fixture
def llama(tiny, network):
    config = tiny()
    return config, network(config).state_dict()


def rewrite(folder, **changes):
    """config.json with other values; None takes a key out."""
    path = folder / "config.json"
    stated = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_we_export(model, tmp_path, dtype, max_shard_bytes):
    config, network = model
    export(config, network.state_dict(), tmp_path / "out", end_of_text=3, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or max_shard_bytes == 10_000
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == dtype and theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 3
    rounded = Transformer(config).eval()
    rounded.load_state_dict({name: tensor.to(dtype).float() for name, tensor in network.state_dict().items()})
    tokens = torch.randint(config.vocab_size, (2, config.sequence_length), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(tokens, torch.ones_like(tokens)), theirs.float()(tokens).logits, rtol=0, atol=1e-5)
    assert verify(tmp_path / "out", config, network.state_dict()) < 1e-5


def test_there_and_back_is_the_identity(model, tmp_path):
    config, network = model
    export(config, network.state_dict(), tmp_path / "out", max_shard_bytes=10_000)
    same_config, state = load(tmp_path / "out")
    assert list(state) and set(state) == set(network.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert same_config == config or config.dropout  # which Llama's file does not state
    assert from_huggingface(to_huggingface(config)) == same_config


def test_what_we_export_transformers_writes_again_for_us(model, tmp_path):
    config, network = model
    export(config, network.state_dict(), tmp_path / "ours")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same_config, state = load(tmp_path / "theirs")
    assert same_config == load(tmp_path / "ours")[0]
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_transformers_continues_a_prompt_as_we_do(model, tmp_path):
    config, network = model
    export(config, network.state_dict(), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[5, 9, 2]])
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False, pad_token_id=0)
    ours = torch.stack(list(generate(network, prompt, 15, temperature=0, sequence_length=config.sequence_length)), dim=1)
    assert torch.equal(continued[:, 3:], ours)


def test_a_gpt2_without_biases_is_one_with_zeros(tiny, network, tmp_path):
    config = tiny(**(GPT2 | {"biases": False}))
    state = network(config).state_dict()
    export(config, state, tmp_path / "out")
    assert verify(tmp_path / "out", config, state) < 1e-5
    with_biases, read = load(tmp_path / "out")
    assert with_biases.biases and all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_our_file_is_the_librarys_own(llama, tmp_path):
    export(*llama, tmp_path / "out")
    ours = tmp_path / "out" / "model.safetensors"
    tensors = load_file(ours)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "theirs.safetensors").items())
    header_bytes = struct.unpack("<Q", ours.read_bytes()[:8])[0]
    assert (8 + header_bytes) % 8 == 0
    assert ours.stat().st_size == 8 + header_bytes + sum(tensor.nbytes for tensor in tensors.values())


def test_an_export_asks_for_one_tensor_at_a_time(tiny, tmp_path):
    config = tiny(**GPT2)
    whole, asked = Transformer(config).state_dict(), []

    class Lazy(Mapping):
        def __getitem__(self, name):
            asked.append(name)
            return whole[name]

        def __iter__(self):
            return iter(whole)

        def __len__(self):
            return len(whole)

    export(config, Lazy(), tmp_path / "out", max_shard_bytes=10_000)
    assert sorted(asked) == sorted(whole)
    config, state = load(tmp_path / "out")  # and what was read lazily can be written again
    export(config, state, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"positions": "sinusoidal"}, ['model.positions "sinusoidal" has no counterpart in any architecture']),
        ({"norm_position": "post"}, ['model.norm_position "post" has no counterpart in Llama']),
        ({"norm": "layernorm"}, ['model.norm "layernorm" has no counterpart in Llama']),
        ({"activation": "relu"}, ['model.activation "relu" has no counterpart in Llama']),
        ({"qk_norm": True, "biases": True}, ["model.biases true has no counterpart in Qwen3"]),
        ({"hidden_size": 30, "head_size": 8}, ["model.hidden_size 30 is no multiple of num_attention_heads 4"]),
        (GPT2 | {"norm": "rmsnorm"}, ['model.norm "rmsnorm" has no counterpart in GPT-2']),
        (GPT2 | {"activation": "swiglu"}, ['model.activation "swiglu" has no counterpart in GPT-2']),
        (GPT2 | {"qk_norm": True}, ["model.qk_norm true has no counterpart in GPT-2"]),
        (GPT2 | {"num_key_value_heads": 2}, ["model.num_key_value_heads 2 has no counterpart in GPT-2"]),
        (GPT2 | {"head_size": 10}, ["model.head_size 10 has no counterpart in GPT-2"]),
        (
            {"norm": "layernorm", "activation": "gelu", "norm_position": "post"},
            ["model.norm ", "model.activation ", "model.norm_position "],
        ),
    ],
)
def test_an_option_without_a_counterpart_is_refused_by_name(tiny, tmp_path, options, sentences):
    config = tiny(**options)
    with pytest.raises(ValueError) as refusal:
        export(config, Transformer(config).state_dict(), tmp_path / "out")
    assert all(sentence in str(refusal.value) for sentence in sentences)
    assert not list(tmp_path.iterdir())


def test_the_document_mask_and_dropout_stand_in_no_ones_way(tiny, network, tmp_path):
    config = tiny(document_mask=True, dropout=0.2)
    state = network(config).state_dict()
    export(config, state, tmp_path / "out")
    assert verify(tmp_path / "out", config, state) < 1e-5


def test_an_existing_folder_is_refused(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ValueError, match="out exists already"):
        export(*llama, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_export_that_fails_leaves_nothing(llama, tmp_path):
    def fail(folder):
        assert (folder / "config.json").exists()
        raise RuntimeError("the tokenizer is not there")

    with pytest.raises(RuntimeError, match="the tokenizer"):
        export(*llama, tmp_path / "out", complete=fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_state_of_another_model_is_refused(llama, tmp_path, change):
    config, state = llama
    if change == "missing":
        del state["1.attention.key.weight"]
    elif change == "unknown":
        state["9.weight"] = torch.zeros(3)
    else:
        state["1.attention.key.weight"] = torch.zeros(3, 32)
    name = "9.weight" if change == "unknown" else "1.attention.key.weight"
    with pytest.raises(ValueError, match=name):
        export(config, state, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_verification_finds_one_changed_weight(llama, tmp_path):
    config, state = llama
    export(config, state, tmp_path / "out")
    changed = state | {"2.feed_forward.down.weight": state["2.feed_forward.down.weight"] * 1.01}
    with pytest.raises(RuntimeError, match="logits differ from ours by up to"):
        verify(tmp_path / "out", config, changed)


@pytest.mark.parametrize(("change", "kind"), [("missing", "missing_keys"), ("unknown", "unexpected_keys")])
def test_verification_finds_a_tensor_missing_or_too_many(llama, tmp_path, change, kind):
    export(*llama, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(128)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=kind):
        verify(tmp_path / "out", *llama)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mistral"}, 'model_type "mistral" is not one of gpt2, llama, qwen3.'),
        ({"auto_map": {"AutoModel": "code.Model"}}, '"auto_map" is not supported.'),
        ({"quantization_config": {"quant_method": "gptq"}}, '"quantization_config" is not supported.'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is supported"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is supported'),
        ({"attention_bias": True}, "mlp_bias is false; only true is supported beside that attention_bias"),
        ({"mlp_bias": True}, "mlp_bias is true; only false is supported beside that attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope scaling "yarn" is not supported.'),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope scaling "linear" is not supported.'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported."),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_hidden_layers": None}, '"num_hidden_layers" is missing.'),
        ({"hidden_size": 64}, "config.json says"),
        ({"num_hidden_layers": 3}, "lacks: model.layers.2."),
        ({"num_hidden_layers": 1}, "has unknown tensors: model.layers.1."),
        ({"intermediate_size": 64}, "is [128, 32]; config.json says [64, 32]."),
    ],
)
def test_a_llama_folder_that_is_not_ours_is_refused_by_name(llama, tmp_path, changes, sentence):
    export(*llama, tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(ValueError) as refusal:
        load(tmp_path / "out")
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; only false is supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false; only true is supported"),
        ({"activation_function": "quick_gelu"}, 'activation_function is "quick_gelu"; supported are gelu_new, gelu, relu.'),
        ({"attn_pdrop": 0.5}, "only one dropout for all is supported."),
    ],
)
def test_a_gpt2_folder_that_is_not_ours_is_refused_by_name(tiny, tmp_path, changes, sentence):
    config = tiny(**GPT2)
    export(config, Transformer(config).state_dict(), tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(ValueError) as refusal:
        load(tmp_path / "out")
    assert sentence in str(refusal.value)


def test_sliding_windows_and_biases_of_qwen3_are_refused(tiny, tmp_path):
    config = tiny(qk_norm=True)
    export(config, Transformer(config).state_dict(), tmp_path / "out")
    rewrite(tmp_path / "out", use_sliding_window=True, attention_bias=True)
    with pytest.raises(ValueError, match=r"(?s)attention_bias is true.*use_sliding_window is true"):
        load(tmp_path / "out")


def test_old_spellings_are_read(tiny, network, tmp_path):
    """The first GPT-2 files lack the outer name and hold masks; the first Llama files hold wavelengths and no rope_parameters."""
    config = tiny(**GPT2)
    state = network(config).state_dict()
    export(config, state, tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.0.attn.masked_bias": torch.tensor(-1e4)}, path)
    assert all(torch.equal(state[name], tensor) for name, tensor in load(tmp_path / "gpt2")[1].items())

    config = tiny(rope_theta=500.0)
    state = network(config).state_dict()
    export(config, state, tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(path)
    inverse_wavelengths = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | inverse_wavelengths | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    rewrite(tmp_path / "llama", rope_parameters=None, head_dim=None, attention_bias=None, mlp_bias=None)
    same_config, read = load(tmp_path / "llama")
    assert same_config == config
    assert all(torch.equal(state[name], tensor) for name, tensor in read.items())
    save_file(tensors | {"lm_head.weight": torch.ones(61, 32)}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path / "llama")


def test_pickled_weights_are_refused(llama, tmp_path):
    export(*llama, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"x": "../model.safetensors"}, r"names \.\./model.safetensors, which is not a file of"),
        ({"x": "gone.safetensors"}, "names gone.safetensors, which is not a file of"),
        ([], "is not an index"),
        ({"x": 3}, "names 3, which is not a file of"),
    ],
)
def test_a_bad_index_is_refused(llama, tmp_path, weight_map, sentence):
    export(*llama, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "out")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(llama, tmp_path, left):
    export(*llama, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load(tmp_path / "out")


@pytest.mark.parametrize(("contents", "sentence"), [(None, "has no config.json"), ("{", "config.json"), ("[]", "config.json")])
def test_a_folder_without_a_configuration_is_refused(tmp_path, contents, sentence):
    if contents is not None:
        (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)
