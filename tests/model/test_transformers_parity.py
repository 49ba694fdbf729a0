"""Logits and gradients of our network match those of transformers, for folders that transformers wrote."""

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig, count_parameters
from model.huggingface import counterparts, load
from model.transformer import Transformer
from tests.model.both_sides import our_logits, random_inputs, their_logits, without_padding

transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")

GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGER = {"factor": 4.0, "original_max_position_embeddings": 6, "rope_theta": 500.0}
BERT = {
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": None,  # the row of a padding token would get no gradient
}
MARIAN = {
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "scale_embedding": True,
    "pad_token_id": None,
    "decoder_start_token_id": 60,
}
T5 = {
    "vocab_size": 61,
    "n_positions": 24,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **NO_DROPOUT),
    "gpt2, untied, narrow, exact gelu": lambda: transformers.GPT2Config(
        **GPT2, **NO_DROPOUT, n_inner=40, activation_function="gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-3
    ),
    "gpt2, relu": lambda: transformers.GPT2Config(**GPT2, **NO_DROPOUT, activation_function="relu"),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama, grouped, other head size and rope base, tied": lambda: transformers.LlamaConfig(
        **(LLAMA | {"num_key_value_heads": 2}),
        head_dim=6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
    ),
    "llama, biases": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**(LLAMA | {"num_key_value_heads": 2}), head_dim=10),
    "qwen3, tied": lambda: transformers.Qwen3Config(**(LLAMA | {"hidden_size": 30}), head_dim=8, tie_word_embeddings=True),
    "llama, linear": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=LONGER | {"rope_type": "linear"}),
    "llama, yarn": lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=LONGER | {"rope_type": "yarn"}),
    "llama, llama3": lambda: transformers.LlamaConfig(
        **LLAMA, rope_parameters=LONGER | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    ),
    "qwen3, window": lambda: transformers.Qwen3Config(**LLAMA, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "bert": lambda: transformers.BertConfig(**BERT, architectures=["BertForMaskedLM"]),
    "bert, next sentence, gelu_new": lambda: transformers.BertConfig(**BERT, architectures=["BertForPreTraining"], hidden_act="gelu_new"),
    "bert, classes, relu": lambda: transformers.BertConfig(**BERT, architectures=["BertForSequenceClassification"], hidden_act="relu"),
    "marian": lambda: transformers.MarianConfig(**MARIAN, architectures=["MarianMTModel"]),
    "marian, relu": lambda: transformers.MarianConfig(**MARIAN, architectures=["MarianMTModel"], activation_function="relu"),
    "t5": lambda: transformers.T5Config(**T5, architectures=["T5ForConditionalGeneration"]),
    "t5, gated": lambda: transformers.T5Config(
        **T5, architectures=["T5ForConditionalGeneration"], feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
}


def untied(model: torch.nn.Module) -> torch.nn.Module:
    """Give T5 version 1.1 an untied head; transformers always ties the head of a new T5, but reads untied heads from files."""
    if not getattr(model.config, "scale_decoder_outputs", True):
        model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(61, 32, generator=torch.Generator().manual_seed(1)))
        model.all_tied_weights_keys.pop("lm_head.weight")
    return model


@pytest.fixture(params=MODELS)
def theirs(request, randomise):
    config = MODELS[request.param]()
    model = getattr(transformers, config.architectures[0]) if config.architectures else transformers.AutoModelForCausalLM.from_config
    return randomise(untied(model(config).float()))


def read(folder) -> tuple[ModelConfig, Transformer]:
    config, state = load(folder)
    ours = Transformer(config, seed=123)
    ours.load_state_dict(state)
    return config, ours.eval()


def test_logits_and_gradients_match_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "saved")
    config, ours = read(tmp_path / "saved")
    assert count_parameters(config) == sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    inputs = random_inputs(config)
    our_outputs = without_padding(our_logits(ours(*inputs), config), config, inputs)
    their_outputs = without_padding(their_logits(theirs, config, inputs), config, inputs)
    # float32 sums in another order differ by about 1e-6 here; the promised tolerance is 1e-4.
    torch.testing.assert_close(our_outputs, their_outputs, rtol=0, atol=1e-5)
    for outputs in (our_outputs, their_outputs):
        sum(F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]) for logits in outputs).backward()
    our_gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for entry in counterparts(config):
        stacked = torch.cat([our_gradients.pop(name) for name in entry.ours])
        torch.testing.assert_close(stacked.T if entry.transposed else stacked, their_gradients.pop(entry.theirs), rtol=1e-4, atol=1e-6)
    assert not our_gradients and not their_gradients


def test_sharded_folder_reads_the_same_weights(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (config, whole), (same_config, sharded) = load(tmp_path / "whole"), load(tmp_path / "sharded")
    assert config == same_config and set(whole) == set(sharded)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_bf16_weights_are_read_unchanged(theirs, tmp_path):
    theirs.bfloat16().save_pretrained(tmp_path / "saved")
    _, state = load(tmp_path / "saved")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_gpt2_dropout_is_read(tmp_path):
    config = transformers.GPT2Config(**GPT2, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved")[0].dropout == 0.2


def test_rotary_angles_of_a_long_context_match_transformers():
    """At position 8191, one last bit of a frequency changes the angle by 5e-4."""
    config = transformers.LlamaConfig(**(LLAMA | {"max_position_embeddings": 8192}), head_dim=128)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(8192)[None])
    ours = Transformer(
        ModelConfig(vocab_size=8, sequence_length=8192, hidden_size=32, num_layers=1, num_attention_heads=4, head_size=128)
    ).blocks()[0]
    torch.testing.assert_close(ours.attention.positions.cos, cos[0, :, :64], rtol=0, atol=0)
    torch.testing.assert_close(ours.attention.positions.sin, sin[0, :, :64], rtol=0, atol=0)
