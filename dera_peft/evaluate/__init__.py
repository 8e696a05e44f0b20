"""Choosing λ: sweep over it, measure, recommend one, and show what was found."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dera_peft.decoding.scoring import Scored, score
    from dera_peft.evaluate.config import SweepConfig
    from dera_peft.evaluate.result import SweepResult
    from dera_peft.evaluate.run import sweep

__all__ = ["Scored", "SweepConfig", "SweepResult", "score", "sweep"]

MODULES = {
    "Scored": "dera_peft.decoding.scoring",
    "SweepConfig": "dera_peft.evaluate.config",
    "SweepResult": "dera_peft.evaluate.result",
    "score": "dera_peft.decoding.scoring",
    "sweep": "dera_peft.evaluate.run",
}


def __getattr__(name: str):
    # a reward for the training programs needs neither matplotlib nor what else a sweep draws with
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
