"""A checkpoint is published whole or not at all, and every damage to one is found."""

import builtins
import contextlib
import io
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.command_line import UserError
from data.files import write_file
from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import HashingFile, find_damage, newest_undamaged, published, retain

ABOUT = {"model": {"hidden_size": 8}, "layout": {"world_size": 2}, "rates": (0.1, 1e-8)}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Replace fsync: a test cannot see what it does to a disk, only that it is called and may fail."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def content(step: int, version: int = 0) -> dict[int, dict[str, bytes]]:
    """Files that each of two ranks writes, by rank and name."""
    return {
        rank: {f"rank_{rank}.pt": bytes([step, version, rank]) * 9, f"model_{rank}.pt": bytes([rank + 1, version, step]) * 4}
        for rank in (0, 1)
    }


def save(root: Path, step: int, version: int = 0, num_ranks: int = 2) -> Path:
    folder = checkpoint.begin(root, step, "run1")
    for rank, files in list(content(step, version).items())[:num_ranks]:
        entries = {}
        for name, data in files.items():
            file = HashingFile(folder / name)
            file.write(data[:5])
            file.write(memoryview(data)[5:])
            entries[name] = file.finish()
        checkpoint.write_part(folder, rank, entries)
    return checkpoint.publish(folder, step, ABOUT | {"layout": {"world_size": num_ranks}})


def read(folder: Path) -> dict[int, dict[str, bytes]]:
    return {rank: {name: (folder / name).read_bytes() for name in files} for rank, files in content(0).items()}


def newest_in(root: Path) -> Path | None:
    return newest_undamaged(root, find_damage, lambda line: None, may_rename=False)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    for step in (3, 12, 7):
        save(tmp_path, step)
    newest = newest_in(tmp_path)
    assert newest == tmp_path / "step_00000012"
    assert read(newest) == content(12)
    manifest = checkpoint.read_manifest(newest)
    assert (manifest["step"], manifest["model"], manifest["rates"]) == (12, ABOUT["model"], [0.1, 1e-8])
    assert sum(entry["bytes"] for entry in manifest["files"].values()) == 2 * (27 + 12)
    assert names(newest) == {*manifest["files"], "manifest.json"}
    assert (tmp_path / "latest").read_text() == "step_00000007\n"


def test_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert newest_in(tmp_path) is None
    assert newest_in(tmp_path / "nowhere") is None


def test_checkpoint_without_the_files_of_every_rank_is_not_published(tmp_path):
    folder = checkpoint.begin(tmp_path, 1, "run1")
    checkpoint.write_part(folder, 0, {})
    with pytest.raises(OSError, match="1 of 2 ranks"):
        checkpoint.publish(folder, 1, ABOUT)
    assert checkpoint.published(tmp_path) == []


