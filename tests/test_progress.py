"""What a long job says in a log file."""

import logging
import sys
import time

import pytest

from dera_peft.formatting import format_duration
from dera_peft.progress import log_progress, progress_line, show_progress


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "dera_peft")
    return lambda: caplog.messages


@pytest.mark.parametrize(
    ("finished", "seconds", "line"),
    [
        (1000, 39.9, "decoding: 1200 of 8192 (14.6%), 25.1/s, about 4 min 39 s left"),  # 6992 are left
        (1200, 69.9, "decoding: 1400 of 8192 (17.1%), 17.2/s, about 6 min 36 s left"),  # 6792 are left
        (2, 90.0, "decoding: 202 of 8192 (2.5%), 45.0 s each, about 4 d 3 h left"),  # 7990 are left
        (0, 60.0, "decoding: 200 of 8192 (2.4%), for 1 min 0 s"),
    ],
)
def test_a_line_says_how_much_how_fast_and_how_long(finished, seconds, line):
    assert progress_line("decoding", 8192, 200, finished, seconds) == line


def test_of_no_items_all_are_done():
    assert progress_line("decoding", 0, 0, 0, 30.0) == "decoding: 0 of 0 (100.0%), for 30 s"


def test_lines_come_at_their_time_whether_items_are_finished_or_not(lines):
    with log_progress("scoring", 10, every=0.05) as advance:
        wait_for(lambda: len(lines()) >= 2)
        advance(4)
        wait_for(lambda: "4 of 10" in lines()[-1])
    assert lines()[0].startswith("scoring: 0 of 10 (0.0%), for ")
    count = len(lines())
    time.sleep(0.2)
    assert len(lines()) == count, "none after the end"


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_short_job_says_nothing(lines, capsys):
    with show_progress("decoding", 3) as advance:
        advance(3)
    assert lines() == []
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(lines, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("decoding", 3) as advance:
        advance(3)
    assert "3/3" in capsys.readouterr().err
    assert lines() == []


def test_of_several_processes_the_main_one_shows(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("RANK", "1")
    with show_progress("decoding", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (328, "5 min 28 s"), (7500, "2 h 5 min"), (2 * 86400 + 3600, "2 d 1 h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
