"""One thread at a time in a model, whose modules hold what belongs to the batch that is computed."""

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class TakesTurns(Protocol):
    """
    Attributes:
        turn: held by the thread that computes.
    """

    turn: threading.RLock


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
