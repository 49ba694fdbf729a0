"""Tests of the table of tasks and of what a task states about models."""

import dataclasses
from pathlib import Path

import pytest
import torch

from data.command_line import UserError
from data.sampling.batches import Batch
from data.sampling.objectives.table import OBJECTIVES
from data.sampling.samples import IGNORED
from data.sampling.settings import SamplingSettings
from launch.checkpoints.opening import OpenedModel
from launch.evaluation.score import Score
from launch.evaluation.tasks.table import TASKS, task_named, task_of
from model.config import ModelConfig

MODELS = {
    "causal": {},
    "prefix": {"prefix_attention": True},
    "masked": {"architecture": "encoder", "token_types": 2},
    "classification": {"architecture": "encoder", "token_head": False, "num_classes": 2},
    "span_corruption": {"architecture": "encoder_decoder"},
}


def opened(options: dict, recipe: dict | None = None) -> OpenedModel:
    return OpenedModel(ModelConfig(**options), {}, Path("somewhere"), None, None, recipe or {})


def test_every_objective_has_a_task():
    assert list(TASKS) == list(OBJECTIVES)
    assert all(task.objective is OBJECTIVES[name] for name, task in TASKS.items())


@pytest.mark.parametrize("name", MODELS)
def test_task_of_an_exported_model_follows_from_its_outputs(name):
    assert task_of(opened(MODELS[name])) is TASKS[name]


def test_task_is_the_given_one_or_that_of_the_run():
    pairs = {"data": {"objective": "pairs"}}
    assert task_of(opened(MODELS["span_corruption"], pairs)) is TASKS["pairs"]
    assert task_of(opened(MODELS["span_corruption"], pairs), "span_corruption") is TASKS["span_corruption"]
    assert task_named(None, "encoder") is TASKS["masked"]


def test_objective_of_another_architecture_is_refused():
    with pytest.raises(UserError, match=r"masked does not apply to architecture decoder.* Use causal or prefix"):
        task_of(opened({}), "masked")


@pytest.mark.parametrize(
    ("name", "options", "data", "messages"),
    [
        ("causal", {}, {}, []),
        ("prefix", {}, {}, ["objective is prefix and model.prefix_attention false; objective prefix needs prefix_attention"]),
        ("causal", {"prefix_attention": True}, {}, ["objective is causal and model.prefix_attention true"]),
        ("masked", MODELS["masked"], {"next_sentence": True}, ["num_classes is 0; data.next_sentence is true, so it must be 2."]),
        (
            "masked",
            MODELS["classification"],
            {},
            ["num_classes is 2; data.next_sentence is false, so it must be 0.", "masked predicts tokens: set it to true."],
        ),
        ("classification", MODELS["classification"], {"labels": ("a", "b")}, []),
        (
            "classification",
            MODELS["masked"],
            {"labels": ("a", "b", "c")},
            ["num_classes is 0; data.labels are 3, so it must be 3.", "classification trains none: set it to false."],
        ),
    ],
)
def test_models_without_the_outputs_of_a_task_are_refused(name, options, data, messages):
    complaints = TASKS[name].model_complaints(ModelConfig(**options), SamplingSettings(**data))
    assert len(complaints) == len(messages)
    assert all(message in complaint for message, complaint in zip(messages, complaints, strict=True))


def test_metrics_by_hand():
    score = Score(token_loss=8.0, tokens=4, class_loss=3.0, classes=5, right=2)
    metrics = TASKS["masked"].metrics(score)
    assert metrics == pytest.approx({"perplexity": 7.38905609893065, "accuracy": 0.4})
    assert TASKS["causal"].metrics(Score(8.0, 4), num_bytes=16)["bits_per_byte"] == pytest.approx(8.0 / 16 * 1.4426950408889634)
    assert TASKS["classification"].metrics(dataclasses.replace(score, token_loss=0.0, tokens=0)) == {"accuracy": 0.4}


def test_masked_tokens_are_restored_from_their_targets():
    tokens, targets = torch.tensor([[1, 9, 3]]), torch.tensor([[IGNORED, 2, IGNORED]])
    batch = Batch(tokens, torch.ones_like(tokens), targets)
    assert TASKS["masked"].original_tokens(batch).tolist() == [[1, 2, 3]]
    assert TASKS["causal"].original_tokens(batch).tolist() == [[1, 9, 3]]
