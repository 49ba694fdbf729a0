"""Arrays in files: the values of numpy, and an error that names the file if it is truncated while it is read."""

import errno
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.file_array import AscendingFileArray, FileArray


@given(values=st.lists(st.integers(0, 3000), min_size=1, max_size=3000), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_values_are_those_of_numpy(tmp_path, values, data):
    expected = np.sort(np.array(values, "<i8"))
    expected.tofile(tmp_path / "values")
    index = st.integers(0, len(values) - 1)
    for found in (FileArray(tmp_path / "values", "<i8"), AscendingFileArray(tmp_path / "values", "<i8")):
        first, last, one = data.draw(index), data.draw(index), data.draw(index)
        indices = np.array(data.draw(st.lists(index, max_size=50)), np.int64)
        assert found[first:last].tolist() == expected[first:last].tolist()
        assert found[indices].tolist() == expected[indices].tolist()
        assert found[one] == expected[one] and found[-1] == expected[-1] and found.tolist() == expected.tolist()
    end, value = data.draw(index), data.draw(st.integers(-1, 3001))
    assert found.value(one) == expected[one]
    assert found.bisect_left(value, end) == expected[:end].searchsorted(value)


def test_indices_that_are_far_apart_are_read_one_by_one(tmp_path):
    np.arange(1_000_000, dtype="<i8").tofile(tmp_path / "values")
    indices = np.array([[999_999, 0], [1, 500_000]])
    assert FileArray(tmp_path / "values", "<i8")[indices].tolist() == indices.tolist()


def test_part_of_an_open_file_has_its_own_type_and_place(tmp_path):
    (tmp_path / "file").write_bytes(b"head" + np.array([1, 2, 3], "<u2").tobytes())
    assert FileArray(tmp_path / "file", "u1").part("<u2", 4, 3).tolist() == [1, 2, 3]


def test_index_outside_an_array_reads_no_bytes_of_its_neighbours(tmp_path):
    np.arange(12, dtype="<i8").tofile(tmp_path / "file")
    for kind in (FileArray.part, FileArray.ascending_part):
        part = kind(FileArray(tmp_path / "file", "<i8"), "<i8", 32, 5)
        assert list(part) == part[:99].tolist() == [4, 5, 6, 7, 8] and part[-5] == 4
        for outside in (5, 7, -6, [-1], [0, 5], np.array([[4, 5]])):
            with pytest.raises(IndexError, match="outside an array of 5 values"):
                part[outside]
    with pytest.raises(IndexError):
        part.value(5)


def test_file_that_is_truncated_after_it_was_opened_is_named(tmp_path):
    np.arange(1000, dtype="<i8").tofile(tmp_path / "values")
    array = FileArray(tmp_path / "values", "<i8")
    (tmp_path / "values").write_bytes(bytes(80))
    assert array[:10].tolist() == [0] * 10
    with pytest.raises(UserError, match=r"values was truncated while it was read: it is 80 bytes long; 88 are needed\."):
        array[10]


def test_disk_that_fails_is_told_from_a_file_with_other_contents(tmp_path, monkeypatch):
    """A run whose disk failed may succeed at its next start, so the cause must be known."""
    (tmp_path / "values").write_bytes(bytes(80))
    array = FileArray(tmp_path / "values", "<i8")

    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UserError, match="values cannot be read: Input/output error") as caught:
        array[0]
    assert isinstance(caught.value.__cause__, OSError)
