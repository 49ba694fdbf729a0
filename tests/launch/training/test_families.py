"""Each family is trained, resumed, started from another model's weights and evaluated, by the scripts that users run."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest

from data.command_line import UserError
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.sampling.sources import open_folders
from data.tokenization.loading import load_tokenizer
from launch import pretrain
from launch.checkpoints.opening import load_model
from launch.evaluation import evaluating
from launch.evaluation.evaluation_sets import window_sets
from launch.evaluation.settings import EvaluateSettings
from model.config import ModelConfig
from model.huggingface import SpecialTokens, export
from model.transformer import Transformer
from tests.ranks import REPOSITORY, finish, start_ranks
from tests.words import over

PRETRAIN = REPOSITORY / "launch" / "pretrain.py"
SPECIAL = ("[CLS]", "[MASK]", *(f"<extra_id_{number}>" for number in range(8)))
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "norm": "layernorm", "biases": True}
ENCODER = SHAPE | {"architecture": "encoder", "norm_position": "post", "positions": "learned", "activation": "gelu", "token_types": 2}
PAIR = SHAPE | {"architecture": "encoder_decoder", "norm_position": "post", "positions": "sinusoidal", "activation": "relu"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A prepared folder of texts made of a few hundred random words."""
    return prepared(tmp_path_factory.mktemp("texts"), made_up(0), special_tokens=SPECIAL, vocab_size=600)


def made_up(seed: int) -> list[str]:
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 7))) for _ in range(300)]
    return [json.dumps({"text": " ".join(dice.choices(words, k=60))}) for _ in range(200)]


@pytest.fixture(scope="module")
def labelled(texts, tmp_path_factory) -> Path:
    """A prepared folder of short texts with the label "good" or "bad", with the same tokenizer."""
    folder, dice = tmp_path_factory.mktemp("labelled"), random.Random(1)
    drawn = [dice.choice(("good", "bad")) for _ in range(200)]
    lines = [json.dumps({"text": f"{'ab' if label == 'good' else 'zy'} {dice.randint(0, 99)}", "label": label}) for label in drawn]
    return prepared(folder, lines, tokenizer=str(texts / "tokenizer.model"), pair_field="label")


def prepared(folder: Path, lines: list[str], **more) -> Path:
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    output = folder / "prepared"
    prepare(PrepareSettings(input=(str(folder / "texts.jsonl"),), output=str(output), held_out=0.2, workers=1, **more))
    return output


def words_of(model: dict, data: Path, output: Path, *more: str) -> list[str]:
    words = ["--data", str(data), "--output", str(output), "--precision", "float32", "--train_steps", "4", "--schedule.warmup_steps", "1"]
    words += ["--batch.global_batch_size", "8", "--log.validation_samples", "0", "--log.sample_interval", "2", "--checkpoint.interval", "2"]
    words += [f"--model.{name}={str(value).lower()}" for name, value in model.items()]
    return [*words, *more]


def train(words: list[str], ranks: int = 1) -> str:
    return finish(start_ranks(ranks, PRETRAIN, *words, OMP_NUM_THREADS="1"))[0]


def last(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in lines for name, value in line.items()}


