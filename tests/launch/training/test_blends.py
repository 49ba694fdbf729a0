"""Runs on several prepared folders: mistakes are refused before the start, and curves follow each source."""

import dataclasses
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data import show
from data.command_line import UserError, flatten
from data.preparation.driver import prepare
from data.preparation.settings import PrepareSettings
from data.sampling.batches import evaluation_batches
from data.sampling.show_settings import ShowSettings
from data.tokenization.tiktoken_tokenizer import published_pattern
from launch import evaluate, pretrain
from launch.checkpoints.opening import load_model, open_model
from launch.checkpoints.run_record import tokenizer_files
from launch.compressing.samples import paths_for
from launch.evaluation import evaluating
from launch.evaluation.settings import EvaluateSettings
from launch.training.data import open_data
from launch.training.recipe import read_run_settings
from launch.training.settings import RunSettings
from model.loss import token_losses
from tests.data.tokenization.vocabularies import rank_file
from tests.ranks import REPOSITORY, finish, start_ranks
from tests.words import over

PRETRAIN = REPOSITORY / "launch" / "pretrain.py"


@pytest.fixture(scope="session")
def other(prepared, tmp_path_factory):
    """A second, smaller prepared folder with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other corpus")
    dice = random.Random(1)
    for number in range(40):
        (folder / f"{number:03d}.txt").write_text(" ".join(str(dice.randint(0, 9999)) for _ in range(60)) + "\n")
    output = tmp_path_factory.mktemp("other") / "numbers"
    tokenizer = str(prepared / "tokenizer.model")
    prepare(PrepareSettings(input=(str(folder),), output=str(output), tokenizer=tokenizer, held_out=0.2, workers=1))
    return output


@pytest.fixture
def blend(tiny, prepared, other):
    """Arguments of a tiny run on both folders, with three samples of the first to one of the second."""
    return over(tiny, ["--data", str(prepared), str(other), "--data.weights", "3", "1"])


def refusal(arguments: list[str], monkeypatch) -> str:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError) as refused:
        pretrain.main([*arguments, "--dry_run"])
    return str(refused.value)


def plan_of(arguments: list[str], monkeypatch, capsys) -> dict[str, list[str]]:
    """Return the rows of a run's plan by name."""
    monkeypatch.chdir(REPOSITORY)
    assert pretrain.main([*arguments, "--dry_run"]) == 0
    rows: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, text = line.strip().partition(": ")
        rows.setdefault(name, []).append(text)
    return rows


def test_plan_shows_the_share_and_epochs_of_each_source(blend, prepared, other, monkeypatch, capsys):
    rows = plan_of(blend, monkeypatch, capsys)
    first, second = rows["data"]
    assert first.startswith(f"{prepared}: ") and "; 75.000% of the blend, " in first
    assert second.startswith(f"{other}: ") and "; 25.000% of the blend, " in second
    epochs, samples = re.search(r", ([\d.]+) epochs of its ([\d,]+) samples", second).groups()
    assert float(epochs) == pytest.approx(12 * 8 / 4 / int(samples.replace(",", "")), abs=0.005)


def test_plan_shows_the_packing_and_its_padding(blend, monkeypatch, capsys):
    joined, whole = (plan_of([*blend, "--data.packing", packing], monkeypatch, capsys) for packing in ("packed", "best_fit"))
    padding = [float(re.search(r"([\d.]+)% padding", rows["samples"][0])[1]) for rows in (joined, whole)]
    assert padding[0] < padding[1]
    sampling = open_data(read_run_settings([*blend, "--data.packing", "best_fit"])).sampling
    empty = [1 - len(one.stream) / (32 * one.num_samples) for one in sampling.samples]
    assert padding[1] == pytest.approx(100 * (3 * empty[0] + empty[1]) / 4, abs=0.005)
    note = "best-fit packing keeps documents whole, but without model.document_mask they attend to other documents of their sample"
    assert note not in joined["note"] and note in whole["note"]


def test_too_many_epochs_are_refused_with_the_most_steps_that_fit(blend, monkeypatch, capsys):
    arguments = [*blend, "--train_steps", "400", "--data.max_epochs", "2"]
    message = refusal(arguments, monkeypatch)
    found = re.fullmatch(
        r"numbers would be read for ([\d.]+) epochs in 400 steps; data\.max_epochs is 2\.\nNearest: train_steps (\d+)\.",
        message,
    )
    assert found and float(found[1]) > 2
    steps = int(found[2])
    plan_of([*arguments, "--train_steps", str(steps)], monkeypatch, capsys)
    assert "numbers would be read for 2." in refusal([*arguments, "--train_steps", str(steps + 1)], monkeypatch)


