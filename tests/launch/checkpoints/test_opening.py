"""Quantized folders are loaded with dequantized weights, and refused where unquantized weights are needed, as are damaged ones."""

import pytest
import torch

from data.command_line import UserError
from launch.checkpoints.conversion import convert
from launch.checkpoints.initial import InitialWeights
from launch.checkpoints.opening import load_model, open_model
from model.compression.grids import Grid, fake_quantized_rows, round_to
from model.compression.packed import Scheme
from model.config import ModelConfig
from model.huggingface import export
from model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=61, sequence_length=24, hidden_size=32, num_layers=1, num_attention_heads=4)
SCHEME = Scheme(Grid("int", 8, None), "int8")


@pytest.fixture
def quantized(tmp_path):
    """Path and state of an exported model in which one layer has weights and inputs of eight bits."""
    state = dict(Transformer(CONFIG).state_dict())
    state["1.feed_forward.down.weight"] = round_to(state["1.feed_forward.down.weight"], SCHEME.grid)
    export(CONFIG, state, tmp_path / "out", schemes={"1.feed_forward.down.weight": SCHEME})
    return str(tmp_path / "out"), state


def test_quantized_folder_is_loaded_with_dequantized_weights(quantized):
    folder, state = quantized
    model = load_model(folder).model
    weight = state["1.feed_forward.down.weight"].weight()
    x = torch.randn(2, 3, CONFIG.intermediate_size)
    assert torch.equal(model.get_submodule("1.feed_forward.down")(x), fake_quantized_rows(x, "int8") @ weight.T)
    assert torch.equal(model.get_submodule("1.feed_forward.up").weight, state["1.feed_forward.up.weight"])


def test_prepared_data_is_not_a_model(prepared):
    for door in (lambda: open_model(str(prepared)), lambda: convert(prepared, prepared.parent / "out", 1e9, print)):
        with pytest.raises(UserError) as refusal:
            door()
        advice = "Give a run folder, a checkpoint in one, or a Hugging Face folder."
        assert str(refusal.value) == f"{prepared} is prepared data, not a model. {advice}"


def test_run_does_not_start_from_quantized_weights(quantized):
    folder, _ = quantized
    assert open_model(folder).schemes == {"1.feed_forward.down.weight": SCHEME}
    with pytest.raises(UserError, match=r"is quantized \(int8, one scale per row, inputs int8\): a run starts from weights that are not"):
        InitialWeights(folder, CONFIG)


def test_weights_that_are_not_finite_are_neither_written_nor_loaded(tmp_path, monkeypatch):
    state = dict(Transformer(CONFIG).state_dict())
    state["1.feed_forward.up.weight"] = state["1.feed_forward.up.weight"] * torch.nan
    with pytest.raises(ValueError, match=r"1\.feed_forward\.up\.weight contains numbers that are not finite, or above 3\.4"):
        export(CONFIG, state, tmp_path / "refused")
    monkeypatch.setattr("model.huggingface.folder.is_finite", lambda tensor: True)
    export(CONFIG, state, tmp_path / "out")
    message = r"out/model\.safetensors: 1\.feed_forward\.up\.weight contains numbers that are not finite"
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "out"))
