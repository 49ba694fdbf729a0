"""The space of a search: how a person writes it, and the values in it."""

import numpy as np
import pytest

from launch.searching.space import grid, read_dimension, words_of


def test_lists_and_ranges_are_read_with_their_values():
    assert read_dimension("optimizer.name adamw muon").values == ("adamw", "muon")
    assert read_dimension("optimizer.learning_rate log 1e-4 1e-1 4").values == ("0.0001", "0.001", "0.01", "0.1")
    assert read_dimension("loss.z_loss linear 0 1e-4 3").values == ("0", "5e-05", "0.0001")
    assert read_dimension("batch.global_batch_size log 8 64 4").values == ("8", "16", "32", "64")
    one = read_dimension("optimizer.learning_rate log 1e-4 1e-1")
    assert one.values == () and one.ends == ("0.0001", "0.1") and not one.is_whole


def test_a_share_of_a_range_gives_its_values():
    rate = read_dimension("optimizer.learning_rate log 1e-4 1e-2")
    assert [rate.at(share) for share in (0.0, 0.5, 1.0)] == ["0.0001", "0.001", "0.01"]
    layers = read_dimension("model.num_layers linear 2 4")
    shares = np.random.default_rng(1).random(3000)
    counts = [sum(layers.at(share) == number for share in shares) for number in ("2", "3", "4")]
    assert sum(counts) == 3000 and min(counts) > 900  # each whole number has the same share
    names = read_dimension("optimizer.name adamw muon lion")
    assert [names.at(share) for share in (0.0, 0.4, 0.99)] == ["adamw", "muon", "lion"]


def test_a_grid_has_every_combination_once_and_the_last_changes_first():
    points = grid([read_dimension("seedless a b"), read_dimension("other 1 2 3")])
    assert [tuple(point.values()) for point in points] == [("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "2"), ("b", "3")]
    assert words_of(points[0]) == ["--seedless=a", "--other=1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.learning_rate 1e-3", "one point is not a space"),
        ("optimizer.learning_rate", "one point is not a space"),
        ("optimizer.name adamw muon adamw", "adamw stands twice"),
        ("optimizer.learning_rate log 1e-2 1e-3", "LOW 1e-2 must be below HIGH 1e-3"),
        ("optimizer.learning_rate log 0 1e-3", "LOW 0 must be above 0 for log"),
        ("optimizer.learning_rate log 1e-3", "log needs LOW and HIGH"),
        ("optimizer.learning_rate log 1e-3 high", "high is not a number"),
        ("optimizer.learning_rate linear nan 1", "nan is not a finite number"),
        ("optimizer.learning_rate log 1e-3 1e-1 1", "it must be a whole number, 2 or more"),
        ("seed 1 2 3", "seed cannot be searched"),
        ("config a.yaml b.yaml", "give recipe instead"),
    ],
)
def test_an_invalid_space_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_dimension(text)