def test_one_sample_too_many_is_shown_as_more_than_the_limit(tiny, monkeypatch, capsys):
    samples = open_data(read_run_settings(tiny)).sampling.samples[0].num_samples
    arguments = [*tiny, "--batch.global_batch_size", "1", "--batch.micro_batch_size", "1", "--data.max_epochs", "1"]
    plan_of([*arguments, "--train_steps", str(samples)], monkeypatch, capsys)
    message = refusal([*arguments, "--train_steps", str(samples + 1)], monkeypatch)
    assert message == (
        f"prepared would be read for 1.01 epochs in {samples + 1:,} steps; data.max_epochs is 1.\nNearest: train_steps {samples:,}."
    )
    length = read_run_settings(tiny).model.sequence_length
    in_tokens = refusal([*arguments, "--train_steps", "null", "--train_tokens", str((samples + 1) * length)], monkeypatch)
    assert in_tokens.endswith(f"\nNearest: train_tokens {samples * length}.")
    plan_of([*arguments, "--train_steps", "null", "--train_tokens", str(samples * length)], monkeypatch, capsys)


def test_limit_below_one_step_is_refused(tiny, monkeypatch):
    assert refusal([*tiny, "--data.max_epochs", "1e-6"], monkeypatch).endswith(
        "\nNot even one step fits; raise data.max_epochs or prepare more text."
    )
    assert refusal([*tiny, "--data.max_epochs", "0"], monkeypatch) == "data.max_epochs is 0; it must be above 0. Set on the command line."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.weights", "1", "2", "3"], "data.weights has 3 weights for 2 sources"),
        (["--data.weights", "1", "0"], "data.weights has 0; a weight is a finite number above 0"),
        (
            ["--data.weights", "1", "1e-17"],
            "data.weights has 1e-17; with these other weights the smallest one that is not rounded to 0 is 6e-14",
        ),
        (["--data.weights", "one", "two"], "data.weights is"),
        (["--data.fim_rate", "0.5"], 'has no special token "<|fim_prefix|>"'),
        (["--data.fim_rate", "-0.5", "--data.fim_tokens", *["<|endoftext|>"] * 3], "it must be at least 0 and at most 1"),
        (["--data.packing", "bestfit"], 'Did you mean "best_fit"?'),
        (["--data"], "data.path names no folder"),
    ],
)
def test_invalid_blend_is_refused(blend, arguments, message, monkeypatch):
    assert message in refusal(over(blend, arguments), monkeypatch)


def test_folder_with_another_tokenizer_is_refused_by_name(blend, prepared, other, tmp_path, monkeypatch):
    copy = shutil.copytree(other, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = refusal(over(blend, ["--data", str(prepared), str(copy)]), monkeypatch)
    assert message.startswith(f"{copy} and {prepared} have different tokenizers: 000000000000 (800 ids) is not ")


def test_fingerprint_depends_on_all_sources_and_their_order(tiny, prepared, other):
    def fingerprint(*folders: Path) -> str:
        return open_data(read_run_settings(over(tiny, ["--data", *map(str, folders)]))).fingerprint

    alone = fingerprint(prepared)
    assert alone == open_data(read_run_settings(tiny)).sampling.folders["prepared"].fingerprint
    assert len({alone, fingerprint(other), fingerprint(prepared, other), fingerprint(other, prepared)}) == 4


def test_show_settings_have_the_names_and_defaults_of_a_recipe():
    recipe = flatten(dataclasses.asdict(RunSettings()))
    for name, default in flatten(dataclasses.asdict(ShowSettings())).items():
        if name not in ("run", "step", "rank", "world_size", "characters"):
            assert recipe[name] == default, name


def entries(folder: Path) -> dict[int, dict]:
    """Return the scalars of each step in metrics.jsonl."""
    found: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], {}).update(entry)
    return found


@pytest.fixture(scope="module")
def finished(prepared, other, tmp_path_factory):
    """A tiny finished run on both folders, best-fit with a document mask, and its arguments."""
    folder = tmp_path_factory.mktemp("blended") / "run"
    arguments = ["--data", str(prepared), str(other), "--data.weights", "3", "1", "--data.packing", "best_fit", "--output", str(folder)]
    arguments += ["--model.vocab_size", "800", "--model.sequence_length", "32", "--model.hidden_size", "32", "--model.num_layers", "2"]
    arguments += ["--model.num_attention_heads", "2", "--model.document_mask", "--batch.global_batch_size", "8", "--log.interval", "1"]
    arguments += ["--batch.micro_batch_size", "2", "--train_steps", "8", "--schedule.warmup_steps", "2", "--log.validation_samples", "0"]
    arguments += ["--log.validation_interval", "4", "--checkpoint.interval", "4", "--precision", "float32", "--peak_tflops", "0.5"]
    finish(start_ranks(1, PRETRAIN, *arguments, OMP_NUM_THREADS="1"))
    return folder, arguments


