"""Tests of Hugging Face checkpoints: transformers loads our exports, we load its folders, and unsupported features are refused."""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.files import new_folder
from model.cache import KeyValueCache
from model.config import SIZES, ModelConfig, named_size
from model.generation import generate
from model.huggingface import (
    SpecialTokens,
    architecture,
    auto_class,
    decoder_start,
    export,
    from_huggingface,
    load,
    to_huggingface,
    verify,
    verify_source,
)
from model.huggingface.choice import ARCHITECTURES
from model.huggingface.llama import Llama
from model.transformer import Transformer
from tests.model.both_sides import BERT, GPT2, MARIAN, T5, our_logits, random_inputs, their_logits, without_padding
from tests.ranks import REPOSITORY

transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")

LONGER = {"rope_factor": 4.0, "rope_original_length": 6}
MODELS = {
    "gpt2": ("gpt2", GPT2 | {"dropout": 0.1}),
    "gpt2, untied, narrow": ("gpt2", GPT2 | {"tie_embeddings": False, "intermediate_size": 40, "activation": "relu"}),
    "llama": ("llama", {}),
    "llama, untied, grouped": ("llama", {"tie_embeddings": False, "num_key_value_heads": 2, "head_size": 6, "rope_theta": 500.0}),
    "llama, biases": ("llama", {"biases": True, "norm_epsilon": 1e-3}),
    "llama, linear": ("llama", {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama, yarn": ("llama", LONGER | {"rope_scaling": "yarn"}),
    "llama, llama3": ("llama", LONGER | {"rope_scaling": "llama3"}),
    "qwen3": ("qwen3", {"qk_norm": True, "num_key_value_heads": 1, "head_size": 10, "hidden_size": 30, "intermediate_size": 44}),
    "qwen3, untied": ("qwen3", {"qk_norm": True, "tie_embeddings": False}),
    "qwen3, yarn, window": ("qwen3", LONGER | {"qk_norm": True, "rope_scaling": "yarn", "sliding_window": 5}),
    "bert": ("bert", BERT | {"dropout": 0.1}),
    "bert, next sentence": ("bert", BERT | {"num_classes": 2, "activation": "gelu_tanh"}),
    "bert, classes": ("bert", BERT | {"num_classes": 3, "token_head": False, "activation": "relu"}),
    "marian": ("marian", MARIAN | {"num_decoder_layers": 3, "dropout": 0.1}),
    "marian, gelu": ("marian", MARIAN | {"num_layers": 1, "num_decoder_layers": 2, "activation": "gelu"}),
    # Transformers 5 cannot generate from a T5 whose decoder is deeper than its encoder: its cache has the encoder's depth.
    "t5": ("t5", T5 | {"num_layers": 3, "num_decoder_layers": 2, "dropout": 0.1}),
    "t5, tied": ("t5", T5 | {"tie_embeddings": True, "activation": "relu", "head_size": 6}),
}
GENERATING = [name for name in MODELS if not name.startswith("bert")]


def build(name, tiny, network):
    kind, options = MODELS[name]
    config = tiny(**options)
    assert architecture(config) == kind
    return config, network(config)


@pytest.fixture(params=MODELS)
def model(request, tiny, network):
    return build(request.param, tiny, network)


@pytest.fixture(params=GENERATING)
def generating(request, tiny, network):
    return build(request.param, tiny, network)


@pytest.fixture
def llama(tiny, network):
    config = tiny()
    return config, network(config).state_dict()


def load_by_transformers(folder, config, **options):
    return getattr(transformers, auto_class(config)).from_pretrained(folder, **options)


NULL = object()  # in changes of config.json, where None removes a key
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}


def rewrite(folder, **changes):
    """Change values in config.json; None removes a key."""
    path = folder / "config.json"
    config_json = json.loads(path.read_text()) | changes
    config_json = {key: value for key, value in config_json.items() if value is not None}
    path.write_text(json.dumps(config_json, default=lambda value: None))


@pytest.mark.parametrize(("dtype", "max_shard_bytes"), [(torch.float32, 10**9), (torch.bfloat16, 10_000)])
def test_transformers_loads_an_exported_folder(model, tmp_path, dtype, max_shard_bytes):
    config, network = model
    export(config, network.state_dict(), tmp_path / "out", SpecialTokens(3, 2), dtype, max_shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or max_shard_bytes == 10_000
    theirs, report = load_by_transformers(tmp_path / "out", config, output_loading_info=True)
    assert not any(report.values()), report
    assert (theirs.dtype, theirs.config.eos_token_id, theirs.config.pad_token_id) == (dtype, 3, 2)
    if config.architecture != "encoder":
        assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == (3, 2)
    if config.architecture == "encoder_decoder":
        assert theirs.generation_config.decoder_start_token_id == decoder_start(tmp_path / "out") == 3
    assert verify(tmp_path / "out", config, network.state_dict()) < 1e-5
    if dtype == torch.float32:
        inputs = random_inputs(config)
        for ours, expected in zip(our_logits(network(*inputs), config), their_logits(theirs.eval(), config, inputs), strict=True):
            torch.testing.assert_close(*(without_padding([one], config, inputs) for one in (ours, expected)), rtol=0, atol=1e-5)


def test_export_and_load_give_the_same_model(model, tmp_path):
    config, network = model
    export(config, network.state_dict(), tmp_path / "out", max_shard_bytes=10_000)
    same_config, state = load(tmp_path / "out")
    assert list(state) and set(state) == set(network.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert same_config == config == from_huggingface(to_huggingface(config))


def test_every_size_but_modern_bert_has_a_counterpart():
    for name in SIZES:
        config = ModelConfig(**named_size(name))
        if name.startswith("modern-bert"):
            with pytest.raises(ValueError, match="No Hugging Face architecture can express this model"):
                to_huggingface(config)
        else:
            assert from_huggingface(to_huggingface(config)) == config, name


def test_folder_saved_by_transformers_loads_the_same_weights(model, tmp_path):
    config, network = model
    export(config, network.state_dict(), tmp_path / "ours")
    load_by_transformers(tmp_path / "ours", config).save_pretrained(tmp_path / "theirs")
    same_config, state = load(tmp_path / "theirs")
    assert same_config == load(tmp_path / "ours")[0]
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_transformers_generates_the_same_tokens(generating, tmp_path):
    config, network = generating
    export(config, network.state_dict(), tmp_path / "out", SpecialTokens(3, 0))
    theirs = load_by_transformers(tmp_path / "out", config)
    greedy = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, segments, start = torch.tensor([[5, 9, 2], [7, 1, 4]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.full((2, 1), 3)
    if config.architecture == "decoder":
        continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)[:, 3:]
        steps = generate(network, prompt, 15, temperature=0, sequence_length=config.sequence_length)
    else:
        continued = theirs.generate(prompt, attention_mask=segments, **greedy)[:, 1:]
        decoder = functools.partial(network, prompt, segments)
        steps = generate(decoder, start, 15, temperature=0, sequence_length=config.sequence_length)
    assert torch.equal(continued, torch.stack(list(steps), dim=1))


def test_logits_with_a_cache_match_those_without(generating):
    config, network = generating
    *source, tokens, segments = random_inputs(config)
    cache = KeyValueCache()
    with torch.no_grad():
        whole = network(*source, tokens, segments)
        steps = [slice(0, 4), *(slice(position, position + 1) for position in range(4, 18))]
        parts = [network(*source, tokens[:, step], segments[:, step], cache=cache) for step in steps]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, :18], rtol=0, atol=1e-5)


def test_ntk_scaling_is_exported_as_a_larger_rope_base(tiny, network, tmp_path):
    config = tiny(rope_scaling="ntk", rope_factor=4.0)
    state = network(config).state_dict()
    export(config, state, tmp_path / "out")
    assert verify(tmp_path / "out", config, state) < 1e-5
    assert load(tmp_path / "out")[0].rope_theta == pytest.approx(10000 * 4 ** (8 / 6))


@pytest.mark.parametrize("options", [BERT | {"token_types": 0, "biases": False}, MARIAN | {"biases": False}], ids=["bert", "marian"])
def test_missing_biases_are_exported_as_zeros(tiny, network, tmp_path, options):
    config = tiny(**options)
    state = network(config).state_dict()
    export(config, state, tmp_path / "out")
    assert verify(tmp_path / "out", config, state) < 1e-5


def test_gpt2_without_biases_is_exported_with_zeros(tiny, network, tmp_path):
    config = tiny(**(GPT2 | {"biases": False}))
    state = network(config).state_dict()
    export(config, state, tmp_path / "out")
    assert verify(tmp_path / "out", config, state) < 1e-5
    with_biases, read = load(tmp_path / "out")
    assert with_biases.biases and all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_written_file_equals_that_of_the_safetensors_library(llama, tmp_path):
    export(*llama, tmp_path / "out")
    ours = tmp_path / "out" / "model.safetensors"
    tensors = load_file(ours)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "theirs.safetensors").items())
    header_bytes = struct.unpack("<Q", ours.read_bytes()[:8])[0]
    assert (8 + header_bytes) % 8 == 0
    assert ours.stat().st_size == 8 + header_bytes + sum(tensor.nbytes for tensor in tensors.values())


