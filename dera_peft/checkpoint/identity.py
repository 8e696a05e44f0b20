"""Which weights a model is made of, whatever its folders are called, so that two machines can compare theirs."""

import os
from collections.abc import Mapping
from typing import Any

from dera_peft.checkpoint.adapter_file import CONFIG_FILE
from dera_peft.checkpoint.fingerprint import base_fingerprint, weights_fingerprint
from dera_peft.checkpoint.hub import folder_with
from dera_peft.checkpoint.record import Record


def identity(record: Record, revision: str | None = None) -> dict[str, Any]:
    """
    A JSON-like value: the base's fingerprint, and its id if it is of the hub; of each branch the fingerprints of its
    adapters; and what λ mixes. None stands for what is not known, as of a base that is not on this machine.

    Args:
        revision: of a base on the hub; the one that the record names unless given.
    """
    adapters = {
        name: weights_fingerprint(folder_with(folder, CONFIG_FILE) or folder)
        for name, folder in record.adapters.items()
    }
    return {
        "base": base_fingerprint(record.base, revision or record.base_revision) or record.base_fingerprint,
        "base_id": None if os.path.isdir(record.base) else record.base,
        "branches": {branch: [adapters[name] for name in names] for branch, names in record.branches.items()},
        "mixing": record.mixing,
    }


def describe(record: Record, revision: str | None, quantization: str | None, dtype: Any) -> dict[str, Any]:
    """
    What a server says of its model, in numbers that a client can compare with its own: weights (`identity`),
    quantization and dtype.
    """
    return {
        "weights": identity(record, revision),
        "quantization": quantization,
        "dtype": str(dtype).removeprefix("torch."),
    }


def difference(own: Mapping[str, Any], other: Any) -> str | None:
    """
    What two identities have different, in words; None where nothing is known to be.

    Args:
        other: of another machine, which may be anything.
    """
    others = other.get("branches") if isinstance(other, Mapping) else None
    if not isinstance(others, Mapping) or not all(isinstance(adapters, list) for adapters in others.values()):
        return "it does not say which weights it has"
    if None not in (own["base"], other.get("base")) and own["base"] != other["base"]:
        return f"its base has the fingerprint {other['base']}, and this one {own['base']}"
    if own["base"] is None or other.get("base") is None:
        ids = own["base_id"], other.get("base_id")
        if None not in ids and ids[0] != ids[1]:
            return f"its base is {ids[1]!r}, and this one {ids[0]!r}"
    if other.get("mixing") != own["mixing"]:
        return f"it mixes {other.get('mixing')!r}, and this model {own['mixing']!r}"
    branches = own["branches"]
    if branches.keys() != others.keys():
        return f"it has the branches {list(others)}, and this model {list(branches)}"
    for name, adapters in branches.items():
        if len(adapters) != len(others[name]):
            return f"its branch {name!r} has {len(others[name])} adapters, and this one {len(adapters)}"
        for adapter, its in zip(adapters, others[name], strict=True):
            if None not in (adapter, its) and adapter != its:
                return f"an adapter of its branch {name!r} has the fingerprint {its}, and this one {adapter}"
    return None


def unknown(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts of two identities, without a difference, that can't be compared."""
    parts = []
    if None in (own["base"], other["base"]) and (own["base_id"] is None or own["base_id"] != other.get("base_id")):
        parts.append("base")
    for name, adapters in own["branches"].items():
        if any(None in pair for pair in zip(adapters, other["branches"][name], strict=True)):
            parts.append(f"adapters of {name}")
    return parts