def test_curves_of_a_blend_follow_each_source(finished, prepared, other):
    folder, arguments = finished
    seen = entries(folder)
    sampling = open_data(read_run_settings(arguments)).sampling
    for step in range(1, 9):
        for name, epochs in sampling.epochs(8 * step).items():
            assert seen[step][f"progress/epochs/{name}"] == pytest.approx(epochs)
    assert sampling.epochs(64)["numbers"] == 16 / sampling.samples[1].num_samples
    last = seen[8]
    tokens = [len(one.splits["validation"]) for one in sampling.folders.values()]
    losses = [last["loss/validation/prepared"], last["loss/validation/numbers"]]
    assert min(tokens) > 0 and losses[0] != losses[1]
    assert last["loss/validation"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
    num_bytes = sum(one.splits["validation"].num_bytes for one in sampling.folders.values())
    assert last["bits_per_byte/validation"] == pytest.approx(last["loss/validation"] / np.log(2) * sum(tokens) / num_bytes, rel=1e-6)
    assert "validation loss: " in (folder / "log.txt").read_text() and "| numbers: " in (folder / "log.txt").read_text()


def test_utilization_is_the_share_of_the_given_peak(finished):
    for entry in entries(finished[0]).values():
        assert entry["throughput/utilization"] == pytest.approx(entry["throughput/tflops_per_device"] / 0.5)
    log = (finished[0] / "log.txt").read_text()
    assert "; peak 0.5 TFLOP/s (peak_tflops)" in log and log.count("| MFU: ") == 8


def test_evaluation_of_a_blended_run_gives_its_validation_losses(finished, other, capsys):
    folder, _ = finished
    last = entries(folder)[8]
    sources = evaluating.evaluate_sources(EvaluateSettings(str(folder)), show_progress=False)
    for name, evaluation in sources.items():
        assert evaluation.loss == pytest.approx(last[f"loss/validation/{name}"], abs=1e-5)
    assert evaluating.combine(list(sources.values())).loss == pytest.approx(last["loss/validation"], abs=1e-5)
    assert evaluating.evaluate(EvaluateSettings(str(folder), str(other)), False).loss == sources["numbers"].loss
    assert evaluate.main([str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:3]] == ["prepared", "numbers", "loss"]


def test_evaluation_refuses_a_folder_tokenized_with_other_settings(finished, tmp_path):
    """A file of tiktoken has the vocabulary only; tokenizer_config.json next to it has how text is split into arguments."""
    texts = [" ".join(str(number) for number in range(first, first + 50)) for first in range(0, 1000, 50)]
    (tmp_path / "numbers.txt").write_text("\n---\n".join(texts))
    for name in ("cl100k_base", "o200k_base"):
        (tmp_path / name).mkdir()
        rank_file(tmp_path / name / "small.tiktoken", texts, published_pattern(name))
        source, tokenizer = str(tmp_path / "numbers.txt"), str(tmp_path / name / "small.tiktoken")
        prepare(
            PrepareSettings(input=(source,), separator="---", tokenizer=tokenizer, output=str(tmp_path / f"{name}-prepared"), workers=1)
        )
    copy = shutil.copytree(finished[0], tmp_path / "run")
    (copy / "tokenizer.model").unlink()
    same, other = tmp_path / "cl100k_base-prepared", tmp_path / "o200k_base-prepared"
    for path in tokenizer_files(same):
        shutil.copyfile(path, copy / path.name)
    assert evaluating.evaluate(EvaluateSettings(str(copy), str(same), "train"), False).tokens > 0
    with pytest.raises(
        UserError, match=r"o200k_base-prepared was tokenized with different settings next to \S+ than .*/run was trained with\."
    ):
        evaluating.evaluate(EvaluateSettings(str(copy), str(other), "train"), False)


def test_stopped_blended_run_resumes_with_the_same_batches(finished, tmp_path):
    folder, arguments = finished
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    output = finish(start_ranks(1, PRETRAIN, *arguments, "--output", str(copy), OMP_NUM_THREADS="1"))[0]
    assert "Resuming from step 4 of 8" in output
    expected, found = entries(folder), entries(copy)
    for step in range(1, 9):
        for name in ("loss/train", "optimization/gradient_norm", "progress/epochs/prepared", "progress/epochs/numbers"):
            assert found[step][name] == expected[step][name], (step, name)
    assert found[8]["loss/validation/numbers"] == expected[8]["loss/validation/numbers"]


def test_validation_samples_are_divided_among_the_sources(finished, tmp_path):
    """Three samples from two sources: two of each, one more than asked for."""
    folder, arguments = finished
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    finish(start_ranks(1, PRETRAIN, *arguments, "--output", str(copy), "--log.validation_samples", "3", OMP_NUM_THREADS="1"))
    trained, data = load_model(str(copy)), open_data(read_run_settings(arguments))
    for name, samples in data.held_out.items():
        batches = evaluation_batches(samples.stream, 32, 2, data.sampling.end_of_text, limit_samples=2, document_mask=True)
        nats = [token_losses(trained.model(batch.tokens, batch.segments), batch.targets) for batch in batches]
        counted = sum(int((losses != 0).sum()) for losses in nats)
        expected = sum(float(losses.detach().sum()) for losses in nats) / counted
        assert entries(copy)[8][f"loss/validation/{name}"] == pytest.approx(expected, abs=1e-5)
        assert abs(expected - entries(folder)[8][f"loss/validation/{name}"]) > 1e-4, "the whole split has another loss"


def test_show_names_changes_of_what_the_run_reads(finished, tmp_path, capsys):
    folder, arguments = finished
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    changed = ["--seed", "9", "--optimizer.learning_rate", "0.001", "--allow_changes"]
    assert "Resuming with a change: seed: 1 -> 9" in finish(start_ranks(1, PRETRAIN, *arguments, "--output", str(copy), *changed))[0]
    show.main(["--run", str(copy), "--step", "8"])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert re.fullmatch(r"The run was resumed with changes: seed: 1 -> 9 \([-\d]+ [:\d]+\)\. Earlier steps read other samples .*", first)
    assert second.startswith("step 8, rank 0 of 1: ") and second.endswith("seed 9")


def test_scripts_find_the_data_of_a_run_that_moved_with_it(finished, prepared, other, tmp_path, monkeypatch, capsys):
    """The run and its data, in a copy of the tree they are in, used from another working folder."""
    folder, arguments = finished
    root = Path(os.path.commonpath([folder, prepared, other]))
    run, *data = (tmp_path / "tree" / path.relative_to(root) for path in (folder, prepared, other))
    for old, new in zip((folder, prepared, other), (run, *data), strict=True):
        shutil.copytree(old, new)
    monkeypatch.chdir(tmp_path)
    opened = open_model(str(run))
    assert opened.data_paths() == paths_for(opened, None, str(run)) == [str(path) for path in data]
    assert set(evaluating.evaluate_sources(EvaluateSettings(str(run)), False)) == {"prepared", "numbers"}
    show.main(["--run", str(run), "--step", "3"])
    assert "micro-batch 0, row 0: " in capsys.readouterr().out
    moved = over(arguments, ["--data", "../gone/prepared", "../gone/numbers", "--output", str(run)])
    record = json.loads((run / "run.json").read_text())
    for place, given in zip(record["paths"]["data.path"], ("../gone/prepared", "../gone/numbers"), strict=True):
        place["given"] = given
    (run / "run.json").write_text(json.dumps(record))
    rows = plan_of(moved, monkeypatch, capsys)
    assert [row.partition(": ")[0] for row in rows["data"]] == [str(path) for path in data], "a resume finds them too"
    shutil.rmtree(data[0])
    assert open_model(str(run)).data_paths()[0] == str(prepared), "where it was"
    shutil.copytree(other, data[0])
    capsys.readouterr()
    with pytest.raises(
        UserError, match=rf"these are not the data that {run} was trained on, although .* Give the data to read with --data"
    ):
        open_model(str(run)).data_paths()
    show.main(["--run", str(run), "--step", "3"])
    assert f"differs from the data that {run} was trained on" in capsys.readouterr().out.splitlines()[0]


def test_longer_resumed_run_must_respect_max_epochs(finished, monkeypatch):
    _, arguments = finished
    longer = [*arguments, "--train_steps", "4000", "--data.max_epochs", "3", "--allow_changes"]
    assert re.match(r"\w+ would be read for [\d.]+ epochs in 4,000 steps; data\.max_epochs is 3\.\n", refusal(longer, monkeypatch))


def test_changed_weights_and_packing_are_refused(finished, monkeypatch):
    _, arguments = finished
    message = refusal(over(arguments, ["--data.weights", "1", "1", "--data.packing", "packed"]), monkeypatch)
    assert "  data.weights: [3.0, 1.0] -> [1.0, 1.0]\n" in message and "  data.packing: best_fit -> packed\n" in message


def test_show_prints_what_a_rank_of_the_run_read(finished, capsys):
    folder, arguments = finished
    show.main(["--run", str(folder), "--step", "6"])
    rows = re.findall(r"^micro-batch (\d), row (\d): (\w+), epoch (\d+), sample (\d+)$", capsys.readouterr().out, re.M)
    sampling = open_data(read_run_settings(arguments)).sampling
    drawn = zip(*(column.tolist() for column in sampling.blend.draw(np.arange(40, 48))), strict=True)
    assert [(sampling.names.index(name), int(epoch), int(sample)) for _, _, name, epoch, sample in rows] == list(drawn)
    assert [(number, row) for number, row, *_ in rows] == [(str(n), str(row)) for n in range(4) for row in range(2)]