def test_export_reads_one_tensor_at_a_time(tiny, tmp_path):
    config = tiny(**GPT2)
    whole, accessed = Transformer(config).state_dict(), []

    class Lazy(Mapping):
        def __getitem__(self, name):
            accessed.append(name)
            return whole[name]

        def __iter__(self):
            return iter(whole)

        def __len__(self):
            return len(whole)

    export(config, Lazy(), tmp_path / "out", max_shard_bytes=10_000)
    assert sorted(accessed) == sorted(whole)
    config, state = load(tmp_path / "out")  # a state that is read lazily can be exported again
    export(config, state, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"positions": "sinusoidal"}, ['model.positions "sinusoidal" has no counterpart in Llama; it must be "rotary"']),
        ({"positions": "alibi"}, ['model.positions "alibi" has no counterpart in Llama']),
        ({"sliding_window": 4}, ["model.sliding_window 4 has no counterpart in Llama"]),
        ({"prefix_attention": True, "logit_softcap": 30.0}, ["model.prefix_attention true has", "model.logit_softcap 30.0 has"]),
        (BERT | {"norm_position": "pre", "positions": "rotary"}, ['model.norm_position "pre" has', 'model.positions "rotary" has']),
        (BERT | {"sliding_window": 4, "activation": "geglu"}, ["model.sliding_window 4 has", 'model.activation "geglu" has']),
        (BERT | {"num_classes": 3}, ["model.num_classes 3 has no counterpart in BERT together with model.token_head"]),
        (BERT | {"tie_embeddings": False}, ["model.tie_embeddings false has no counterpart in BERT"]),
        (MARIAN | {"norm_position": "pre", "norm_epsilon": 1e-6}, ['model.norm_position "pre" has', "model.norm_epsilon 1e-06 has"]),
        (MARIAN | {"positions": "rotary"}, ['model.positions "rotary" has no counterpart in Marian; it must be "sinusoidal"']),
        (T5 | {"norm_position": "post", "biases": True}, ['model.norm_position "post" has', "model.biases true has no counterpart in T5"]),
        (T5 | {"num_key_value_heads": 2}, ["model.num_key_value_heads 2 has no counterpart in T5"]),
        ({"norm_position": "post"}, ['model.norm_position "post" has no counterpart in Llama']),
        ({"norm": "layernorm"}, ['model.norm "layernorm" has no counterpart in Llama']),
        ({"activation": "relu"}, ['model.activation "relu" has no counterpart in Llama']),
        ({"qk_norm": True, "biases": True}, ["model.biases true has no counterpart in Qwen3"]),
        ({"hidden_size": 30, "head_size": 8}, ["model.hidden_size 30 is not a multiple of num_attention_heads 4"]),
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
def test_option_without_counterpart_is_refused_by_name(tiny, tmp_path, options, messages):
    config = tiny(**options)
    with pytest.raises(ValueError) as refusal:
        export(config, Transformer(config).state_dict(), tmp_path / "out")
    assert all(message in str(refusal.value) for message in messages)
    assert not list(tmp_path.iterdir())


