"""Choosing λ: a sweep over it, its analysis and its report."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dera_peft.decoding.scoring import Scored, score
    from dera_peft.evaluate.config import SweepConfig
    from dera_peft.evaluate.result import SweepResult
    from dera_peft.evaluate.run import sweep

__all__ = ["Scored", "SweepConfig", "SweepResult", "score", "sweep"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    # the settings of a sweep are read without torch and matplotlib, which take seconds to import
    match name:
        case "Scored" | "score":
            from dera_peft.decoding import scoring as module
        case "SweepConfig":
            from dera_peft.evaluate import config as module
        case "SweepResult":
            from dera_peft.evaluate import result as module
        case "sweep":
            from dera_peft.evaluate import run as module
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
