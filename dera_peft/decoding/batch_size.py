"""How many completions are decoded at once."""

from typing import Any

from dera_peft.settings import COUNT, setting

ON_CPU = 32
ON_GPU = 256  # a step of few rows takes nearly the time of one


def batch_size_setting(panel: str | None = None) -> Any:
    """A field of a dataclass of settings; None is for `Room` to decide."""
    return setting(
        None,
        f"Completions decoded at once, at most; {ON_CPU} on a CPU and {ON_GPU} on a GPU unless given, and fewer where "
        "memory is short.",
        check=COUNT,
        metavar="N",
        panel=panel,
    )
