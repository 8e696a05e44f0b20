"""Calling what a user wrote: what it may return, also asynchronously; and when to stop calling it."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch

from dera_peft.errors import DeRaError

MAX_FAILURES = 20  # of a function that has given no value yet


class CallFailed(DeRaError):
    """A user's function that raises."""


@dataclass
class Failures:
    """
    How often a function has failed, row by row.

    Attributes:
        what: the function, for messages.
        has_worked: whether it has given a value for any row, perhaps in an earlier run.
    """

    what: str
    has_worked: bool = False
    count: int = 0

    def note(self, error: str | None) -> None:
        """
        Args:
            error: what went wrong on a row, if anything.

        Raises:
            DeRaError: it has failed on each of the first `MAX_FAILURES` rows.
        """
        if error is None:
            self.has_worked = True
        elif not self.has_worked:
            self.count += 1
            if self.count >= MAX_FAILURES:
                raise DeRaError(
                    f"{self.what} failed on each of the first {self.count} rows that it was given: "
                    f"{error.rstrip('.')}. Mend it and run the same command again: what was decoded is kept."
                )


def call(function: Callable, what: str, **arguments: Any) -> Any:
    """
    What a function returns; of an asynchronous one, what it returns in the end.

    Raises:
        CallFailed: it raises.
    """
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            value = asyncio.run_coroutine_threadsafe(_result_of(value), _event_loop()).result()
    except DeRaError:
        raise
    except Exception as error:
        raise CallFailed(f"{what} raised {type(error).__name__}: {error}") from error
    return value


async def _result_of(value: Awaitable) -> Any:
    return await value


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """
    One loop in a thread of its own, as TRL's GRPOTrainer has it: what a function keeps from call to call, as a client's
    connections, belongs to a loop; and a notebook runs one already, in the main thread.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="dera_peft rewards", daemon=True).start()
    return loop


def read_values(values: Any, what: str, count: int, rows: str = "completions") -> list:
    """
    One value for each row, of a list, an array, a tensor, or another iterable.

    Raises:
        DeRaError: it is none of these, or has another number of values. That is no fault of a row's: the function
            does not do what it should.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    if isinstance(values, (torch.Tensor, numpy.ndarray)) and values.ndim > 0:
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping, set, torch.Tensor, numpy.ndarray)):
        raise DeRaError(
            f"{what} returned a {type(values).__name__}: it must return a list, an array or a tensor of values, one "
            f"for each of the {rows}."
        )
    values = list(values)
    if len(values) != count:
        raise DeRaError(f"{what} gave {len(values)} values for {count} {rows}: it must give one for each.")
    return values


def accepted(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a function has a parameter for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin that does not tell
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def unwrapped(value: Any) -> Any:
    """Python's number in place of a scalar of NumPy or PyTorch."""
    if isinstance(value, (torch.Tensor, numpy.ndarray, numpy.generic)) and value.ndim == 0:
        return value.item()
    return value
