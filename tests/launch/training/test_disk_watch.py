"""What a run finds out about its files before each checkpoint."""

import os
import shutil

import pytest

from data.command_line import UserError
from data.sampling.sources import open_folders, refuse_changed
from data.shards import PreparedData
from launch.ranks.processes import Process
from launch.training import data, run_folder
from launch.training.disk_watch import DiskWatch
from launch.training.recipe import read_run_settings


@pytest.fixture
def folder(tmp_path):
    """A run folder before its first checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"run_id": "one"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_removed_run_folder_gets_its_small_files_back(folder):
    watch = DiskWatch(folder, [], Process(0, 2, 0, 1))
    other_rank = DiskWatch(folder, [], Process(1, 2, 0, 1))
    assert watch.find_change() is None and watch.restore_folder() is None
    shutil.move(folder, folder.with_name("elsewhere"))
    assert other_rank.restore_folder() is None and not folder.exists()
    assert watch.restore_folder().startswith(f"output {folder} was removed or renamed during the run. run.json and the tokenizer were")
    assert "was removed or renamed" in (folder / "log.txt").read_text()
    assert (folder / "run.json").read_text() == '{"run_id": "one"}' and (folder / "tokenizer.json").exists()


def test_log_is_kept_if_only_the_record_of_the_run_is_removed(folder):
    (folder / "log.txt").write_text("earlier lines")
    watch = DiskWatch(folder, [], Process(0, 1, 0, 1))
    (folder / "run.json").unlink()
    assert watch.restore_folder() == f"{folder}/run.json was removed during the run. It and the tokenizer were written again"
    assert (folder / "run.json").exists() and (folder / "log.txt").read_text() == "earlier lines"


def test_folder_that_holds_another_run_is_not_written_to(folder):
    watch = DiskWatch(folder, [], Process(0, 1, 0, 1))
    (folder / "run.json").write_text('{"run_id": "two"}')
    assert "it holds the run two now" in watch.find_change()


def test_only_changed_contents_of_a_shard_are_a_change(prepared, tmp_path, folder):
    copy = shutil.copytree(prepared, tmp_path / "data")
    folders = open_folders([str(copy)])
    shard = copy / "validation" / "00000.idx"
    contents = shard.read_bytes()
    shutil.copyfile(shard, tmp_path / "same")
    os.replace(tmp_path / "same", shard)  # another inode and time
    refuse_changed(folders.values())
    shard.write_bytes(contents[:-1] + b"\1")
    first, second = DiskWatch(folder, folders.values(), Process(2, 4, 0, 2)), DiskWatch(folder, folders.values(), Process(3, 4, 1, 2))
    assert first.find_change().startswith(f"{shard} was changed while it was read") and second.find_change() is None
    with pytest.raises(UserError, match=r"idx was changed while it was read: .* No result was computed, .* Run the command again\."):
        refuse_changed(folders.values())
    shard.unlink()  # the open file can still be read
    refuse_changed(folders.values())


def test_large_data_that_changed_between_two_starts_is_refused(tiny, prepared, tmp_path, monkeypatch):
    copy = shutil.copytree(prepared, tmp_path / "data")
    settings = read_run_settings([str(copy) if word == str(prepared) else word for word in tiny])
    monkeypatch.setattr(data, "_MAX_HASHED_BYTES", 0)
    shard = copy / "train" / "00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(64) + whole[64:])  # token 0 is valid
    opened = data.open_data(settings)  # the first start hashes none of it
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    run_folder.record_data(settings, settings.batch_plan, opened.stamps)
    data.open_data(settings)
    shard.write_bytes(bytes(128) + whole[128:])
    with pytest.raises(UserError, match=f"{shard} was changed after it was written"):
        data.open_data(settings)
    shard.write_bytes(whole)
    data.open_data(settings)


def test_changed_manifest_of_the_data_is_a_change(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "data")
    opened = PreparedData(copy)
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text() + "\n")
    assert opened.find_change().startswith(f"{copy}/manifest.json was changed")
