"""Training after compression: a teacher, zeros that stay 0, rounded weights."""

import dataclasses
import json

import pytest
import torch

from data.command_line import UserError
from launch import pretrain
from launch.ranks.layout import Layout
from launch.training import run_folder
from launch.training.deepspeed_config import complete
from launch.training.recipe import read_run_settings
from launch.training.settings import DistillationSettings, QuantizationSettings, RunSettings, share_the_batch
from launch.training.teacher import Teacher, fingerprint
from model import huggingface
from model.config import ModelConfig, count_parameters
from model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=800, sequence_length=32, hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    """The folder of a model with other widths and depth than CONFIG."""
    config = dataclasses.replace(CONFIG, hidden_size=64, head_size=None, num_layers=3)
    folder = tmp_path_factory.mktemp("models") / "dense"
    huggingface.export(config, Transformer(config, 5).state_dict(), folder)
    return str(folder)


def test_a_teacher_gives_its_models_logits_under_the_runs_document_mask(dense):
    apart = dataclasses.replace(CONFIG, document_mask=True)
    tokens, segments = torch.arange(10)[None], torch.tensor([[1] * 6 + [2] * 4])
    _, state = huggingface.load(dense)
    for config in (CONFIG, apart):
        network = Teacher(dense, config).network(CPU, torch.float32)
        plain = Transformer(dataclasses.replace(network.config, document_mask=False)).eval()
        plain.load_state_dict(dict(state))
        alone = network(tokens, segments)[:, 6:] - plain(tokens[:, 6:], segments[:, 6:])
        assert (alone.abs().max() < 1e-5) == config.document_mask
        assert not network(tokens, segments).requires_grad


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 900}, "has vocab_size 800; this run has model.vocab_size 900, and they must be the same."),
        ({"sequence_length": 64}, "reads at most 32 tokens; model.sequence_length is 64."),
        ({"architecture": "encoder", "num_classes": 2}, "can teach only tokens: "),
        ({"architecture": "encoder"}, "has architecture decoder; this run has model.architecture encoder, and they must be the same."),
    ],
)
def test_a_teacher_with_another_vocabulary_or_architecture_is_refused(dense, changes, reason):
    with pytest.raises(UserError) as refused:
        Teacher(dense, dataclasses.replace(CONFIG, **changes))
    assert str(refused.value).startswith(f"distillation.teacher {dense} {reason}")


def test_a_run_resumes_only_with_the_same_weights_of_its_teacher(dense, tmp_path):
    settings = RunSettings(output=str(tmp_path), distillation=DistillationSettings(teacher=dense))
    (tmp_path / "run.json").write_text("{}")
    network = Teacher(dense, CONFIG).network(CPU, torch.bfloat16)
    before = fingerprint(network)
    assert run_folder.record_teacher(settings, before) is None
    assert run_folder.record_teacher(settings, fingerprint(Teacher(dense, CONFIG).network(CPU, torch.bfloat16))) is None
    next(network.parameters())[0, 0] += 1
    assert fingerprint(network) != before
    assert "has other weights than the teacher of" in run_folder.record_teacher(settings, fingerprint(network))
    assert run_folder.record_teacher(dataclasses.replace(settings, allow_changes=True), fingerprint(network)) is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"teacher_fingerprint": fingerprint(network)}


def test_the_plan_shows_the_teacher_and_the_rounding(dense, tiny, capsys):
    words = [*tiny, "--distillation.teacher", dense, "--quantization.bits", "4", "--quantization.group_size", "16"]
    assert pretrain.main([*words, "--quantization.activations", "int8", "--dry_run"]) == 0
    shown = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines())
    parameters = count_parameters(Teacher(dense, CONFIG).config)
    assert shown["teacher"].startswith(f"{dense}: {parameters:,} parameters; ")
    assert f"; the teacher {2 * parameters / 2**20:.1f} MiB; " in shown["memory"]
    assert shown["rounding"].startswith("the blocks compute with 4-bit weights, one scale per 16 entries, and int8 inputs; ")


def test_hold_zeros_is_refused_for_a_model_without_zeros(dense, tiny):
    words = ["--model.hidden_size=64", "--model.num_layers=3", "--init", dense, "--hold_zeros", "true", "--dry_run"]
    with pytest.raises(UserError, match=r"^hold_zeros needs a pruned model: in init \S+ no weight of the blocks' linear layers is 0\."):
        pretrain.main([*tiny, *words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--distillation.temperature=2"], "distillation.temperature 2 (command line) has no effect without distillation.teacher."),
        (["--quantization.symmetric=false"], "quantization.symmetric false (command line) has no effect without quantization.bits."),
        (["--quantization.bits=9"], "quantization.bits is 9; it must be at least 2 and at most 8. Set on the command line."),
        (
            ["--quantization.bits=4", "--quantization.group_size=48"],
            "quantization.group_size 48 (command line) does not divide the rows of the blocks' weights, which have 256, 768 entries "
            "(model.hidden_size, model.num_attention_heads x model.head_size, model.intermediate_size). "
            "Use 8, 16, 32, 64, 128, 256 or 0 (the whole row).",
        ),
        (
            ["--hold_zeros=true"],
            "hold_zeros true (command line) needs init: give the folder of the pruned model whose zeros are kept.",
        ),
        (
            ["--distillation.teacher=dense", "--distillation.kl_weight=0", "--distillation.cross_entropy_weight=0"],
            "distillation.kl_weight 0 (command line) and distillation.cross_entropy_weight 0 (command line) leave nothing to learn. "
            "Set one of them above 0.",
        ),
        (
            ["--distillation.teacher=dense", "--distillation.cross_entropy_weight=0", "--loss.z_loss=1e-4"],
            "loss.z_loss 0.0001 (command line) has no effect with distillation.cross_entropy_weight 0 (command line).",
        ),
        (
            ["--distillation.teacher=dense", "--distillation.kl_weight=-1"],
            "distillation.kl_weight is -1; it must be at least 0. Set on the command line.",
        ),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(words, sentence):
    with pytest.raises(UserError) as refused:
        read_run_settings(words)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("settings", "layout", "sentence"),
    [
        (
            {"quantization": QuantizationSettings(bits=4)},
            Layout(2, 1, 2),
            "tensor_parallel_size 2 is not supported with quantization.bits 4: several ranks would share a scale. ",
        ),
        (
            {"distillation": DistillationSettings("dense")},
            Layout(2, 1, 1, 2),
            "sequence_parallel_size 2 is not supported with distillation.teacher: the teacher needs whole sequences. ",
        ),
    ],
)
def test_unsupported_layouts_of_training_after_compression_are_refused(settings, layout, sentence):
    run = share_the_batch(dataclasses.replace(read_run_settings([]), **settings), layout)
    with pytest.raises(UserError) as refused:
        complete({"zero_optimization": {"stage": 1}}, "x.json", run, layout, "cpu")
    assert str(refused.value).startswith(sentence)
