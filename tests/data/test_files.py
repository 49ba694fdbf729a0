"""Files and folders appear complete or not at all, and errors of the disk name them."""

import shutil

import pytest

from data.command_line import UserError
from data.files import new_file, new_folder, output_complaint, refuse_full_disk, write_file
from tests.disk import no_larger_files


def test_error_of_a_full_disk_names_the_file(tmp_path):
    with no_larger_files(0), pytest.raises(OSError, match=r"File too large: '.*run\.json'"):
        write_file(tmp_path / "run.json", "{}")
    with (
        pytest.raises(UserError, match=r"out\.gguf could not be written: File too large"),
        new_file(tmp_path / "out.gguf") as file,
        no_larger_files(0),
    ):
        file.write_text("half")
    with (
        pytest.raises(UserError, match=r"out could not be written: File too large"),
        new_folder(tmp_path / "out") as folder,
        no_larger_files(0),
    ):
        (folder / "file").write_text("half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_only_errors_of_the_output_name_the_output(tmp_path, new):
    for act in (lambda: (tmp_path / "missing").read_text(), lambda: (tmp_path / "outer").read_text()):
        with pytest.raises(FileNotFoundError), new(tmp_path / "out"):
            act()
    with pytest.raises(BrokenPipeError), new(tmp_path / "out"):
        raise BrokenPipeError(32, "Broken pipe")
    for act in (lambda path: (path / "inside" / "file").write_text(""), lambda path: (tmp_path / "out" / "file").write_text("")):
        with pytest.raises(UserError, match="out could not be written: No such file"), new(tmp_path / "out") as path:
            act(path)
    with pytest.raises(UserError, match="out could not be written: No such file"), new_folder(tmp_path / "out", tmp_path / "part") as path:
        (path / "inside" / "file").write_text("")


def test_output_that_cannot_be_created_is_named_with_its_reason(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert output_complaint(tmp_path / "new" / "out") is None
    assert output_complaint(tmp_path / "file" / "new" / "out").endswith(f"{tmp_path}/file is a file, not a folder. Give another path.")
    assert output_complaint(tmp_path / "link" / "out").endswith(
        f"{tmp_path}/link is a link to a folder that does not exist. Give another path."
    )
    for existing in ("file", "link"):
        assert output_complaint(tmp_path / existing).endswith("already exists; nothing is overwritten. Give another name.")
    assert output_complaint("") == "--output is empty. Give the path of a new file or folder."
    assert output_complaint(tmp_path / ("x" * 300)).endswith("has 300 bytes; 240 are allowed.")


def test_full_disk_is_named_with_sizes_in_a_unit_that_fits_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000))
    with pytest.raises(UserError) as refused:
        refuse_full_disk(tmp_path / "new" / "out", 5.5 * 2**20)
    sentence = f"The disk of {tmp_path} has 1000 bytes free; --output {tmp_path}/new/out needs 5.50 MiB. Give a folder on another disk."
    assert str(refused.value) == sentence
