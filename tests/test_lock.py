"""One command at a time writes into a file or a folder."""

import os
from pathlib import Path

import pytest

from dera_peft import DeRaError
from dera_peft.lock import hold


@pytest.mark.parametrize("is_folder", [False, True])
def test_two_commands_are_not_in_one_output_at_once(tmp_path, is_folder):
    output = tmp_path / "new" / "out"
    other_name = tmp_path / "link"
    other_name.symlink_to(output)
    with hold(output, "--output", is_folder=is_folder):
        for name in (output, other_name, output.parent / "." / "out", Path(os.path.relpath(output))):
            with (
                pytest.raises(DeRaError, match=r"--output='.*out': another command is writing there"),
                hold(name, "--output", is_folder=is_folder),
            ):
                pass
        with hold(tmp_path / "new" / "another", "--output", is_folder=is_folder):
            pass
    assert list(output.parent.iterdir()) == [], "nothing is left where nothing was written"
    with hold(output, "--output", is_folder=is_folder):  # it was freed
        pass


def test_what_was_written_stays_without_the_lock(tmp_path):
    file, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    with hold(file, "--output"), hold(folder, "output_dir", is_folder=True):
        file.write_text("a row\n")
        (folder / "weights").write_text("0.5")
    assert sorted(tmp_path.rglob("*")) == [file, folder, folder / "weights"]


def test_an_error_frees_the_output(tmp_path):
    with pytest.raises(KeyboardInterrupt), hold(tmp_path, "output_dir", is_folder=True):
        raise KeyboardInterrupt
    with hold(tmp_path, "output_dir", is_folder=True):
        pass


def test_devices_and_no_output_hold_nothing():
    with hold(Path(os.devnull), "--output"), hold(Path(os.devnull), "--output"), hold(None, "--output"):
        pass


def test_an_output_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong, is_folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "below", False)):
        with (
            pytest.raises(DeRaError, match=r"can't be written|is a file: name a folder"),
            hold(wrong, "--output", is_folder=is_folder),
        ):
            pass