@pytest.fixture(scope="module")
def bert(texts, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "bert"
    model = ENCODER | {"vocab_size": 600, "sequence_length": 32, "num_classes": 2}
    train(words_of(model, texts, run, "--config", str(recipe(run)), "--data.next_sentence", "true"))
    return run


def recipe(run: Path) -> Path:
    """Write a nearly empty recipe, so that the run has none of the demo's settings."""
    path = run.with_suffix(".yaml")
    path.write_text("seed: 1\n")
    return path


def test_bert_trains_and_evaluates_as_it_was_validated(bert):
    said = last(bert)
    assert "throughput/tflops_per_device" in said and "throughput/utilization" not in said  # the peak of a CPU is not known
    result = evaluating.evaluate(EvaluateSettings(str(bert)), show_progress=False)
    assert result.loss == pytest.approx(said["loss/validation"], abs=1e-5)
    assert result.score.accuracy == said["accuracy/validation"]
    assert result.bytes is None and "bits_per_byte/train" not in said and "perplexity/train" not in said
    assert 4 < result.score.token_loss / result.tokens < 7 and 0.5 < result.score.class_loss / result.score.classes < 0.9


CLASSIFIER = ["--data.objective", "classification", "--data.labels", "good", "bad", "--model.token_head", "false"]


@pytest.fixture(scope="module")
def classifier(bert, labelled, tmp_path_factory) -> tuple[Path, list[str]]:
    run = tmp_path_factory.mktemp("runs") / "classifier"
    weights = shutil.copytree(bert, run.with_name("weights"))
    words = words_of({}, labelled, run, "--init", str(weights), *CLASSIFIER, "--train_steps", "40", "--optimizer.learning_rate", "3e-3")
    assert "    init: " in train(words)
    shutil.rmtree(weights)
    return run, words


def test_a_pretrained_encoder_becomes_a_classifier(bert, classifier):
    run, _ = classifier
    result = evaluating.evaluate(EvaluateSettings(str(run)), show_progress=False)
    assert result.loss == pytest.approx(last(run)["loss/validation"], abs=1e-5) and result.tokens == 0
    assert result.score.accuracy == last(run)["accuracy/validation"] > 0.9
    assert len(json.loads((run / "run.json").read_text())["init_fingerprint"]) == 64
    assert load_model(str(run)).config == dataclasses.replace(load_model(str(bert)).config, token_head=False)


def test_a_run_resumes_without_the_weights_that_it_started_from(classifier, tmp_path):
    run, words = classifier
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step_00000040")
    (step,) = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step": 40, "loss/train"' in line]
    words = over(words, ["--output", str(copy)])
    assert "Resuming from step 38 of 40" in train(words)
    (again,) = [line for line in (copy / "metrics.jsonl").read_text().splitlines() if '"step": 40, "loss/train"' in line]
    assert json.loads(again)["loss/train"] == json.loads(step)["loss/train"]
    assert json.loads((copy / "run.json").read_text())["init_fingerprint"] == json.loads((run / "run.json").read_text())["init_fingerprint"]


@pytest.fixture(scope="module")
def pairs(texts, tmp_path_factory) -> Path:
    """A prepared folder of texts, each paired with its words in reverse order."""
    folder, dice = tmp_path_factory.mktemp("pairs"), random.Random(2)
    drawn = [dice.choices(["ab", "cd", "ef", "gh"], k=dice.randint(2, 5)) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(one), "backwards": " ".join(reversed(one))}) for one in drawn]
    return prepared(folder, lines, tokenizer=str(texts / "tokenizer.model"), pair_field="backwards")


