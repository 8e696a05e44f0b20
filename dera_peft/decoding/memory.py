"""What to do where a device's memory runs out: the same work again, on half as much at once."""

import logging

import torch

from dera_peft.checkpoint.devices import free_memory
from dera_peft.errors import DeRaError
from dera_peft.messages import warn_once

logger = logging.getLogger(__name__)


class Attempt:
    """
    Work that memory may not be enough for:

        with Attempt(f"out of memory for a single text of {n} tokens." if n_texts == 1 else None) as attempt:
            values = compute(texts)
        if attempt.failed:  # here the error's frames no longer hold the tensors of the work
            go_on_with_half("out of memory, going on with half as many texts at once")

    Args:
        error: of the `DeRaError` that is raised where the work can't be made smaller; None where it can.
    """

    def __init__(self, error: str | None):
        self.error, self.failed = error, False

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, traceback) -> bool:
        if not isinstance(raised, torch.OutOfMemoryError):
            return False
        if self.error is not None:
            raise DeRaError(self.error) from raised
        self.failed = True
        return True


def go_on_with_half(message: str) -> None:
    """Frees what the failed work had reserved, and warns; to be called once its tensors are let go."""
    free_memory()
    warn_once(logger, message)