def test_manifest_includes_files_that_deepspeed_wrote(tmp_path):
    folder = checkpoint.begin(tmp_path, 1, "run1")
    (folder / "offloaded" / "rank0").mkdir(parents=True)
    (folder / "offloaded" / "rank0" / "moments.swp").write_bytes(b"12345678")
    whole = checkpoint.publish(folder, 1, ABOUT | {"layout": {"world_size": 0}})
    assert find_damage(whole) is None
    (whole / "offloaded" / "rank0" / "moments.swp").write_bytes(b"12345679")
    assert "moments.swp is damaged" in find_damage(whole)


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    folder = save(tmp_path, 5, num_ranks=1)
    assert find_damage(folder) is None
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0", whole + b"\n"]
        for place, bit in itertools.product(range(len(whole)), range(8)):
            damaged.append(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        for data in damaged:
            path.write_bytes(data)
            assert find_damage(folder), f"{path.name}: {data!r}"
        path.write_bytes(whole)
    assert find_damage(folder) is None


def test_missing_added_exchanged_or_unreadable_file_is_named(tmp_path):
    folder, earlier = save(tmp_path, 5), save(tmp_path, 4)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        assert path.name in find_damage(folder), "missing"
        path.mkdir()
        assert path.name in find_damage(folder), "a folder in its place"
        path.rmdir()
        path.symlink_to(path)
        assert path.name in find_damage(folder), "a link to itself"
        path.unlink()
        path.write_bytes((earlier / path.name).read_bytes())
        assert find_damage(folder), "that of another step"
        path.write_bytes(whole)
    for name in ("rank_2.pt", "model_0.pt.tmp", "manifest.json.tmp", "deeper/more.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        assert find_damage(folder) == f"{folder / name} does not belong to the checkpoint."
        (folder / name).unlink()
    assert find_damage(folder) is None
    shutil.move(earlier, tmp_path / "step_00000009")
    assert find_damage(tmp_path / "step_00000009") == f"{tmp_path / 'step_00000009'} contains the checkpoint of step 4."


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}\.pt", fullmatch=True), st.binary(max_size=200), max_size=5), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_readers_that_share_the_files_find_what_one_reader_finds(tmp_path_factory, files, parts):
    folder = checkpoint.begin(tmp_path_factory.mktemp("run"), 1, "run1")
    entries = {}
    for name, data in files.items():
        file = HashingFile(folder / name)
        file.write(data)
        entries[name] = file.finish()
    checkpoint.write_part(folder, 0, entries)
    folder = checkpoint.publish(folder, 1, ABOUT | {"layout": {"world_size": 1}})
    assert [find_damage(folder, part, parts) for part in range(parts)] == [None] * parts
    for name in files:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"?!")
        assert sum(find_damage(folder, part, parts) is not None for part in range(parts)) == 1
        (folder / name).write_bytes(whole)


