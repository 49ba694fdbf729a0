"""What the report says about the batch, on folders made by hand from curves whose critical batch is known."""

import json
import math

import pytest

from data.command_line import UserError
from launch.searching.batch_report import batch_section, steps_for_the_same_loss
from launch.searching.report import write_report
from launch.searching.search import Search
from launch.searching.settings import SearchSettings
from launch.searching.trials import Record

CRITICAL_BATCH = 64
RECIPE = """
model: {vocab_size: 64, sequence_length: 16, hidden_size: 16, num_layers: 1, num_attention_heads: 2, intermediate_size: 32}
batch: {global_batch_size: 8}
schedule: {warmup_steps: 2}
train_steps: 800
"""


def new_search(folder, recipe=RECIPE, **settings) -> Search:
    (folder / "recipe.yaml").write_text(recipe)
    return Search(SearchSettings(str(folder / "search"), preset="batch_and_rate", recipe=str(folder / "recipe.yaml"), **settings))


def loss_after(steps: float, batch: int, rate_factor: float) -> float:
    """Return the loss after steps that are worth 1 / (1 + CRITICAL_BATCH / batch) each; a rate that is not the best loses a tenth."""
    return 5 * math.exp(-steps / (1 + CRITICAL_BATCH / batch) / 300) + (0.0 if rate_factor == 1 else 0.5)


def fill(search: Search) -> None:
    """Write finished runs with 20 validations each."""
    assert search.points is not None
    for number, point in enumerate(search.points):
        batch = int(point.values["batch.global_batch_size"])
        rate_factor = float(point.values["optimizer.learning_rate"]) / (3e-4 * math.sqrt(batch / 8))
        trial = search.trials.create(number)
        trial.write(point.values)
        (run,) = trial.runs
        run.folder.mkdir()
        steps = search.tokens // (batch * 16)
        lines = [
            {"step": step, "progress/tokens": step * batch * 16, "loss/validation": loss_after(step, batch, round(rate_factor, 2))}
            for step in (round(steps * part / 20) for part in range(1, 21))
        ]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.write(Record("finished", 0, (lines[-1],)))


def test_batch_and_rate_tries_sizes_with_rates_by_the_square_root(tmp_path):
    search = new_search(tmp_path)
    assert search.points is not None
    points = [(one.values["batch.global_batch_size"], float(one.values["optimizer.learning_rate"])) for one in search.points]
    assert points == [
        (str(8 * 2**power), pytest.approx(3e-4 * 2 ** (power / 2) * factor, rel=1e-5)) for power in range(6) for factor in (0.5, 1, 2)
    ]
    for number, point in enumerate(search.points):
        words = search.words(search.trials[number].runs[0], point.values, 0)
        assert "--train_tokens=102400" in words and "--schedule.warmup_tokens=256" in words
        assert f"--log.validation_interval={max(800 * 8 // int(point.values['batch.global_batch_size']) // 20, 1)}" in words


def test_the_critical_batch_of_known_curves_is_found(tmp_path):
    """Between two validations a curve is taken as straight, which moves the result by less than a tenth."""
    search = new_search(tmp_path)
    fill(search)
    reached, loss = steps_for_the_same_loss(search)
    assert [one.batch for one in reached] == [8, 16, 32, 64, 128, 256]
    assert loss == pytest.approx(loss_after(25, 256, 1), rel=0.02)  # the largest batch got least far
    _, title, figure, note = batch_section(search)
    assert figure is not None and "hyperbola of McCandlish" in note
    found = int(note.partition("Its critical batch is ")[2].partition(" sequences")[0])
    assert found == pytest.approx(CRITICAL_BATCH, rel=0.1)
    assert title in write_report(search).read_text()


def test_a_search_that_has_just_begun_says_what_is_missing(tmp_path):
    search = new_search(tmp_path)
    assert batch_section(search)[2:] == (None, "Fewer than three batch sizes have a curve yet.")


def test_a_recipe_that_is_too_short_for_batch_and_rate_is_refused(tmp_path):
    with pytest.raises(UserError) as error:
        new_search(tmp_path, RECIPE.replace("train_steps: 800", "train_steps: 10"))
    assert "needs 3 batch sizes with 20 steps or more: runs of 10,240 tokens. Those of this recipe have 1,280" in str(error.value)


@pytest.mark.parametrize("name", ["space", "method", "trials"])
def test_a_preset_refuses_what_it_decides_itself(name, tmp_path):
    given = {"space": ("optimizer.learning_rate 1 2",), "method": "grid", "trials": 3}[name]
    settings = SearchSettings(str(tmp_path), preset="rate", **{name: given})
    assert [complaint.partition(" has no effect with preset rate")[0].split()[0] for complaint in settings.complaints()] == [name]


def test_rate_and_optimizers_are_grids_around_the_rate_of_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE + "optimizer: {learning_rate: 1.0e-2}\n")

    def points(preset):
        search = Search(SearchSettings(str(tmp_path / preset), preset=preset, recipe=str(tmp_path / "recipe.yaml")))
        assert search.points is not None
        return [tuple(point.values.values()) for point in search.points]

    assert points("rate") == [(rate,) for rate in ("0.00125", "0.0025", "0.005", "0.01", "0.02", "0.04", "0.08")]
    names = ("adamw", "muon", "lamb", "lars", "sgd", "lion")
    assert points("optimizers") == [(name, rate) for name in names for rate in ("0.000625", "0.0025", "0.01", "0.04", "0.16")]
