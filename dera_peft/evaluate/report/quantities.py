"""One arm's reward or KL over λ: what was measured, and the line through it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dera_peft.engine.names import LOGITS
from dera_peft.evaluate.analysis.curve import Curve, through_points
from dera_peft.evaluate.analysis.resamples import Estimate
from dera_peft.evaluate.analysis.summary import LambdaSummary
from dera_peft.evaluate.points import is_of_several

STEPS = 160  # in which a line through all measured points is drawn, as many between any two of them


@dataclass(frozen=True)
class Quantity:
    """
    One arm's reward or KL.

    Attributes:
        measured: by λ, those that are known; by None in an arm without λ, which has no line, as points of several
            adapters have none.
        lam: fine steps of λ from the least to the greatest measured one, `[N]`.
        smooth: a line through the measured points, `[N]`.
        estimated, low, high: the curve's estimate and its interval, NaN where there is none, `[N]`.
    """

    measured: dict[Any, Estimate]
    lam: np.ndarray
    smooth: np.ndarray
    estimated: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, measured: Mapping[Any, Estimate], between: Mapping[Any, Estimate | None]) -> "Quantity":
        known = {lam: value for lam, value in measured.items() if math.isfinite(value.mean)}
        if not known or is_of_several(known):
            return cls(known, *[np.empty(0)] * 5)
        means = [value.mean for value in known.values()]
        lambdas = [math.nan if lam is None else lam for lam in known]
        if len(known) == 1:
            unknown = np.full(1, math.nan)
            return cls(known, np.array(lambdas), np.array(means), unknown, unknown, unknown)
        parts = np.linspace(0, len(known) - 1, 1 + (len(known) - 1) * max(4, STEPS // (len(known) - 1)))
        lam = np.interp(parts, range(len(known)), lambdas)
        smooth = np.asarray(through_points(lambdas, means, lam))
        estimates = [
            np.interp(lam, list(between), [math.nan if e is None else getattr(e, name) for e in between.values()])
            if between
            else np.full(len(lam), math.nan)
            for name in ("mean", "low", "high")
        ]
        return cls(known, lam, smooth, *estimates)

    @property
    def value(self) -> np.ndarray:
        return np.where(np.isfinite(self.estimated), self.estimated, self.smooth)


def kl_of(points: Sequence[LambdaSummary], curve: Curve | None) -> Quantity:
    between = curve.points if curve and points and points[0].arm == LOGITS else []
    return Quantity.of({p.lam: p.kl for p in points}, {p.lam: p.kl for p in between})


def reward_of(points: Sequence[LambdaSummary], curve: Curve | None, reward: str) -> Quantity:
    between = curve.points if curve and points and points[0].arm == LOGITS else []
    return Quantity.of(
        {p.lam: p.rewards[reward].level for p in points if reward in p.rewards},
        {p.lam: p.rewards.get(reward) for p in between},
    )
