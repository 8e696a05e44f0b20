"""Where a model is put: strategies, devices, and dicts of them."""

import pytest
import torch

from dera_peft import DeRaError
from dera_peft.checkpoint.devices import read_device_map
from dera_peft.checkpoint.source import ModelSource


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: None)


def test_device_maps_that_are_here(two_gpus):
    assert read_device_map(None) == "auto"
    for device_map in (
        "auto",
        "balanced",
        "cpu",
        "cuda",
        "cuda:1",
        {"": "cuda:1"},
        {"model": "cpu", "lm_head": "disk"},
    ):
        assert read_device_map(device_map) == device_map
    assert ModelSource(base="org/base", device_map={"": "cuda:0"}).placed().device_map == {"": "cuda:0"}


def test_device_maps_that_are_not_here(two_gpus):
    for device_map, message in (
        ("cuda:2", "device_map='cuda:2': there is no such device here; there is cpu and 2 of cuda"),
        ({"": "cuda:2"}, "device_map={'': 'cuda:2'}: there is no such device here"),
        (
            {"model": "cpu", "lm_head": "gpu"},
            "device_map={'lm_head': 'gpu'} is not a device, as cpu or cuda:0, nor one",
        ),
        ({"": None}, "device_map={'': None} is not a device"),
        ([0], r"device_map=[0] is not a device"),
    ):
        with pytest.raises(DeRaError) as caught:
            read_device_map(device_map)
        assert message in str(caught.value)


def test_without_an_accelerator(no_gpu):
    assert read_device_map(None) is None
    assert read_device_map({"": "cpu"}) == {"": "cpu"}
    for device_map in (0, {"": 0}, "cuda", {"": "cuda:0"}):
        with pytest.raises(DeRaError, match="there is no such device here; there is cpu"):
            read_device_map(device_map)
