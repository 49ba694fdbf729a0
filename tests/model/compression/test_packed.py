"""Tests of quantized weights in safetensors files: compressed-tensors and transformers read what we write, and we read theirs."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.cache import KeyValueCache
from model.compression.activations import round_activations
from model.compression.grids import Grid, Quantized, round_to
from model.compression.packed import CacheScheme, Scheme, layout, packed, parse_configuration, unpacked
from model.compression.statistics import LargestKeysAndValues
from model.config import ModelConfig
from model.huggingface import export, load, perplexity_by_transformers, quantization_config, verify
from model.layers import Linear, Stream
from model.loss import IGNORED, token_losses
from model.positions import rotate
from model.transformer import Block, Transformer
from model.walk import walk
from tests.model.both_sides import BERT, GPT2, MARIAN, T5

transformers = pytest.importorskip("transformers", reason="the independent reference is transformers")

INT4, INT3, ASYMMETRIC = Scheme(Grid("int", 4, 32)), Scheme(Grid("int", 3, None)), Scheme(Grid("int", 4, 16, symmetric=False))
W8A8, FP8 = Scheme(Grid("int", 8, None), "int8"), Scheme(Grid("fp8", 8, None), "fp8")
NVFP4, MXFP4 = Scheme(Grid("nvfp4", 4, 16)), Scheme(Grid("mxfp4", 4, 32))
PRESETS = {
    "W3A16": Scheme(Grid("int", 3, 128)),
    "W4A16": Scheme(Grid("int", 4, 128)),
    "W8A16": Scheme(Grid("int", 8, 128)),
    "W4A16_ASYM": Scheme(Grid("int", 4, 128, symmetric=False)),
    "W8A8": W8A8,
    "FP8_DYNAMIC": FP8,
    "NVFP4A16": NVFP4,
    "MXFP4A16": MXFP4,
}
"""Names that llm-compressor gives to schemes that we also have."""


def network(randomise, **options) -> Transformer:
    sizes = {"vocab_size": 61, "sequence_length": 24, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
    return randomise(Transformer(ModelConfig(**sizes | options)))


@pytest.fixture
def llama(randomise):
    return network(randomise)


def linears(model: Transformer) -> list[str]:
    """Return the names of the weights that are quantized: those of all linear layers in blocks."""
    return [
        f"{name}.{inner}.weight"
        for name, block in model.named_modules()
        if isinstance(block, Block)
        for inner, module in block.named_modules()
        if isinstance(module, Linear)
    ]


def round_weights(model: Transformer, schemes: dict[str, Scheme], dtype: torch.dtype) -> dict[str, torch.Tensor | Quantized]:
    return {name: round_to(tensor, schemes[name].grid, dtype) if name in schemes else tensor for name, tensor in model.state_dict().items()}


def export_with(model: Transformer, folder, scheme: Scheme, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | Quantized]:
    schemes = dict.fromkeys(linears(model), scheme)
    state = round_weights(model, schemes, dtype)
    export(model.config, state, folder, dtype=dtype, schemes=schemes)
    return state


def equal_bits(one: Quantized, other: Quantized) -> bool:
    """Return True if all tensors have equal bits and types; torch.equal takes 0 and -0 as equal."""
    bits = [[None if part is None else part.contiguous().view(torch.uint8) for part in tensors_of(each)] for each in (one, other)]
    dtypes = [[None if part is None else part.dtype for part in tensors_of(each)] for each in (one, other)]
    equal = (a is b is None or torch.equal(a, b) for a, b in zip(*bits, strict=True))
    return one.grid == other.grid and dtypes[0] == dtypes[1] and all(equal)


def tensors_of(quantized: Quantized) -> tuple:
    return quantized.codes, quantized.scale, quantized.zero_point, quantized.global_scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 50])
def test_integers_are_packed_as_in_compressed_tensors(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (6, columns), dtype=torch.int8)
    zeros = torch.randint(-half, half, (6, 1), dtype=torch.int8)
    quantized = Quantized(Grid("int", bits, None, symmetric=False), codes, torch.rand(6, 1), zeros)
    tensors = packed(quantized, scheme := Scheme(quantized.grid))
    assert torch.equal(tensors["weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert kinds == layout(scheme, (6, columns), torch.float32)
    assert equal_bits(unpacked(tensors, scheme), quantized)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (INT3, torch.float32),
        (INT4, torch.bfloat16),
        (ASYMMETRIC, torch.bfloat16),
        (W8A8, torch.bfloat16),
        (FP8, torch.float16),
        (NVFP4, torch.bfloat16),
        (MXFP4, torch.bfloat16),
    ],
    ids=lambda value: value.format if isinstance(value, Scheme) else str(value),
)
def test_exported_weights_are_read_by_us_and_by_transformers(llama, tmp_path, scheme, dtype):
    state = export_with(llama, tmp_path / "out", scheme, dtype)
    config, again = load(tmp_path / "out")
    assert (config, again.schemes) == (llama.config, dict.fromkeys(linears(llama), scheme))
    assert all(equal_bits(again.quantized(name), state[name]) for name in again.schemes)
    assert all(torch.equal(again[name], state[name].weight()) for name in again.schemes)
    assert verify(tmp_path / "out", config, state, schemes=again.schemes) < 1e-5
    if scheme != ASYMMETRIC:  # transformers dequantizes it while loading
        dtype_read = torch.bfloat16 if scheme.is_unpacked_to_bfloat16 else torch.float32
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype_read)
        theirs.save_pretrained(tmp_path / "theirs")
        assert load(tmp_path / "theirs")[1].schemes == again.schemes
        theirs(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first forward pass unpacks the weights
        weight = state["1.feed_forward.down.weight"].weight()
        assert torch.equal(theirs.model.layers[0].mlp.down_proj.weight, weight.to(dtype_read))


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"qk_norm": True, "tie_embeddings": False, "num_key_value_heads": 2}, INT4),
        (BERT | {"num_classes": 2}, W8A8),
        (MARIAN | {"num_decoder_layers": 1}, INT4),
        (MARIAN, W8A8),
        (T5, FP8),
    ],
    ids=["qwen3", "bert", "marian", "marian, inputs", "t5"],
)
def test_other_architectures_are_read_by_transformers(randomise, tmp_path, options, scheme):
    model = network(randomise, **options)
    state = export_with(model, tmp_path / "out", scheme)
    config, again = load(tmp_path / "out")
    assert (config, len(again.schemes)) == (model.config, len(linears(model)))
    assert verify(tmp_path / "out", config, state, schemes=again.schemes) < 1e-5


def test_layers_can_have_different_schemes_or_none(llama, tmp_path):
    """The first block has 4 bits except one layer with 8; the second has 8 bits except one layer that is not quantized."""
    names = linears(llama)
    schemes = {name: INT4 if name.startswith("1.") else W8A8 for name in names if name != "2.feed_forward.down.weight"}
    schemes["1.attention.output.weight"] = W8A8
    state = round_weights(llama, schemes, torch.float32)
    export(llama.config, state, tmp_path / "out", schemes=schemes, max_shard_bytes=20_000)
    config_json = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config_json["format"] == "mixed-precision"
    assert "re:model\\.layers\\.1\\..*" in config_json["config_groups"]["group_1"]["targets"]
    assert "model.layers.1.mlp.down_proj" in config_json["ignore"]
    config, again = load(tmp_path / "out")
    assert again.schemes == schemes
    assert verify(tmp_path / "out", config, state, schemes=schemes) < 1e-5


def test_verification_finds_codes_that_are_off_by_one(llama, tmp_path):
    state = export_with(llama, tmp_path / "out", INT4)
    name = "2.feed_forward.down.weight"
    codes = state[name].codes.clone()
    codes[3] = (codes[3] + 1).clamp(max=7)
    state[name] = dataclasses.replace(state[name], codes=codes)
    with pytest.raises(RuntimeError, match="logits differ from ours by up to"):
        verify(tmp_path / "out", llama.config, state, schemes=dict.fromkeys(linears(llama), INT4))


@pytest.mark.parametrize("scheme", [INT4, ASYMMETRIC, W8A8], ids=str)
def test_misnamed_scale_is_found(llama, tmp_path, scheme):
    """transformers only prints a table of missing scales and computes with uninitialised memory."""
    export_with(llama, tmp_path / "out", scheme)
    file, name = tmp_path / "out" / "model.safetensors", "model.layers.1.mlp.up_proj.weight_scale"
    tensors = load_file(file)
    tensors[f"{name}s"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError):
        perplexity_by_transformers(tmp_path / "out", llama.config, [(tokens, tokens)])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path / "out")


@pytest.mark.parametrize("scheme", [W8A8, MXFP4], ids=str)
def test_perplexity_by_transformers_equals_ours(llama, tmp_path, scheme):
    dtype = torch.bfloat16
    export_with(llama, tmp_path / "out", scheme, dtype)
    config, state = load(tmp_path / "out")
    llama.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    round_activations(llama, state.schemes, state.kv_cache)
    tokens = torch.randint(config.vocab_size, (5, 24))
    targets = torch.randint(config.vocab_size, (5, 24))
    targets[2:, 7:] = IGNORED
    with torch.no_grad():
        losses = token_losses(llama(tokens, torch.ones_like(tokens)), targets)
    samples = zip(tokens.split(2), targets.split(2), strict=True)
    theirs = perplexity_by_transformers(tmp_path / "out", config, samples)
    assert theirs == pytest.approx(math.exp(losses.sum() / (targets != IGNORED).sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("options", [{"num_key_value_heads": 2}, {"qk_norm": True, "sliding_window": 7}], ids=["llama", "qwen3"])
def test_quantized_cache_gives_the_perplexity_of_transformers(randomise, tmp_path, options, kind):
    model = network(randomise, **options)
    schemes = dict.fromkeys(linears(model), INT4)
    state, cache = round_weights(model, schemes, torch.bfloat16), CacheScheme(kind, ((0.03125, 0.0234375), (0.046875, 0.015625)))
    export(model.config, state, tmp_path / "out", dtype=torch.bfloat16, schemes=schemes, kv_cache=cache, max_shard_bytes=30_000)
    config, again = load(tmp_path / "out")
    assert (config, again.schemes, again.kv_cache) == (model.config, schemes, cache)
    assert verify(tmp_path / "out", config, state, schemes=schemes, kv_cache=cache) < 1e-5
    model.load_state_dict({name: tensor.float() for name, tensor in again.items()})
    tokens = torch.randint(config.vocab_size, (5, 24))

    def perplexity(network):
        with torch.no_grad():
            return math.exp(token_losses(network(tokens, torch.ones_like(tokens)), tokens).mean())

    before = perplexity(model)
    round_activations(model, again.schemes, again.kv_cache)
    ours, theirs = perplexity(model), perplexity_by_transformers(tmp_path / "out", config, [(tokens, tokens)])
    assert theirs == pytest.approx(ours, rel=1e-5) and abs(theirs - ours) < 0.05 * abs(ours - before)
    one_by_one, segments = KeyValueCache(), torch.ones_like(tokens)
    with torch.no_grad():
        each = [model(token, segments[:, :1], cache=one_by_one) for token in tokens.split(1, dim=1)]
    kept = [tensor for pair in one_by_one.pairs.values() for tensor in pair]
    assert len(kept) == 4 and {tensor.dtype for tensor in kept} == {torch.int8 if kind == "int8" else torch.float8_e4m3fn}
    differences = (torch.cat(each, dim=1) - model(tokens, segments)).abs()
    assert differences.median() < 1e-5 and differences.mean() < 1e-3  # a difference in the last bit can round to another code


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_invalid_scale_of_keys_is_refused_by_name(llama, tmp_path, scale):
    schemes = dict.fromkeys(linears(llama), INT4)
    cache = CacheScheme("fp8", ((1.0, 1.0), (scale, 1.0)))
    export(llama.config, round_weights(llama, schemes, torch.float32), tmp_path / "out", schemes=schemes, kv_cache=cache)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_scale is \S+; a scale must be finite and above 0"):
        load(tmp_path / "out")


def test_largest_keys_are_measured_after_rotation_without_padding(llama):
    tokens = torch.randint(llama.config.vocab_size, (3, 24))
    measured, stream = LargestKeysAndValues(2, torch.device("cpu")), Stream(tokens, torch.ones_like(tokens))
    stream.segments[:, -1] = 0  # padding is not measured
    for step in walk(llama.config, llama.state_dict()):
        if step.block is not None:
            attention = step.module.attention
            key, value = (x.transpose(1, 2) for x in attention.keys_and_values(step.module.attention_norm(stream.hidden)))
            largest = [x[:, :, :-1].abs().max() for x in (rotate(key, attention.positions.cos[:24], attention.positions.sin[:24]), value)]
        with measured.watching(step):
            stream = step(stream)
        if step.block is not None:
            assert torch.allclose(measured.sizes[step.block], torch.stack(largest)) and "append_to_cache" not in vars(attention)


@pytest.mark.parametrize("name", PRESETS)
def test_quantization_config_equals_that_of_llm_compressor(llama, name):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = PRESETS[name]
    theirs = preset_name_to_scheme(name, ["Linear"])
    theirs.format = scheme.format
    whole = QuantizationConfig(
        config_groups={"group_0": theirs}, format=scheme.format, quantization_status="compressed", ignore=["lm_head"]
    ).model_dump()
    parsed = parse_configuration(json.loads(json.dumps(whole, default=str)))
    assert (parsed.scheme_of("model.layers.0.mlp.up_proj"), parsed.scheme_of("lm_head")) == (scheme, None)
    if scheme.grid.group_size != 128:
        ours = quantization_config(llama.config, dict.fromkeys(linears(llama), scheme), torch.bfloat16)
        read = QuantizationConfig.model_validate(ours).config_groups["group_0"]
        for kind in ("weights", "input_activations"):
            keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype")
            one, other = getattr(read, kind), getattr(theirs, kind)
            assert one is other is None or [getattr(one, key) for key in keys] == [getattr(other, key) for key in keys]


GROUP = {"targets": ["Linear"], "format": "pack-quantized", "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
ROWS = {"targets": ["Linear"], "format": "int-quantized", "weights": {"num_bits": 8, "strategy": "channel"}}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor"}
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, 'quant_method "awq" is not supported, only "compressed-tensors"'),
        ({"quant_method": "bitsandbytes"}, 'quant_method "bitsandbytes" is not'),
        ({"quantization_status": "frozen"}, 'quantization_status "frozen" is not'),
        ({"kv_cache_scheme": {"num_bits": 8, "strategy": "attn_head"}}, 'strategy of kv_cache_scheme is "attn_head"'),
        ({"kv_cache_scheme": CACHE | {"num_bits": 4}}, "num_bits of kv_cache_scheme is 4"),
        ({"kv_cache_scheme": CACHE | {"dynamic": True}}, "dynamic of kv_cache_scheme is true"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16 names a preset"),
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": {"g": GROUP | {"format": "marlin-24"}}}, 'format "marlin-24" of g is not supported'),
        ({"config_groups": {"g": GROUP | {"weights": {"num_bits": 12, "strategy": "group", "group_size": 32}}}}, "bits is 12"),
        ({"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"strategy": "block"}}}}, 'strategy of g.weights is "block"'),
        ({"config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"actorder": "group"}}}}, 'actorder "group"'),
        ({"config_groups": {"g": GROUP | {"input_activations": TOKENS}}}, "activations int8 need"),
        ({"config_groups": {"g": ROWS | {"input_activations": TOKENS | {"dynamic": False}}}}, "dynamic of g.input_activations is false"),
        ({"config_groups": {"g": ROWS | {"output_activations": TOKENS}}}, "g.output_activations is not"),
    ],
)
def test_unsupported_quantization_is_refused_by_name(changes, message):
    config_json = {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}}
    assert parse_configuration(config_json).scheme_of("model.layers.0.mlp.up_proj") == INT4
    with pytest.raises(ValueError) as refusal:
        parse_configuration(config_json | changes)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "scheme", "dtype", "message"),
    [
        (GPT2, INT4, torch.float32, r"GPT-2 stores linear weights as \[in, out\].* export the model to GGUF"),
        (T5, INT4, torch.float32, "transformers cannot load packed weights of it"),
        (MARIAN, MXFP4, torch.bfloat16, "in which transformers would also round the positions"),
        ({}, NVFP4, torch.float32, r"needs all other weights in torch\.bfloat16 \(got torch\.float32\)"),
        ({}, Scheme(Grid("int", 4, 48)), torch.float32, r"model\.layers\.0\.\S+ \[64, 64\]: group_size 48 does not divide"),
    ],
)
def test_scheme_that_cannot_be_stored_is_refused_before_writing(randomise, tmp_path, options, scheme, dtype, message):
    model = network(randomise, **options)
    with pytest.raises(ValueError, match=message):
        export(model.config, model.state_dict(), tmp_path / "out", dtype=dtype, schemes=dict.fromkeys(linears(model), scheme))
    assert not list(tmp_path.iterdir())


def test_mixture_that_transformers_does_not_read_is_refused(llama):
    first, *others = linears(llama)
    with pytest.raises(ValueError, match="either all or no layers can be asymmetric"):
        quantization_config(llama.config, {first: ASYMMETRIC} | dict.fromkeys(others, INT4))
    for grid, activations in ((Grid("int", 4, None), "int8"), (Grid("int", 8, None), "fp8"), (Grid("mxfp4", 4, 32), "fp8")):
        with pytest.raises(ValueError, match=f"activations {activations} need"):
            Scheme(grid, activations)
