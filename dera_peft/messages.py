"""What the package says: messages of the logger "dera_peft", which the program that uses it may show or not."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "dera_peft"

_said: set[str] = set()


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started together, or the only one."""
    return os.environ.get("RANK", "0") == "0"  # torchrun and accelerate set it before anything is imported


def warn_once(logger: logging.Logger, message: str, topic: str | None = None) -> None:
    """
    A warning, the first time only, and only in the main process.

    Args:
        topic: messages of the same topic count as one; each message is its own topic unless given.
    """
    topic = message if topic is None else topic
    if is_main_process() and topic not in _said:
        _said.add(topic)
        logger.warning(message, stacklevel=2)


class StderrHandler(logging.Handler):
    """
    Writes each message to what `sys.stderr` is then: a progress bar puts itself there to keep its line clean. Of a
    warning, or worse, it shows the level.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(f"{level}{self.format(record)}", file=sys.stderr, flush=True)
        except Exception:  # as logging's own handlers do: a message must not stop who says it
            self.handleError(record)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Meanwhile the package's messages, those of progress too, are lines on stderr. It is for programs alone."""
    logger = logging.getLogger(PACKAGE)
    level, propagate = logger.level, logger.propagate
    handler = StderrHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a handler of another library at the root would repeat them
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
