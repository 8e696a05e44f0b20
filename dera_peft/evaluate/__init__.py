"""Choosing λ: sweep over it, measure, recommend one, and show what was found."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dera_peft.evaluate.config import SweepConfig
    from dera_peft.evaluate.result import SweepResult
    from dera_peft.evaluate.scoring import Scored, score
    from dera_peft.evaluate.sweeping import sweep

__all__ = ["Scored", "SweepConfig", "SweepResult", "score", "sweep"]

MODULES = {
    "Scored": "scoring",
    "SweepConfig": "config",
    "SweepResult": "result",
    "score": "scoring",
    "sweep": "sweeping",
}


def __getattr__(name: str):
    # a reward for the training programs needs neither matplotlib nor what else a sweep draws with
    if name in MODULES:
        return getattr(import_module(f"dera_peft.evaluate.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