FAMILIES = {
    "pairs": (1, PAIR, ["--data.objective", "pairs", "--data.target_length", "24", "--loss.label_smoothing", "0.1"]),
    "span_corruption": (
        2,
        PAIR | {"norm_position": "pre", "norm": "rmsnorm", "positions": "relative", "activation": "geglu", "biases": False},
        ["--deepspeed", "ds_configs/pipeline_zero1.json", "--loss.z_loss", "1e-3"],
    ),
    "prefix": (1, SHAPE | {"prefix_attention": True}, ["--data.objective", "prefix", "--deepspeed", "ds_configs/zero3.json"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_samples_and_evaluates_as_it_was_validated(name, texts, pairs, tmp_path):
    ranks, model, more = FAMILIES[name]
    run = tmp_path / "run"
    shape = model | {"vocab_size": 600, "sequence_length": 32}
    plan = train(words_of(shape, pairs if name == "pairs" else texts, run, "--config", str(recipe(run)), *more), ranks)
    assert f"{'target' if name != 'prefix' else ''} tokens: " in plan and re.search(
        r"step: 4 \| validation loss: [\d.]+ \| perplexity: ", plan
    )
    assert last(run)["loss/validation"] == pytest.approx(evaluating.evaluate(EvaluateSettings(str(run)), False).loss, abs=1e-5)
    assert ("perplexity/train" in last(run)) == (name == "prefix"), "with smoothing or z-loss the loss is not a perplexity"


REFUSED = {
    "a label too few": (
        over(CLASSIFIER, ["--data.labels", "good", "bad", "odd"]),
        r"^model\.num_classes is 2; data\.labels are 3, so it must be 3\.$",
    ),
    "a head that is not trained": (
        [*CLASSIFIER, "--model.token_head", "true"],
        r"^model\.token_head is true; data\.objective classification trains none: set it to false\.$",
    ),
    "classes without sentences": (
        ["--data.next_sentence", "false"],
        r"^model\.num_classes is 2; data\.next_sentence is false, so it must be 0\.$",
    ),
    "a mask without a head": (
        ["--model.token_head", "false"],
        r"^model\.token_head is false; data\.objective masked predicts tokens: set it to true\.$",
    ),
    "another width": (
        ["--model.hidden_size", "64"],
        r"^model\.hidden_size 64 \(command line\) differs from init \S+, where it is 32\. Remove the setting, or start from other",
    ),
    "a longer table": (
        ["--model.sequence_length", "64"],
        r"^model\.sequence_length 64 \(command line\) differs from init \S+, where it is 32\.",
    ),
    "a size too": (
        ["--size", "gpt2-124m"],
        r"^size gpt2-124m \(command line\) and init \S+ \(command line\) both set the model; keep one of them\.\n"
        r"data\.next_sentence is true \(command line\); it is for data\.objective masked, and this is causal\.$",
    ),
    "nothing there": (["--init", "nowhere"], r"nowhere is not a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_init_are_refused(name, bert, texts, labelled, tmp_path):
    more, sentence = REFUSED[name]
    data = labelled if "classification" in more else texts
    words = words_of({}, data, tmp_path / "run", "--init", str(bert), "--data.next_sentence", str("classification" not in more).lower())
    with pytest.raises(UserError, match=sentence):
        pretrain.main(over(words, [*more, "--dry_run"]))


def test_weights_of_another_tokenizer_are_refused(bert, tmp_path):
    other = prepared(tmp_path, made_up(3), special_tokens=SPECIAL, vocab_size=600)
    words = words_of({}, other, tmp_path / "run", "--init", str(bert), "--data.next_sentence", "true", "--dry_run")
    with pytest.raises(
        UserError,
        match=r"prepared was tokenized with \S+/tokenizer\.model, which gives other ids than \S+/bert/tokenizer\.model, the tokenizer of",
    ):
        pretrain.main(words)


def test_windows_over_pairs_are_refused(pairs):
    """The loss of a causal model would count both texts of a pair."""
    with pytest.raises(UserError, match=r"holds pairs of texts \(--pair_field\); data.objective causal learns single texts"):
        window_sets(ModelConfig(), open_folders([str(pairs)]), "validation", 1, 16, 16)


def test_another_start_token_than_that_of_init_is_refused(pairs, tmp_path):
    config, tokenizer, folder = ModelConfig(**PAIR, vocab_size=600, sequence_length=32), load_tokenizer(pairs), tmp_path / "hf"
    special = SpecialTokens(tokenizer.end_of_text, decoder_start=tokenizer.special_tokens["[CLS]"])
    export(config, dict(Transformer(config).named_parameters()), folder, special)
    shutil.copy(pairs / "tokenizer.model", folder)
    words = words_of({}, pairs, tmp_path / "run", "--init", str(folder), "--data.objective", "pairs", "--dry_run")
    sentence = r"^data\.start_token is {}; a target of init \S+ begins with \[CLS\]\. Give --data\.start_token '\[CLS\]'\.$"
    with pytest.raises(UserError, match=sentence.format(r"not given, so it is <\|endoftext\|>")):
        pretrain.main(words)
    with pytest.raises(UserError, match=sentence.format(r"\[MASK\]")):
        pretrain.main([*words, "--data.start_token", "[MASK]"])
    assert pretrain.main([*words, "--data.start_token", "[CLS]"]) == 0
    measured = EvaluateSettings(str(folder), data=str(pairs), objective="pairs")
    told = evaluating.evaluate(measured, False).loss
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | {"decoder_start_token_id": tokenizer.end_of_text}))
    assert abs(evaluating.evaluate(measured, False).loss - told) > 1e-4, "the folder's start token is used"


def test_the_plan_lists_the_weights_that_are_taken_from_init(bert, labelled, tmp_path, capsys):
    words = words_of({}, labelled, tmp_path / "run", "--init", str(bert), *CLASSIFIER, "--dry_run")
    assert pretrain.main(words) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    init: ")]
    assert re.fullmatch(
        r"    init: \S+ \(step 4\): 39 of 41 parameters; fresh: 6\.classes\.weight, 6\.classes\.bias; "
        r"not used: 6\.classes\.bias, 6\.classes\.weight, 7\.\S+, .*",
        row,
    ), row
