"""Where a command puts the model, on one process and on several."""

import gc
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from dera_peft.errors import DeRaError

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
SLOWEST = timedelta(days=7)  # how long a process may wait for the others


def join_processes() -> PartialState:
    """The processes that `torchrun` or `accelerate launch` started together; this one alone without them."""
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


def read_device_map(name: str | None) -> str | None:
    """
    A `device_map` for transformers: the one named, or else the accelerator if there is one.

    Raises:
        DeRaError: it names neither a strategy nor a device that is here.
    """
    accelerator = torch.accelerator.current_accelerator()
    if name is None:
        return None if accelerator is None else "auto"
    if name in STRATEGIES:
        return name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeRaError(
            f"device_map={name!r} is not a device, as cpu or cuda:0, nor one of {', '.join(STRATEGIES)}."
        ) from None
    count = torch.accelerator.device_count() if accelerator is not None and device.type == accelerator.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        here = "cpu" if accelerator is None else f"cpu and {torch.accelerator.device_count()} of {accelerator.type}"
        raise DeRaError(f"device_map={name!r}: there is no such device here; there is {here}.")
    return name


def free_memory() -> None:
    """Gives an accelerator back what models hold that nobody refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
