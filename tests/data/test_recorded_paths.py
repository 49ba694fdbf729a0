"""Recorded paths: found from any working folder, moved with the run or left where they were; else every place is named."""

import shutil

import pytest

from data.command_line import UserError
from data.recorded_paths import find_path, record_path, require_path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with the data and a run that recorded it as "prepared"."""
    folder = tmp_path / "project"
    (folder / "prepared").mkdir(parents=True)
    (folder / "runs" / "x").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_path_is_found_from_any_working_folder(project, tmp_path, monkeypatch):
    run = project / "runs" / "x"
    recorded = record_path("prepared", run)
    assert recorded == {"given": "prepared", "relative": "../../prepared", "absolute": str(project / "prepared")}
    assert find_path(recorded, run) == "prepared", "as it was given, while that is the place"
    monkeypatch.chdir(tmp_path)
    assert find_path(recorded, run) == str(project / "prepared")


def test_path_that_moved_with_its_run_is_found_before_the_absolute_one(project, tmp_path, monkeypatch):
    recorded = record_path("prepared", project / "runs" / "x")
    shutil.copytree(project, tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved" / "runs")
    monkeypatch.chdir(tmp_path)
    for run in (tmp_path / "moved" / "runs" / "x", tmp_path / "link" / "x"):
        assert find_path(recorded, run) == str(tmp_path / "moved" / "prepared")
    alone = shutil.copytree(project / "runs" / "x", tmp_path / "alone" / "deep" / "x")
    assert find_path(recorded, alone) == str(project / "prepared"), "the run moved alone"


def test_path_of_an_earlier_version_is_relative_to_the_working_folder(project, tmp_path, monkeypatch):
    assert find_path({"given": "prepared"}, project / "runs" / "x") == "prepared"
    monkeypatch.chdir(tmp_path)
    assert find_path({"given": "prepared"}, project / "runs" / "x") is None


def test_path_that_is_nowhere_is_refused_with_every_place(project, tmp_path, monkeypatch):
    run = project / "runs" / "x"
    recorded = record_path("prepared", run)
    shutil.copytree(run, tmp_path / "new" / "runs" / "x")
    shutil.rmtree(project / "prepared")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        require_path(recorded, tmp_path / "new" / "runs" / "x", "--data")
    places = f"{tmp_path}/new/prepared, {project}/prepared, prepared"
    assert str(refused.value) == (
        f"The data that {tmp_path}/new/runs/x was trained on was not found at any recorded path: {places}. Give it with --data."
    )