def test_damaged_newest_checkpoint_is_renamed_and_the_older_one_used(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_00000003" / "rank_1.pt").write_bytes(b"zero")
    (tmp_path / "step_00000002" / "manifest.json").write_text('{"step": 2, "mod')
    reported: list[str] = []
    assert newest_undamaged(tmp_path, find_damage, reported.append) == tmp_path / "step_00000001"
    assert "rank_1.pt has 4 bytes; 27 were written." in reported[0]
    assert "step_00000002 has no readable manifest.json" in reported[1]
    assert names(tmp_path) == {"step_00000001", "step_00000002.corrupt", "step_00000003.corrupt", "latest"}
    save(tmp_path, 3)  # the run reaches this step again, and the disk fails again
    (tmp_path / "step_00000003" / "rank_1.pt").unlink()
    assert newest_undamaged(tmp_path, find_damage, reported.append) == tmp_path / "step_00000001"
    assert "step_00000003.corrupt" in names(tmp_path) and "step_00000003" not in names(tmp_path)


def test_reader_that_may_not_rename_changes_nothing(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "rank_0.pt").unlink()
    before = names(tmp_path)
    assert newest_in(tmp_path) == tmp_path / "step_00000001"
    assert names(tmp_path) == before


def test_run_does_not_start_if_every_checkpoint_is_damaged(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "rank_0.pt").unlink()
    for _ in range(2):  # the second time only *.corrupt folders are left
        with pytest.raises(UserError, match=r"has no undamaged checkpoint, .* will not start again from step 0 by itself"):
            newest_undamaged(tmp_path, find_damage, lambda line: None)


def test_retain_deletes_old_checkpoints_and_interrupted_writes(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    for leftover in ("step_00000004.tmp-run0", "step_00000006.tmp-run1", "step_00000003.deleted", "step_00000006.old"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / leftover)
    for kept in ("step_00000009.tmp-run1", "step_00000002.corrupt", "notes"):
        (tmp_path / kept).mkdir()
    retain(tmp_path, 2)
    kept_names = {"step_00000005", "step_00000006", "latest", "step_00000009.tmp-run1", "step_00000002.corrupt", "notes"}
    assert names(tmp_path) == kept_names
    retain(tmp_path, 2)
    assert names(tmp_path) == kept_names
    assert find_damage(tmp_path / "step_00000005") is None and find_damage(tmp_path / "step_00000006") is None


def test_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 2, version=1)
    assert read(newest_in(tmp_path)) == content(2, version=1)
    assert names(tmp_path) == {"step_00000002", "latest"}


class Stopped(BaseException):
    """A power cut: not an Exception, so that no code catches it."""


@contextlib.contextmanager
def failing_at(number: int, failure: BaseException):
    """Count the file operations and let the `number`-th and all later ones raise; yields the list of operations begun."""
    begun: list[str] = []
    places = [(builtins, "open"), (io, "open"), (HashingFile, "write"), (shutil, "rmtree")]
    places += [(os, name) for name in ("replace", "rename", "fsync", "mkdir", "unlink")]

    def counted(name, whole):
        def operation(*arguments, **more):
            begun.append(name)
            if len(begun) >= number:
                raise failure
            return whole(*arguments, **more)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield begun


def every_interruption(failure: BaseException, prepare, act, tmp_path: Path):
    """Stop `act(root)` at its first, second, ... operation until it is not stopped any more; yields each root after the stop."""
    for number in itertools.count(1):
        root = tmp_path / str(number)
        prepare(root)
        try:
            with failing_at(number, failure) as begun:
                act(root)
        except type(failure):
            pass
        finished = len(begun) < number
        yield root
        if finished:
            assert number > 10, "too few operations were counted"
            return


FAILURES = [Stopped(), OSError(28, "No space left on device")]


def assert_none_is_partial(root: Path) -> None:
    for folder in published(root):
        assert find_damage(folder) is None


@pytest.mark.parametrize("failure", FAILURES, ids=["power cut", "full disk"])
def test_write_stopped_at_any_operation_loses_no_checkpoint(failure, tmp_path):
    def two(root):
        save(root, 1)
        save(root, 2)

    for root in every_interruption(failure, two, lambda root: (save(root, 3), retain(root, 2)), tmp_path):
        assert_none_is_partial(root)
        newest = newest_in(root)
        assert read(newest) == content(checkpoint.step_of(newest))
        assert checkpoint.step_of(newest) in (2, 3)
        save(root, 3, version=1)
        retain(root, 2)
        assert names(root) == {"step_00000002", "step_00000003", "latest"}
        assert read(newest_in(root)) == content(3, version=1)


@pytest.mark.parametrize("failure", FAILURES, ids=["power cut", "full disk"])
def test_saving_again_stopped_at_any_operation_leaves_old_or_new(failure, tmp_path):
    for root in every_interruption(failure, lambda root: save(root, 2), lambda root: save(root, 2, version=1), tmp_path):
        assert_none_is_partial(root)
        assert read(newest_in(root)) in (content(2), content(2, version=1))
        retain(root, 2)
        assert read(newest_in(root)) in (content(2), content(2, version=1))
        save(root, 2, version=2)
        save(root, 4)
        retain(root, 2)
        assert names(root) == {"step_00000002", "step_00000004", "latest"}
        assert read(root / "step_00000002") == content(2, version=2)


def test_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    def first(root):
        root.mkdir()
        (root / "latest").write_text("old")

    def rewrite(root):
        for _ in range(4):  # more than ten operations
            write_file(root / "latest", "new")

    for root in every_interruption(Stopped(), first, rewrite, tmp_path):
        assert (root / "latest").read_text() in ("old", "new")


def test_checkpoint_folder_may_have_any_name(tmp_path):
    folder = save(tmp_path, 2).rename(tmp_path / "best")
    assert find_damage(folder) is None
    assert json.loads((folder / "manifest.json").read_text())["step"] == 2


def test_checkpoint_with_earlier_sinusoidal_positions_is_refused(tmp_path):
    model = {"positions": "sinusoidal", "hidden_size": 8}
    with pytest.raises(UserError, match="whose sinusoidal positions had sines and cosines in other columns"):
        checkpoint.refuse_earlier_format(tmp_path, {"checksums": {}, "model": model})
    checkpoint.refuse_earlier_format(tmp_path, {"checksums": {}, "model": model | {"architecture": "decoder"}})
