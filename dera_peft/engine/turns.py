"""One thread at a time in a model, whose modules hold what belongs to the batch that is computed."""

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, Self, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Turn:
    """
    A lock that a thread may take again while it has it, and that goes to those who wait in their order: a thread that
    computes step after step lets the others in between two of them, which Python's own locks don't promise.
    """

    def __init__(self):
        self._lock = threading.Lock()  # of what follows
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        me = threading.get_ident()
        with self._lock:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return self
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append((me, mine))
        try:
            mine.acquire()  # until it is handed over
        except BaseException:  # Ctrl-C
            self._give_up(me, mine)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._hand_over()

    def _hand_over(self) -> None:
        self._owner = None
        if self._waiting:
            self._owner, lock = self._waiting.popleft()
            self._depth = 1
            lock.release()

    def _give_up(self, me: int, mine: threading.Lock) -> None:
        with self._lock:
            if (me, mine) in self._waiting:
                self._waiting.remove((me, mine))
            else:  # it was handed over just now
                self._depth = 0
                self._hand_over()


class TakesTurns(Protocol):
    """
    Attributes:
        turn: held by the thread that computes.
    """

    turn: Turn


Model = TypeVar("Model", bound=TakesTurns)


def in_turn(method: Callable[Concatenate[Model, P], R]) -> Callable[Concatenate[Model, P], R]:
    """A method that waits while another thread is in one of its model's."""

    @functools.wraps(method)
    def waiting(self: Model, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # a compiled step is called by `generate`, whose turn it is
            return method(self, *args, **kwargs)
        with self.turn:
            return method(self, *args, **kwargs)

    return waiting