def test_document_mask_and_dropout_do_not_prevent_export(tiny, network, tmp_path):
    config = tiny(document_mask=True, dropout=0.2)
    state = network(config).state_dict()
    export(config, state, tmp_path / "out")
    assert verify(tmp_path / "out", config, state) < 1e-5


def test_existing_output_folder_is_refused(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "existing").write_text("content")
    with pytest.raises(ValueError, match="out exists already"):
        export(*llama, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["existing"]


def test_failed_export_leaves_no_files(llama, tmp_path):
    with pytest.raises(RuntimeError, match="the tokenizer"), new_folder(tmp_path / "out") as folder:
        export(*llama, folder)
        assert (folder / "config.json").exists()
        raise RuntimeError("the tokenizer is missing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_state_of_another_model_is_refused(llama, tmp_path, change):
    config, state = llama
    if change == "missing":
        del state["1.attention.key.weight"]
    elif change == "unknown":
        state["9.weight"] = torch.zeros(3)
    else:
        state["1.attention.key.weight"] = torch.zeros(3, 32)
    name = "9.weight" if change == "unknown" else "1.attention.key.weight"
    with pytest.raises(ValueError, match=name), new_folder(tmp_path / "out") as folder:
        export(config, state, folder)
    assert not list(tmp_path.iterdir())


def test_verification_finds_one_changed_weight(model, tmp_path):
    config, network = model
    state = network.state_dict()
    export(config, state, tmp_path / "out")
    last = [name for name in state if name.endswith("feed_forward.down.weight")][-1]
    changed = state | {last: state[last] * 1.05}
    with pytest.raises(RuntimeError, match="logits differ from ours by up to"):
        verify(tmp_path / "out", config, changed)


@pytest.mark.parametrize(("change", "kind"), [("missing", "missing_keys"), ("unknown", "unexpected_keys")])
def test_verification_finds_missing_and_unexpected_tensors(llama, tmp_path, change, kind):
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
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, 'model_type "mistral" is not one of gpt2, llama, qwen3, bert, marian, t5.'),
        ({"auto_map": {"AutoModel": "code.Model"}}, '"auto_map" is not supported.'),
        ({"quantization_config": {"quant_method": "gptq"}}, 'quant_method "gptq" is not supported, only "compressed-tensors"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is supported"),
        ({"architectures": ["LlamaModel"]}, "the network without its head, as AutoModel saves it; only LlamaForCausalLM is supported"),
        ({"is_causal": False}, "is_causal is false; only true is supported"),
        ({"sliding_window": 4}, "sliding_window is 4; only null is supported"),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config is"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "that differ by kind of layer (full_attention) are not supported",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": NULL}}, "truncate of rope"),
        ({"rope_theta": NULL, "rope_parameters": None}, "rope_theta is null; it must be a number."),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": YARN},
            "are both given. transformers reads only rope_scaling, so rope_theta would be 10000 and not 500000",
        ),
        ({"tie_word_embeddings": NULL}, "tie_word_embeddings is null, which transformers refuses too."),
        ({"rms_norm_eps": NULL}, "rms_norm_eps is null, which transformers refuses too."),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is supported'),
        ({"attention_bias": NULL}, "config.json: attention_bias is null, which transformers refuses too."),
        ({"attention_bias": True}, "mlp_bias is false; only true is supported with attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias is true; only false is supported with attention_bias false"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, 'rope scaling "longrope" is not supported'),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope scaling "dynamic" is not supported'),
        ({"rope_parameters": {"rope_type": "linear"}}, 'rope scaling "linear" has no "factor".'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, 'beta_fast of rope scaling "yarn" is 16; only 32'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale of rope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "high_freq_factor": 2.0}}, "high_freq_factor of rope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported."),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 is supported."),
        ({"num_hidden_layers": None}, '"num_hidden_layers" is missing.'),
        ({"num_hidden_layers": "2"}, 'num_hidden_layers is "2"; it must be a whole number.'),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be a whole number."),
        ({"hidden_size": 64}, "by config.json it must be"),
        ({"num_hidden_layers": 3}, "lacks tensors: model.layers.2."),
        ({"num_hidden_layers": 1}, "has unknown tensors: model.layers.1."),
        ({"intermediate_size": 64}, "has shape [128, 32]; by config.json it must be [64, 32]."),
    ],
)
def test_unsupported_llama_feature_is_refused_by_name(llama, tmp_path, changes, message):
    export(*llama, tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(ValueError) as refusal:
        load(tmp_path / "out")
    assert message in str(refusal.value) and "with attention_bias null" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; only false is supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false; only true is supported"),
        ({"activation_function": "quick_gelu"}, 'activation_function is "quick_gelu"; supported are gelu_new, gelu, relu.'),
        ({"attn_pdrop": 0.5}, "only one dropout for all is supported."),
        ({"num_attention_heads": 2}, "num_attention_heads is 2 next to n_head 4; transformers reads both as n_head. Keep one n_head."),
        ({"architectures": ["GPT2Model"]}, "the network without its head, as AutoModel saves it"),
    ],
)
def test_unsupported_gpt2_feature_is_refused_by_name(tiny, tmp_path, changes, message):
    config = tiny(**GPT2)
    export(config, Transformer(config).state_dict(), tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(ValueError) as refusal:
        load(tmp_path / "out")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"qk_norm": True}, {"attention_bias": True}, "attention_bias is true; only false is supported."),
        ({"qk_norm": True}, {"layer_types": ["full_attention", "sliding_attention"]}, "with and without a sliding window is not"),
        (BERT, {"is_decoder": True}, "is_decoder is true; only false is supported."),
        (BERT, {"hidden_act": "silu"}, 'hidden_act is "silu"; supported are gelu, gelu_new, relu.'),
        (BERT, {"position_embedding_type": "relative_key"}, 'position_embedding_type is "relative_key"'),
        (BERT, {"architectures": ["BertForTokenClassification"]}, "only BertForMaskedLM or BertForPreTraining or BertForSequenceCla"),
        (BERT, {"attention_probs_dropout_prob": 0.5}, "only one dropout for all is supported."),
        (BERT, {"classifier_dropout": 0.5}, "only one dropout for all is supported."),
        (MARIAN, {"attention_dropout": 0.5}, "only one dropout for all is supported."),
        (MARIAN, {"scale_embedding": False}, "scale_embedding is false; only true is supported."),
        (MARIAN, {"activation_function": "swish"}, 'activation_function is "swish"'),
        (MARIAN, {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings is false"),
        (MARIAN, {"decoder_attention_heads": 2}, "only one number of heads for all is supported."),
        (T5, {"feed_forward_proj": "gated-relu"}, 'feed_forward_proj is "gated-relu"'),
        (T5, {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets is 16; only 32 is supported."),
        (T5, {"d_kv": None}, '"d_kv" is missing.'),
        (T5, {"dense_act_fn": "relu"}, 'dense_act_fn is "relu"; only "gelu_new" is supported with feed_forward_proj "gated-gelu".'),
        (T5, {"num_attention_heads": 2}, "num_attention_heads is 2 next to num_heads 4; transformers reads both as num_heads."),
        (MARIAN, {"num_attention_heads": 2}, "transformers reads both as encoder_attention_heads."),
        (BERT, {"architectures": ["BertModel"]}, "the network without its head, as AutoModel saves it"),
        (T5, {"tie_word_embeddings": True}, "lm_head.weight differs from shared.weight"),
    ],
)
def test_unsupported_feature_is_refused_by_name(tiny, tmp_path, options, changes, message):
    config = tiny(**options)
    export(config, Transformer(config).state_dict(), tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    with pytest.raises(ValueError) as refusal:
        load(tmp_path / "out")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN},  # next to rope_parameters and rope_theta, as model cards advise for long texts
        {"rope_scaling": YARN | {"rope_theta": 500.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": YARN},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 6},
        {"rope_scaling": NULL, "rope_parameters": YARN, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_theta": None},
        {"num_key_value_heads": NULL, "head_dim": NULL},
    ],
)
def test_settings_of_positions_are_read_as_by_transformers(llama, tmp_path, changes):
    export(*llama, tmp_path / "out")
    rewrite(tmp_path / "out", **changes)
    path = tmp_path / "out" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # with a byte-order mark
    assert verify_source(tmp_path / "out", *load(tmp_path / "out")) < 1e-5


def test_setting_that_only_transformers_reads_is_found_in_the_source(llama, tmp_path, monkeypatch):
    export(*llama, tmp_path / "out")
    rewrite(tmp_path / "out", is_causal=False)
    monkeypatch.setattr(Llama, "supported", {})  # as if nothing were known of is_causal
    with pytest.raises(ValueError, match=r"does not read this model as we do, so nothing is written: .*logits differ from ours"):
        verify_source(tmp_path / "out", *load(tmp_path / "out"))


def test_lack_of_memory_is_not_a_difference_between_two_readers(llama, tmp_path, monkeypatch):
    def too_large(config):
        raise MemoryError

    export(*llama, tmp_path / "out")
    monkeypatch.setattr("model.huggingface.verification.auto_class", too_large)
    with pytest.raises(MemoryError):
        verify_source(tmp_path / "out", *load(tmp_path / "out"))


# Keys that transformers reads for other heads, for training, for speed or for rounding.
HARMLESS = {
    *("_attn_implementation", "use_cache", "pad_token_id", "eos_token_id", "chunk_size_feed_forward", "reorder_and_upcast_attn"),
    *(
        "summary_first_dropout",
        "summary_last_dropout",
        "summary_proj_to_labels",
        "summary_use_proj",
        "hidden_dropout",
        "initializer_factor",
    ),
    *("classifier_dropout", "num_labels", "problem_type", "output_hidden_states", "is_encoder_decoder"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_key_that_transformers_reads_is_read_or_refused(name):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    read = set(re.findall(r"config\.([a-z_]+)", inspect.getsource(module)))
    source = "".join(inspect.getsource(sys.modules[kind.__module__]) for kind in type(ARCHITECTURES[name]).__mro__[:-1])
    assert {key for key in read - HARMLESS if f'"{key}"' not in source} == set()


def test_duplicate_tensors_and_old_names_are_read(tiny, network, tmp_path):
    """Files may hold duplicates, constants and zeros. BERT's first files also hold a head that their config.json does not name."""
    config = tiny(**BERT, num_classes=2)
    state = network(config).state_dict()
    export(config, state, tmp_path / "bert")
    rewrite(tmp_path / "bert", architectures=["BertForMaskedLM"])
    path = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(path)
    copies = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    tensors |= {copy: tensors[original].clone() for copy, original in copies.items()}
    tensors |= {"bert.embeddings.position_ids": torch.arange(24)[None]}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {functools.reduce(lambda name, pair: name.replace(*pair), old.items(), name): tensor for name, tensor in tensors.items()}
    save_file(renamed, path)
    same_config, read = load(tmp_path / "bert")
    assert same_config == config and all(torch.equal(state[name], tensor) for name, tensor in read.items())

    config = tiny(**MARIAN)
    state = network(config).state_dict()
    export(config, state, tmp_path / "marian")
    path = tmp_path / "marian" / "model.safetensors"
    tensors = load_file(path)
    tensors |= {"lm_head.weight": tensors["model.shared.weight"].clone(), "final_logits_bias": torch.zeros(1, 61)}
    save_file(tensors | {"model.encoder.embed_positions.weight": torch.ones(24, 32)}, path)
    assert all(torch.equal(state[name], tensor) for name, tensor in load(tmp_path / "marian")[1].items())
    save_file(tensors | {"final_logits_bias": torch.ones(1, 61)}, path)
    with pytest.raises(ValueError, match="final_logits_bias is not zero"):
        load(tmp_path / "marian")


def test_classifier_without_token_head_has_no_tied_head(tiny, tmp_path):
    config = tiny(**BERT, num_classes=2, token_head=False, tie_embeddings=False)
    export(config, Transformer(config).state_dict(), tmp_path / "out")
    assert load(tmp_path / "out")[0] == dataclasses.replace(config, tie_embeddings=True)


def test_names_of_classes_are_written(tiny, tmp_path):
    config = tiny(**BERT, num_classes=2, token_head=False)
    export(config, Transformer(config).state_dict(), tmp_path / "out", SpecialTokens(labels=("bad", "good")))
    assert load_by_transformers(tmp_path / "out", config).config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(ValueError, match=r"The number of labels is 1; it must be model\.num_classes 2"):
        export(config, Transformer(config).state_dict(), tmp_path / "again", SpecialTokens(labels=("bad",)))


def test_export_needs_memory_for_a_few_tensors_only(tmp_path):
    """A separate process exports 24 blocks with the memory of a few weights."""
    program = """
import sys, torch
from collections.abc import Mapping
from pathlib import Path
from model.config import ModelConfig
from model.huggingface import export
from model.transformer import Transformer

config = ModelConfig(vocab_size=512, hidden_size=512, intermediate_size=2048, num_layers=24, activation="gelu_tanh", norm="layernorm",
                     positions="learned", biases=True)
with torch.device("meta"):
    shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}

class Ones(Mapping):
    def __getitem__(self, name): return torch.ones(shapes[name])
    def __iter__(self): return iter(shapes)
    def __len__(self): return len(shapes)

peak = lambda: int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]) * 1024
before = peak()
export(config, Ones(), sys.argv[1])
print(sum(shape.numel() * 4 for shape in shapes.values()), peak() - before)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    output = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    ).stdout
    model_bytes, peak_bytes = map(int, output.split())
    assert model_bytes > 300e6 and peak_bytes < 40e6, output


def test_old_tensor_names_and_config_keys_are_read(tiny, network, tmp_path):
    """The first GPT-2 files lack the name prefix and hold masks; the first Llama files hold frequencies and no rope_parameters."""
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
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | frequencies | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    rewrite(tmp_path / "llama", rope_parameters=None, head_dim=None, attention_bias=None, mlp_bias=None)
    same_config, read = load(tmp_path / "llama")
    assert same_config == config
    assert all(torch.equal(state[name], tensor) for name, tensor in read.items())
    save_file(tensors | {"lm_head.weight": torch.ones(61, 32)}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight; they must be equal"):
        load(tmp_path / "llama")


def test_folder_of_automodel_is_refused_as_a_network_without_its_head(llama, tmp_path):
    export(*llama, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(
        ValueError, match=r"holds the network without its head, as AutoModel saves it: .* Save the model of LlamaForCausalLM"
    ):
        load(tmp_path / "out")


def test_pickled_weights_are_refused(llama, tmp_path):
    export(*llama, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'out'} has only pickled weights"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../model.safetensors"}, r"names \.\./model.safetensors, which is not a file in"),
        ({"x": "missing.safetensors"}, "names missing.safetensors, which is not a file in"),
        ([], "is not an index"),
        ({"x": 3}, "names 3, which is not a file in"),
    ],
)
def test_invalid_index_is_refused(llama, tmp_path, weight_map, message):
    export(*llama, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "out")


@pytest.mark.parametrize("end", [0, 5, 100, -1])
def test_truncated_file_is_refused(llama, tmp_path, end):
    export(*llama, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load(tmp_path / "out")


@pytest.mark.parametrize(("contents", "message"), [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_folder_without_valid_config_is_refused(tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
