"""What the package says: once, in the main process, to whom asks for it."""

import ast
import io
import logging
import sys
from pathlib import Path

import pytest

import dera_peft
from dera_peft.messages import messages_on_stderr, warn_once

PACKAGE = Path(dera_peft.__file__).parent
PROGRAMS = ("cli", "training")  # they may print their results

logger = logging.getLogger("dera_peft.somewhere")


def test_a_warning_is_given_once(caplog):
    for text in ("100 % wrong", "100 % wrong", "other"):
        warn_once(logger, text)
    warn_once(logger, "3 of 4 are too long", topic="too long")
    warn_once(logger, "2 of 4 are too long", topic="too long")
    assert [record.getMessage() for record in caplog.records] == ["100 % wrong", "other", "3 of 4 are too long"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert caplog.records[0].filename == "test_messages.py"


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_the_main_process_warns(monkeypatch, caplog, rank, count):
    monkeypatch.setenv("RANK", rank)
    warn_once(logger, "wrong")
    assert len(caplog.records) == count


def test_a_programs_messages_are_lines_on_stderr(capsys):
    root = logging.StreamHandler()  # as another library may leave one
    logging.getLogger().addHandler(root)
    try:
        with messages_on_stderr():
            logger.info("3 of 4 are there already")
            logger.warning("wrong")
        logger.info("not shown any more")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr() == ("", "3 of 4 are there already\nwarning: wrong\n")
    assert not logging.getLogger("dera_peft").handlers


def test_a_message_that_cannot_be_written_stops_nothing(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with messages_on_stderr():
        logger.info("3 of 4 are there already")


def test_library_code_prints_nothing():
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] in (*PROGRAMS, "messages.py"):
            continue
        called = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        }
        assert not called & {"print", "warnings.warn"}, file
