"""What a long job says in a log file."""

import logging
import sys

import pytest

from dera_peft.formatting import format_duration
from dera_peft.progress import log_progress, show_progress


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "dera_peft")
    return lambda: caplog.messages


def test_a_line_every_half_minute(lines):
    now = 100.0
    with log_progress("decoding", 8192, 200, clock=lambda: now) as advance:
        for seconds, items in ((29.9, 600), (10.0, 400), (29.0, 100), (1.0, 100), (30.0, 1)):
            now += seconds
            advance(items)
    assert lines() == [
        "decoding: 1200 of 8192 (14.6%), 25.1/s, about 4 min 39 s left",  # 1000 in 39.9 s; 6992 are left
        "decoding: 1400 of 8192 (17.1%), 17.2/s, about 6 min 36 s left",  # 1200 in 69.9 s; 6792 are left
        "decoding: 1401 of 8192 (17.1%), 12.0/s, about 9 min 25 s left",  # 1201 in 99.9 s; 6791 are left
    ]


def test_slow_items_are_told_in_seconds_each(lines):
    now = 0.0
    with log_progress("scoring", 10, clock=lambda: now) as advance:
        now = 90.0
        advance(2)
    assert lines() == ["scoring: 2 of 10 (20.0%), 45.0 s each, about 6 min 0 s left"]


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
