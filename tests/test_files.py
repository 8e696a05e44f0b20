"""Files are written as a whole or not at all."""

import os

import pytest

from dera_peft.files import write_atomically


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
