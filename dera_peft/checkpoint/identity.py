"""Which weights a model is made of, whatever its folders are called, so that two machines can compare theirs."""

from collections.abc import Mapping
from typing import Any

from dera_peft.checkpoint.fingerprint import base_fingerprint, weights_fingerprint
from dera_peft.checkpoint.record import Record


def identity(record: Record, revision: str | None = None) -> dict[str, Any]:
    """
    A JSON-like value: the base's fingerprint, of each branch those of its adapters, and what λ mixes. None stands for
    weights that are not on this machine as files.

    Args:
        revision: of a base on the hub; the one that the record names unless given.
    """
    adapters = {name: weights_fingerprint(folder) for name, folder in record.adapters.items()}
    return {
        "base": base_fingerprint(record.base, revision or record.base_revision),
        "branches": {branch: [adapters[name] for name in names] for branch, names in record.branches.items()},
        "mixing": record.mixing,
    }


def difference(own: Mapping[str, Any], other: Any) -> str | None:
    """
    What two identities have different, in words; None where nothing is known to be.

    Args:
        other: of another machine, which may be anything.
    """
    if not isinstance(other, Mapping) or not isinstance(other.get("branches"), Mapping):
        return "it does not say which weights it has"
    if None not in (own["base"], other.get("base")) and own["base"] != other["base"]:
        return f"its base has the fingerprint {other['base']}, and this one {own['base']}"
    if other.get("mixing") != own["mixing"]:
        return f"it mixes {other.get('mixing')!r}, and this model {own['mixing']!r}"
    branches, others = own["branches"], other["branches"]
    if branches.keys() != others.keys():
        return f"it has the branches {list(others)}, and this model {list(branches)}"
    for name, adapters in branches.items():
        if len(adapters) != len(others[name]):
            return f"its branch {name!r} has {len(others[name])} adapters, and this one {len(adapters)}"
        for adapter, its in zip(adapters, others[name], strict=True):
            if None not in (adapter, its) and adapter != its:
                return f"an adapter of its branch {name!r} has the fingerprint {its}, and this one {adapter}"
    return None
