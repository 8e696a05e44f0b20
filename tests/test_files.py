"""Files are written as a whole or not at all."""

import os

import pytest

from dera_peft import DeRaError
from dera_peft.files import check_writable, write_atomically


def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path):
    file = tmp_path / "a.txt"
    write_atomically(file, "λ\r\n")
    assert file.read_bytes() == "λ\r\n".encode()
    write_atomically(str(file), b"\x00")
    assert file.read_bytes() == b"\x00"
    assert list(tmp_path.iterdir()) == [file]


def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_atomically(file, "old")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    write_atomically(file, "newer")  # over what the interruption left
    assert file.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [file]


def test_whether_a_file_can_be_written_is_seen_without_touching_it(tmp_path, monkeypatch):
    file = tmp_path / "new" / "rows.jsonl"
    check_writable(file, "--output")
    assert list(file.parent.iterdir()) == [], "the folder is made, and nothing in it"
    file.write_text("a row\n")
    check_writable(file, "--output")
    assert file.read_text() == "a row\n"
    # another process makes the file, after it was seen not to be there
    file.unlink()
    lstat = os.lstat

    def made_meanwhile(path, **kwargs):
        try:
            return lstat(path, **kwargs)
        finally:
            if path == file:
                file.write_text("another's row\n")

    monkeypatch.setattr("os.lstat", made_meanwhile)
    check_writable(file, "--output")
    assert file.read_text() == "another's row\n"
    for wrong in (tmp_path, tmp_path / ("x" * 300), file / "below"):
        with pytest.raises(DeRaError, match=r"--output: '.*' can't be written: "):
            check_writable(wrong, "--output")
