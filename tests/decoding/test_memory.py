"""Memory that runs out: told once for what can't be halved, and another error passes through."""

import gc
import weakref

import pytest
import torch

from dera_peft import DeRaError
from dera_peft.decoding.memory import Attempt, go_on_with_half


def test_work_that_fits():
    with Attempt("too large") as attempt:
        value = 1
    assert (value, attempt.failed) == (1, False)


def test_work_that_can_be_halved_lets_go_of_its_tensors(monkeypatch, caplog):
    held = []

    def work():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    with Attempt(None) as attempt:
        work()
    assert attempt.failed
    gc.collect()
    assert held[0]() is None
    freed = []
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.empty_cache", lambda: freed.append(True))
    go_on_with_half("half as many")
    assert (freed, caplog.messages) == ([True], ["half as many"])


def test_without_an_accelerator_there_is_nothing_to_free(monkeypatch, caplog):
    def refuse():
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.empty_cache", refuse)
    go_on_with_half("half as many")
    assert caplog.messages == ["half as many"]


def test_work_that_can_not_and_other_errors():
    with pytest.raises(DeRaError, match="too large") as caught, Attempt("too large"):
        raise torch.OutOfMemoryError
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(KeyError), Attempt("too large"):
        raise KeyError
