"""Where a command puts the model."""

import torch

from dera_peft.errors import DeRaError

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's


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
