"""How far a long job is: a bar on a terminal, a line every half minute in a log file."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from dera_peft.formatting import format_duration
from dera_peft.messages import is_main_process

EVERY = 30.0  # seconds from one line of a log to the next, and to the first

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]


class Progress(Protocol):
    """How a job shows how far it is."""

    def __call__(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """
        Args:
            description: what is being done, as "decoding".
            total: how many items there are.
            done: how many of them an earlier run has finished.

        Returns:
            A context; its function is called with each number of items that were finished.
        """


@contextmanager
def no_progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda items: None


def show_progress(description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
    """A bar on stderr where that is a terminal, else messages of the logger; of several processes the main one's."""
    if not is_main_process():
        return no_progress(description, total, done)
    show = _show_bar if sys.stderr.isatty() else log_progress
    return show(description, total, done)


@contextmanager
def log_progress(description: str, total: int, done: int = 0, every: float = EVERY) -> Iterator[Advance]:
    """
    Logs every `every` seconds how much is done, how fast, and how long the rest will take; also while a single batch
    takes longer than that.
    """
    start = time.monotonic()
    finished = 0
    ended = threading.Event()

    def advance(items: int) -> None:
        nonlocal finished
        finished += items

    def report() -> None:
        while not ended.wait(every):
            logger.info(progress_line(description, total, done, finished, time.monotonic() - start))

    reporter = threading.Thread(target=report, name="dera-progress", daemon=True)
    reporter.start()
    try:
        yield advance
    finally:
        ended.set()
        reporter.join()


def progress_line(description: str, total: int, done: int, finished: int, seconds: float) -> str:
    """
    One line of the log. The rate is of the `finished` items of this run; those `done` before took no time.

    Args:
        seconds: since the start of this run.
    """
    there = done + finished
    share = there / total if total else 1.0
    line = f"{description}: {there} of {total} ({share:.1%})"
    if not finished:
        return f"{line}, for {format_duration(seconds)}"
    rate = finished / seconds
    pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return f"{line}, {pace}, about {format_duration((total - there) / rate)} left"


@contextmanager
def _show_bar(description: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda items: bar.advance(task, items)
