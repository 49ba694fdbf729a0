import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import SIZES, ModelConfig, count_parameters, flops_per_token, named_size
from model.transformer import Transformer

# Numbers of the released checkpoints; for GPT-3, ModernBERT and the Transformer, the numbers that follow from the papers' shapes.
# GPT-3's table D.1 has 174,600M. ModernBERT's first block has no norm, 768 numbers fewer. Table 3 of arXiv 1706.03762 has 65M and
# 213M with a vocabulary of "about 37000": 213M needs 35,800 entries and 65M needs 40,700, so no single vocabulary gives both.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "llama-160m": 162_417_408,
    "llama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "modern-bert-base": 149_655_232 + 768,
    "transformer-base": 63_082_496,
    "transformer-big": 214_245_376,
    "t5-small": 76_961_152,
    "t5-base": 247_577_856,
    "t5-large": 783_150_080,
}
OPTIONS = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "positions": ("learned", "sinusoidal", "rotary"),
    "activation": ("gelu", "swiglu"),
    "biases": (False, True),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
    "num_key_value_heads": (4, 2, 1),
    "head_size": (8, 6),
}


@pytest.mark.parametrize("name", SIZES)
def test_named_size_has_its_published_parameter_count(name):
    assert count_parameters(ModelConfig(**named_size(name))) == PUBLISHED[name]


def test_parameter_count_matches_the_module_for_all_decoder_options():
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        config = ModelConfig(
            vocab_size=50, sequence_length=12, hidden_size=32, num_layers=1, num_attention_heads=4, intermediate_size=20, **options
        )
        with torch.device("meta"):
            built = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert count_parameters(config) == built, options


@pytest.mark.parametrize("positions", ["learned", "relative"])
@pytest.mark.parametrize(("biases", "tie_embeddings", "norm_position"), [(True, True, "post"), (False, False, "pre"), (True, False, "pre")])
def test_parameter_count_matches_the_module_for_encoders_and_pairs(tiny, positions, biases, tie_embeddings, norm_position):
    options = {
        "positions": positions,
        "biases": biases,
        "tie_embeddings": tie_embeddings,
        "norm_position": norm_position,
        "qk_norm": biases,
    }
    pair = tiny(architecture="encoder_decoder", num_decoder_layers=3, norm="layernorm", **options)
    options["positions"] = "learned"
    encoders = [
        tiny(architecture="encoder", token_types=types, num_classes=classes, token_head=head, **options)
        for types, classes, head in ((0, 0, True), (2, 2, True), (2, 3, False))
    ]
    for config in (pair, *encoders):
        with torch.device("meta"):
            assert count_parameters(config) == sum(parameter.numel() for parameter in Transformer(config).parameters()), config


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-160m", "llama3-8b", "bert-base", "transformer-base", "t5-small"])
def test_parameter_count_matches_the_module_at_full_size(name):
    config = ModelConfig(**named_size(name))
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_flops_match_torchs_count(tiny, activation, num_key_value_heads, tie_embeddings):
    config = tiny(activation=activation, num_key_value_heads=num_key_value_heads, tie_embeddings=tie_embeddings)
    model = Transformer(config)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    # The plain products: a fused kernel computes the scores again in its backward pass, and torch counts that.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, torch.ones_like(tokens)).sum().backward()
    assert counter.get_total_flops() == 3 * 16 * flops_per_token(config, sequence_length=16, causal=False)


def test_flops_of_encoders_and_pairs_match_torchs_count(tiny):
    tokens, target = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 10, dtype=torch.long)
    encoder, pair = tiny(architecture="encoder"), tiny(architecture="encoder_decoder", num_decoder_layers=3)
    for config, inputs in ((encoder, (tokens,)), (pair, (tokens, target))):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            Transformer(config)(*(x for one in inputs for x in (one, torch.ones_like(one)))).sum().backward()
        per_token = flops_per_token(config, sequence_length=16, causal=False, target_length=10)
        assert counter.get_total_flops() == pytest.approx(3 * sum(one.shape[1] for one in inputs) * per_token, rel=1e-12)


