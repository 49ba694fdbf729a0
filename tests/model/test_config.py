import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import SIZES, ModelConfig, count_parameters, flops_per_token, named_size
from model.transformer import Transformer

# Of the released checkpoints; for GPT-3 arXiv 2005.14165, table D.1, says 174,600M.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "llama-160m": 162_417_408,
    "llama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}
OPTIONS = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "positions": ("learned", "sinusoidal", "rotary"),
    "activation": ("gelu", "gelu_tanh", "relu", "swiglu"),
    "biases": (False, True),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
    "num_key_value_heads": (4, 2, 1),
    "head_size": (8, 6),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_named_size_has_its_published_parameters(name):
    assert count_parameters(ModelConfig(**named_size(name))) == PUBLISHED[name]


def test_the_count_is_that_of_the_built_module_for_every_combination_of_options():
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        config = ModelConfig(
            vocab_size=50, sequence_length=12, hidden_size=32, num_layers=1, num_attention_heads=4, intermediate_size=20, **options
        )
        with torch.device("meta"):
            built = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert count_parameters(config) == built, options


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-160m", "llama3-8b"])
def test_the_count_is_that_of_the_built_module_at_full_size(name):
    config = ModelConfig(**named_size(name))
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_flops_are_those_that_torch_counts(tiny, activation, num_key_value_heads, tie_embeddings):
    config = tiny(activation=activation, num_key_value_heads=num_key_value_heads, tie_embeddings=tie_embeddings)
    model = Transformer(config)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    # The plain products: a fused kernel computes the scores again in its backward pass, and torch counts that.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, torch.ones_like(tokens)).sum().backward()
    assert counter.get_total_flops() == 3 * 16 * flops_per_token(config, sequence_length=16, causal=False)


def test_causal_flops_count_the_keys_that_a_token_may_see(tiny):
    config = tiny()
    seen = sum(place + 1 for place in range(16)) / 16
    per_key = 3 * 2 * 2 * config.num_layers * config.hidden_size
    full = flops_per_token(config, sequence_length=16, causal=False)
    assert flops_per_token(config, sequence_length=16) == full - per_key * (16 - seen)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"vocab_size": 0}, "model.vocab_size is 0; it must be at least 1."),
        ({"hidden_size": 100, "num_attention_heads": 3}, "model.hidden_size 100 is not a multiple of model.num_attention_heads 3"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "Nearest number of heads: 2"),
        ({"hidden_size": 4, "num_attention_heads": 8}, "Nearest number of heads: 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "model.num_key_value_heads 3 does not divide model.num_attention_heads 4."),
        ({"head_size": 7}, "model.head_size 7 is odd; rotary positions turn pairs. Nearest: 8."),
        ({"hidden_size": 33, "head_size": 8, "positions": "sinusoidal"}, "model.hidden_size 33 is odd"),
        ({"dropout": 1.0}, "model.dropout is 1.0; it must be at least 0 and below 1."),
    ],
)
def test_a_bad_setting_is_refused_with_a_sentence(settings, sentence):
    with pytest.raises(ValueError) as refusal:
        ModelConfig(**settings)
    assert sentence in str(refusal.value)


def test_all_complaints_come_together():
    with pytest.raises(ValueError) as refusal:
        ModelConfig(head_size=7, dropout=-1.0, num_key_value_heads=3)
    assert len(str(refusal.value).splitlines()) == 3


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_size", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -2])
def test_a_derived_size_below_one_is_refused(field, value):
    with pytest.raises(ValueError, match=f"model.{field}"):
        ModelConfig(**{field: value})


def test_an_unknown_size_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match='Did you mean "llama2-7b"'):
        named_size("llama2-7bn")
