"""Where a command puts the model, on one process and on several."""

import gc
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from dera_peft.errors import DeRaError

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
SLOWEST = timedelta(days=7)  # how long a process may wait for the others


def is_fsdp_launched() -> bool:
    """Whether accelerate's launcher was asked for FSDP."""
    return is_set("ACCELERATE_USE_FSDP")


def is_set(variable: str) -> bool:
    """Whether a variable of the environment, such as accelerate's launcher sets, is true."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def join_processes() -> PartialState:
    """
    The processes that `torchrun` or `accelerate launch` started together, each with a model of its own; this one alone
    without them.

    Raises:
        DeRaError: they were started for FSDP, under which transformers may load weights in the first of them alone.
    """
    if is_fsdp_launched():
        raise DeRaError(
            "FSDP shards a model that is trained, and this command decodes with a whole one in each process: start it "
            "without FSDP (torchrun --nproc_per_node N -m dera_peft.cli …). A base that is too large for one GPU: "
            "quantize it (quantization: nf4), or start one process, which spreads it over all (device_map: auto)."
        )
    # without an accelerator it must be told so, or it takes each of several processes for the only one
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=SLOWEST)


def device_map_of(name: str | None, processes: PartialState) -> Any:
    """
    Where models go: of several processes each has its own device.

    Raises:
        DeRaError: there are several, and one is named.
    """
    if processes.num_processes == 1:
        return read_device_map(name)
    if name is not None:
        raise DeRaError(f"device_map={name!r}: of several processes each has its own device; leave it out.")
    return {"": processes.device}


def read_device_map(device_map: Any) -> Any:
    """
    A `device_map` for transformers: the one given, or else the accelerator if there is one.

    Args:
        device_map: a strategy, a device, or a dict of modules' names and the device of each (or "disk").

    Raises:
        DeRaError: it names neither a strategy nor a device that is here.
    """
    if device_map is None:
        return "auto" if torch.accelerator.is_available() else None
    if isinstance(device_map, Mapping):
        for name, device in device_map.items():
            if device != "disk":
                _check_device(device, f"device_map={{{name!r}: {device!r}}}", "disk")
        return dict(device_map)
    if device_map not in STRATEGIES:
        _check_device(device_map, f"device_map={device_map!r}", *STRATEGIES)
    return device_map


def _check_device(name: Any, given: str, *others: str) -> None:
    """Raises `DeRaError` where `name` (of `given`, which may also be one of `others`) is no device that is here."""
    accelerator = torch.accelerator.current_accelerator()
    here = "cpu" if accelerator is None else f"cpu and {torch.accelerator.device_count()} of {accelerator.type}"
    missing = f"{given}: there is no such device here; there is {here}."
    if accelerator is None and isinstance(name, int):  # the index of an accelerator
        raise DeRaError(missing)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise DeRaError(f"{given} is not a device, as cpu or cuda:0, nor one of {', '.join(others)}.") from None
    count = torch.accelerator.device_count() if accelerator is not None and device.type == accelerator.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise DeRaError(missing)


def free_memory() -> None:
    """Gives an accelerator back what models hold that nobody refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