def test_flops_with_a_window_count_the_keys_inside_it(tiny):
    for architecture, sees in (("decoder", lambda q, k: q - 5 < k <= q), ("encoder", lambda q, k: abs(q - k) <= 2)):
        narrow, wide = (tiny(architecture=architecture, sliding_window=window) for window in (5, None))
        keys = sum(sees(query, key) for query in range(16) for key in range(16)) / 16
        per_key = 3 * 2 * 2 * narrow.num_layers * narrow.hidden_size
        full = flops_per_token(wide, sequence_length=16, causal=False)
        assert flops_per_token(narrow, sequence_length=16) == pytest.approx(full - per_key * (16 - keys))


def test_causal_flops_count_the_keys_a_token_attends_to(tiny):
    config = tiny()
    seen = sum(place + 1 for place in range(16)) / 16
    per_key = 3 * 2 * 2 * config.num_layers * config.hidden_size
    full = flops_per_token(config, sequence_length=16, causal=False)
    assert flops_per_token(config, sequence_length=16) == full - per_key * (16 - seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size is 0; it must be at least 1."),
        ({"hidden_size": 100, "num_attention_heads": 3}, "model.hidden_size 100 is not a multiple of model.num_attention_heads 3"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "Nearest number of heads: 2"),
        ({"hidden_size": 4, "num_attention_heads": 8}, "Nearest number of heads: 4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "model.num_key_value_heads 3 does not divide model.num_attention_heads 4."),
        ({"head_size": 7}, "model.head_size 7 is odd; rotary positions need an even number. Nearest: 8."),
        ({"hidden_size": 33, "head_size": 8, "positions": "sinusoidal"}, "model.hidden_size 33 is odd"),
        ({"dropout": 1.0}, "model.dropout is 1.0; it must be at least 0 and below 1."),
        ({"num_classes": 2}, 'model.num_classes 2 is for architecture "encoder"; this is "decoder".'),
        ({"architecture": "encoder", "token_head": False}, "the network would have no output. Set one of them."),
        ({"architecture": "encoder", "num_classes": 1}, "model.num_classes is 1; it must be 0 (none) or at least 2."),
        (
            {"architecture": "encoder", "prefix_attention": True},
            'model.prefix_attention true is for architecture "decoder"; this is "encoder".',
        ),
        ({"num_decoder_layers": 2}, 'model.num_decoder_layers 2 is for architecture "encoder_decoder"; this is "decoder".'),
        ({"positions": "relative"}, 'model.positions "relative" is for architecture "encoder_decoder"; this is "decoder".'),
        ({"rope_factor": 2.0}, "model.rope_factor 2 has no effect without model.rope_scaling."),
        (
            {"rope_original_length": 64},
            'model.rope_original_length 64 has no effect with model.rope_scaling "none"; only yarn and llama3 use it.',
        ),
        (
            {"rope_scaling": "ntk", "rope_factor": 2.0, "head_size": 2},
            'model.rope_scaling "ntk" has no effect for model.head_size 2; use 4 or more.',
        ),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "model.rope_factor is 0.5; it must be at least 1."),
        (
            {"rope_scaling": "yarn", "rope_factor": 2.0},
            'model.rope_scaling "yarn" needs model.rope_original_length, the original context in tokens.',
        ),
        ({"rope_scaling": "linear", "positions": "learned"}, 'model.rope_scaling "linear" needs model.positions "rotary", not "learned".'),
        ({"sliding_window": 0}, "model.sliding_window is 0; it must be at least 1."),
        ({"logit_softcap": -1.0}, "model.logit_softcap is -1.0; it must be above 0."),
    ],
)
def test_invalid_settings_are_refused_with_a_message(settings, message):
    with pytest.raises(ValueError) as refusal:
        ModelConfig(**settings)
    assert message in str(refusal.value)


def test_all_complaints_are_reported_together():
    with pytest.raises(ValueError) as refusal:
        ModelConfig(head_size=7, dropout=-1.0, num_key_value_heads=3)
    assert len(str(refusal.value).splitlines()) == 3


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_size", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -2])
def test_derived_size_below_one_is_refused(field, value):
    with pytest.raises(ValueError, match=f"model.{field}"):
        ModelConfig(**{field: value})


def test_unknown_size_names_the_nearest_one():
    with pytest.raises(ValueError, match='Did you mean "llama2-7b"'):
        named_size("llama2-7bn")
