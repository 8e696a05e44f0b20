"""Sizes, times and objects as people read them."""

from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONG_TEXT, LONG_LIST = 60, 8  # what a `short_repr` does not show whole


def format_bytes(count: float, digits: int = 3) -> str:
    """In the unit that leaves at most `digits` digits (3 or 4) before the point: 1536 is "1.5 KiB"."""
    limit = min(1024, 10**digits)
    for unit in ("B", "KiB", "MiB"):
        if count < limit:
            return f"{count:.{digits}g} {unit}"
        count /= 1024
    return f"{count:.{digits}g} GiB"


def format_duration(seconds: float) -> str:
    """In the two largest units: 328 is "5 min 28 s"."""
    whole = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


def short_repr(value: "DataclassInstance") -> str:
    """A dataclass's `__repr__` in one short line: without what is at its default, and of long values only the size."""
    shown = (each for each in fields(value) if each.repr and not _is_default(each, getattr(value, each.name)))
    parts = (f"{each.name}={_shortened(getattr(value, each.name))}" for each in shown)
    return f"{type(value).__name__}({', '.join(parts)})"


def _is_default(each: Field, value: Any) -> bool:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    return type(value) is type(default) and value == default


def _shortened(value: Any) -> str:
    if isinstance(value, str):
        return repr(value) if len(value) <= LONG_TEXT else repr(value[: LONG_TEXT - 1] + "…")
    size = f" of {len(value)}" if isinstance(value, Collection) else ""
    if isinstance(value, Collection) and len(value) > LONG_LIST:
        return f"<{type(value).__name__}{size}>"
    text = repr(value)
    return text if len(text) <= 2 * LONG_TEXT and "\n" not in text else f"<{type(value).__name__}{size}>"
